// The product of hidden states with the head, tile by tile, each tile reduced at once. Shared by
// all instruction sets; `Product` says how operands are packed and multiplied.
//
// Operands are packed in words of 32 bits: a float32, or a pair of bfloat16 that one instruction
// multiplies and adds up. A tile is kTileColumns columns of the head by Product::kWords words. It
// is packed once for a block of rows and then stays in the L2 cache, while the rows pass by, a few
// at a time, in the L1 cache. Where H is longer than a tile, it is cut in parts, and the sums over
// the parts are added up. A logit has the same bits whatever the rows and columns beside it are.
#pragma once

#include "jobs.h"
#include "row_reduction.h"
#include "simd.h"

namespace vllm_score {
namespace cpu {
namespace {

// Up to this many rows the columns that are multiplied together are packed and used while they
// are in the L1 cache.
constexpr int64_t kFewRows = 32;

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Memory handed out piece by piece, each on a cache line of its own.
class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }

 private:
  unsigned char* next_;
};

template <class Product>
struct HeadTask {
  using S = typename Product::S;
  using Reduction = RowReduction<S>;
  static constexpr int kRows = Product::kRows;
  static constexpr int kColumns = Product::kColumns;
  static_assert(kTileColumns % kColumns == 0);
  // A row of packed hidden states is one cache line longer than it needs, so that the rows that are
  // read together do not fall on the same sets of the cache.
  static constexpr int64_t kRowWords = Product::kRowWords;
  static constexpr int64_t kPartBytes = int64_t{Product::kWords} * Product::kSourceBytes;

  static int64_t row_bytes(int64_t H) { return H * Product::kElementBytes; }
  static int64_t parts(int64_t H) { return (row_bytes(H) + kPartBytes - 1) / kPartBytes; }
  static int64_t part_bytes(int64_t H, int64_t part) {
    const int64_t left = row_bytes(H) - part * kPartBytes;
    return left < kPartBytes ? left : kPartBytes;
  }
  static int words(int64_t H, int64_t part) {
    const int64_t exact =
        (part_bytes(H, part) + Product::kSourceBytes - 1) / Product::kSourceBytes;
    return static_cast<int>(round_up(exact, Product::kStep));
  }
  static int64_t padded_rows(int64_t rows) { return round_up(rows, Product::kRowStep); }

  // Packed hidden states are [parts, padded rows, kRowWords].
  static int64_t packed_words(int64_t rows, int64_t H) {
    return parts(H) * padded_rows(rows) * kRowWords;
  }

  // Packs one row; a null one is a row of zeros.
  static void pack_row(const HeadJob& job, const unsigned char* row, int64_t place,
                       int64_t all_rows, uint32_t* packed) {
    for (int64_t part = 0; part < parts(job.H); ++part)
      Product::pack_row(row ? row + part * kPartBytes : nullptr, part_bytes(job.H, part),
                        words(job.H, part),
                        packed + (part * padded_rows(all_rows) + place) * kRowWords);
  }

  static void pack_hidden(const HeadJob& job, int64_t first_row, int64_t last_row) {
    const int64_t rows = job.results.rows;
    const int64_t last = last_row == rows ? padded_rows(rows) : last_row;
    for (int64_t row = first_row; row < last; ++row)
      pack_row(job, row < rows ? job.hidden + row * job.hidden_stride : nullptr, row, rows,
               job.packed_hidden);
  }

  // Packs a part of kColumns rows of the head; null pointers stand for rows of zeros.
  // `ahead`: how far the same columns of the next panel are, in bytes; those are prefetched.
  static void pack_columns(const HeadJob& job, const unsigned char* const* columns, int64_t part,
                           int64_t ahead, uint32_t* panel) {
    alignas(64) static const unsigned char zeros[kPartBytes] = {};
    const unsigned char* starts[kColumns];
    for (int j = 0; j < kColumns; ++j)
      starts[j] = columns[j] ? columns[j] + part * kPartBytes : zeros;
    Product::pack_panel(starts, part_bytes(job.H, part), words(job.H, part), ahead, panel);
  }

  static float bias_at(const HeadJob& job, int64_t column) {
    if (job.dtype == Dtype::f32) {
      float value;
      std::memcpy(&value, job.bias + column * 4, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, job.bias + column * 2, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // The rows whose logits must be kept until the last part of H.
  static int64_t kept_rows(int64_t rows, int64_t H) {
    return parts(H) == 1 && rows > kFewRows ? kRows : round_up(rows, kRows);
  }

  static int64_t scratch_bytes(int64_t rows, int64_t H) {
    // The last rows may be few, whatever `rows` is.
    const int64_t few = round_up(kFewRows, kRows), all = kept_rows(rows, H);
    return 4 * kTileColumns * (int64_t{Product::kWords} + (all > few ? all : few) + 1) + 256;
  }

  static void score(const HeadJob& job, const Block& block, void* scratch) {
    const Results& out = job.results;
    float* states = out.partial + block.slice * out.rows * kStateColumns;
    for (int64_t row = block.first_row; row < block.last_row; ++row)
      clear_state(states + row * kStateColumns);
    Product::begin();
    for (int64_t column = block.first_column; column < block.last_column; column += kTileColumns)
      score_tile(job, block, column, states, scratch);
    Product::end();
  }

  static void score_tile(const HeadJob& job, const Block& block, int64_t first_column,
                         float* states, void* scratch) {
    const int64_t rows = block.last_row - block.first_row, all_rows = job.results.rows;
    const int64_t left = block.last_column - first_column;
    const int n = static_cast<int>(left < kTileColumns ? left : kTileColumns);
    const int panels = (n + kColumns - 1) / kColumns;
    const int together = rows <= kFewRows ? 1 : panels;
    const bool keeps_all = kept_rows(rows, job.H) >= rows;

    Arena arena(scratch);
    uint32_t* packed = arena.take<uint32_t>(int64_t{kTileColumns} * Product::kWords);
    float* bias = arena.take<float>(kTileColumns);
    float* logits = arena.take<float>(0);  // [kept rows, kTileColumns]
    if (job.bias)
      for (int j = 0; j < n; ++j) bias[j] = bias_at(job, first_column + j);

    const int64_t last_part = parts(job.H) - 1;
    for (int panel = 0; panel < panels; panel += together)
      for (int64_t part = 0; part <= last_part; ++part) {
        for (int p = panel; p < panel + together; ++p)
          pack_tile_panel(job, first_column, n, p, part, packed + panel_words(p - panel));
        const uint32_t* hidden = job.packed_hidden + part * padded_rows(all_rows) * kRowWords;
        const bool finishes = part == last_part && panel + together >= panels;
        for (int64_t row = block.first_row; row < block.last_row; row += kRows) {
          const int64_t rest = block.last_row - row;
          const int count = static_cast<int>(rest < kRows ? rest : kRows);
          float* c = logits + (keeps_all ? (row - block.first_row) * kTileColumns : 0);
          for (int p = panel; p < panel + together; ++p)
            Product::multiply(hidden + row * kRowWords, packed + panel_words(p - panel),
                              words(job.H, part), count, c + p * kColumns, kTileColumns,
                              part > 0);
          if (finishes)
            for (int i = 0; i < count; ++i)
              finish_row(job, row + i, first_column, n, job.bias ? bias : nullptr,
                         c + i * kTileColumns, states + (row + i) * kStateColumns);
        }
      }
  }

  static int64_t panel_words(int panels) {
    return int64_t{panels} * kColumns * Product::kWords;
  }

  static void pack_tile_panel(const HeadJob& job, int64_t first_column, int n, int panel,
                              int64_t part, uint32_t* packed) {
    const unsigned char* columns[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      const int column = panel * kColumns + j;
      columns[j] = column < n ? job.weight + (first_column + column) * job.weight_stride : nullptr;
    }
    pack_columns(job, columns, part, kColumns * job.weight_stride, packed);
  }

  static void finish_row(const HeadJob& job, int64_t row, int64_t first_column, int n,
                         const float* bias, float* z, float* state) {
    const Results& out = job.results;
    Reduction::transform(z, n, bias, out.transform);
    Reduction::add(z, n, out.first_id + first_column, out, row, state);
    if (out.sorted.k > 0) pick_targets(z, n, out.first_id + first_column, out, row);
  }

  // The targets' logits, by the same arithmetic as above: kColumns pairs of a row and a column are
  // the diagonal of a small product.
  static int64_t gather_scratch_bytes(int64_t H) {
    return 4 * (packed_words(kColumns, H) +
                kColumns * (int64_t{Product::kWords} + round_up(kColumns, kRows) + 1)) +
           256;
  }

  static void gather(const HeadJob& job, const TargetPair* pairs, int count, float* out,
                     void* scratch) {
    Arena arena(scratch);
    uint32_t* hidden = arena.take<uint32_t>(packed_words(kColumns, job.H));
    uint32_t* panel = arena.take<uint32_t>(int64_t{kColumns} * Product::kWords);
    float* bias = arena.take<float>(kColumns);
    float* z = arena.take<float>(0);  // [kColumns rounded up, kColumns]

    const unsigned char* columns[kColumns] = {};
    int place[kColumns];  // of the pair's row in `hidden`
    int rows = 0;
    for (int i = 0; i < count; ++i) {
      columns[i] = job.weight + pairs[i].column * job.weight_stride;
      if (job.bias) bias[i] = bias_at(job, pairs[i].column);
      if (i == 0 || pairs[i].row != pairs[i - 1].row)
        pack_row(job, job.hidden + pairs[i].row * job.hidden_stride, rows++, kColumns, hidden);
      place[i] = rows - 1;
    }
    for (int row = rows; row < padded_rows(rows); ++row)
      pack_row(job, nullptr, row, kColumns, hidden);

    Product::begin();
    for (int64_t part = 0; part < parts(job.H); ++part) {
      pack_columns(job, columns, part, 0, panel);
      for (int row = 0; row < rows; row += kRows)
        Product::multiply(hidden + (part * padded_rows(kColumns) + row) * kRowWords, panel,
                          words(job.H, part), rows - row < kRows ? rows - row : kRows,
                          z + row * kColumns, kColumns, part > 0);
    }
    Product::end();
    for (int row = 0; row < rows; ++row)
      Reduction::transform(z + row * kColumns, count, job.bias ? bias : nullptr,
                           job.results.transform);
    for (int i = 0; i < count; ++i) out[pairs[i].place] = z[place[i] * kColumns + i];
  }

  static constexpr HeadKernel table() {
    return {packed_words, scratch_bytes, pack_hidden, score, gather_scratch_bytes, kColumns,
            gather};
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
