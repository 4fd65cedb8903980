// The three entry points: rows in groups, each cut into tasks that run on the caller's threads.
//
// The vocabulary is cut into slices, however many threads there are, and the states of the slices
// are merged in their order: results do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "merge.h"
#include "paths.h"

namespace vllm_score {
namespace cpu {
namespace {

// Rows whose packed hidden states and states of slices are held at once.
constexpr int64_t kGroupRows = 1024;
// Slices of the vocabulary. More would cost more merging.
constexpr int64_t kMostSlices = 64;
// Fewest rows for which a task packs its slice of the head: packing must not outweigh the product.
constexpr int64_t kFewestBlockRows = 128;
// Tasks a thread, so that the last ones finish together.
constexpr int64_t kTasksAThread = 4;
// Fewest logits in memory that are worth a slice of their own.
constexpr int64_t kSliceLogits = 16384;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, FreeMemory>;

// Not initialised: pages that a task does not touch cost nothing.
Memory allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, divide_up(std::max<int64_t>(bytes, 1), 64) * 64);
  if (!memory) throw std::bad_alloc();
  return Memory(memory);
}

// Calls body(task, thread) for every task; each thread takes the next one that is left.
template <class Body>
void run_tasks(int64_t tasks, int threads, const Body& body) {
  const int workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), tasks));
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      body(task, thread);
  };
  if (workers <= 1)
    work(0);
  else
    parallel(workers, work);
}

// How the columns and the rows of a group are cut into tasks.
struct Grid {
  int64_t rows, columns;
  int64_t slice_columns, slices;
  int64_t block_rows, row_blocks;

  Grid(int64_t rows, int64_t columns, int64_t granule, int64_t fewest_rows, int threads)
      : rows(rows), columns(columns) {
    const int64_t granules = divide_up(columns, granule);
    slice_columns = divide_up(granules, kMostSlices) * granule;
    slices = divide_up(columns, slice_columns);
    const int64_t wanted = divide_up(kTasksAThread * threads, slices);
    block_rows = std::max(divide_up(rows, wanted), std::min(fewest_rows, rows));
    row_blocks = divide_up(rows, block_rows);
  }

  int64_t tasks() const { return slices * row_blocks; }

  Block block(int64_t task) const {
    const int64_t slice = task / row_blocks, first_row = task % row_blocks * block_rows;
    const int64_t first_column = slice * slice_columns;
    return {slice, first_row, std::min(rows, first_row + block_rows), first_column,
            std::min(columns, first_column + slice_columns)};
  }
};

// The targets of one group of rows after the other, in ascending order of ids within a row.
class TargetOrder {
 public:
  explicit TargetOrder(int64_t k) : k_(k) {}

  SortedTargets of(const int64_t* targets, int64_t rows) {
    if (k_ <= 1) return {k_, targets, nullptr};
    ids_.resize(rows * k_);
    slots_.resize(rows * k_);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t* from = targets + row * k_;
      int32_t* slots = slots_.data() + row * k_;
      std::iota(slots, slots + k_, 0);
      std::sort(slots, slots + k_, [&](int32_t a, int32_t b) { return from[a] < from[b]; });
      for (int64_t i = 0; i < k_; ++i) ids_[row * k_ + i] = from[slots[i]];
    }
    return {k_, ids_.data(), slots_.data()};
  }

 private:
  int64_t k_;
  std::vector<int64_t> ids_;
  std::vector<int32_t> slots_;
};

Results results_of(const RowOut& out, int64_t first_row, int64_t rows, TargetOrder& order,
                   float* partial) {
  return {out.transform,
          out.statistics,
          out.first_id,
          out.threshold ? out.threshold + first_row : nullptr,
          out.targets + first_row * out.k,
          order.of(out.targets + first_row * out.k, rows),
          out.target_logits + first_row * out.k,
          partial,
          rows};
}

void merge_slices(const Results& results, int64_t slices, float* state, int threads) {
  const int64_t rows = results.rows;
  const int64_t block = std::max<int64_t>(64, divide_up(rows, threads));
  run_tasks(divide_up(rows, block), threads, [&](int64_t task, int) {
    for (int64_t row = task * block; row < std::min(rows, (task + 1) * block); ++row)
      for (int64_t slice = 0; slice < slices; ++slice)
        merge_state(state + row * kStateColumns,
                    results.partial + (slice * rows + row) * kStateColumns, results.statistics);
  });
}

Memory allocate_partial(int64_t slices, int64_t rows) {
  return allocate(slices * rows * kStateColumns * static_cast<int64_t>(sizeof(float)));
}

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace

void reduce_logits(const void* logits, Dtype dtype, int64_t rows, int64_t n, int64_t row_stride,
                   const RowOut& out, int threads) {
  if (rows <= 0 || n <= 0) return;
  const Path& path = current_path();
  const int64_t group = std::min(rows, kGroupRows);
  const Grid grid_of_group(group, n, kSliceLogits, 1, threads);
  const Memory partial = allocate_partial(grid_of_group.slices, group);
  TargetOrder order(out.k);
  for (int64_t first = 0; first < rows; first += group) {
    const int64_t count = std::min(group, rows - first);
    const int64_t stride = row_stride * element_bytes(dtype);
    const LogitsJob job{
        static_cast<const unsigned char*>(logits) + first * stride, stride, dtype,
        results_of(out, first, count, order, static_cast<float*>(partial.get()))};
    const Grid grid(count, n, kSliceLogits, 1, threads);
    run_tasks(grid.tasks(), threads,
              [&](int64_t task, int) { path.logits(job, grid.block(task)); });
    merge_slices(job.results, grid.slices, out.state + first * kStateColumns, threads);
  }
}

void score_head(const void* hidden, int64_t hidden_stride, const void* weight,
                int64_t weight_stride, const void* bias, Dtype dtype, int64_t rows, int64_t n,
                int64_t H, const RowOut& out, int threads) {
  if (rows <= 0 || n <= 0) return;
  const Path& path = current_path();
  const HeadKernel& kernel = dtype == Dtype::f32 ? *path.f32 : *path.bf16;
  const int64_t group = std::min(rows, kGroupRows);
  const Grid grid_of_group(group, n, kTileColumns, kFewestBlockRows, threads);
  const Memory partial = allocate_partial(grid_of_group.slices, group);
  const Memory packed = allocate(4 * kernel.packed_words(group, H));
  const int64_t scratch_bytes = kernel.scratch_bytes(grid_of_group.block_rows, H);
  const Memory scratch = allocate(std::max(threads, 1) * scratch_bytes);
  TargetOrder order(out.k);
  const int64_t bytes = element_bytes(dtype);
  for (int64_t first = 0; first < rows; first += group) {
    const int64_t count = std::min(group, rows - first);
    const HeadJob job{
        static_cast<const unsigned char*>(hidden) + first * hidden_stride * bytes,
        static_cast<const unsigned char*>(weight),
        static_cast<const unsigned char*>(bias),
        hidden_stride * bytes,
        weight_stride * bytes,
        dtype,
        n,
        H,
        static_cast<uint32_t*>(packed.get()),
        results_of(out, first, count, order, static_cast<float*>(partial.get()))};
    const int64_t pack_rows = 32;
    run_tasks(divide_up(count, pack_rows), threads, [&](int64_t task, int) {
      kernel.pack_hidden(job, task * pack_rows, std::min(count, (task + 1) * pack_rows));
    });
    const Grid grid(count, n, kTileColumns, kFewestBlockRows, threads);
    run_tasks(grid.tasks(), threads, [&](int64_t task, int thread) {
      kernel.score(job, grid.block(task),
                   static_cast<unsigned char*>(scratch.get()) + thread * scratch_bytes);
    });
    merge_slices(job.results, grid.slices, out.state + first * kStateColumns, threads);
  }
}

void target_logits(const void* hidden, int64_t hidden_stride, const void* weight,
                   int64_t weight_stride, const void* bias, Dtype dtype, int64_t rows, int64_t n,
                   int64_t H, const int64_t* targets, int64_t k, int64_t first_id,
                   const Transform& transform, float* out, int threads) {
  std::vector<TargetPair> pairs;
  for (int64_t i = 0; i < rows * k; ++i)
    if (targets[i] >= first_id && targets[i] < first_id + n)
      pairs.push_back({i / k, targets[i] - first_id, i});
  if (pairs.empty()) return;

  const Path& path = current_path();
  const HeadKernel& kernel = dtype == Dtype::f32 ? *path.f32 : *path.bf16;
  HeadJob job{};
  job.hidden = static_cast<const unsigned char*>(hidden);
  job.weight = static_cast<const unsigned char*>(weight);
  job.bias = static_cast<const unsigned char*>(bias);
  job.hidden_stride = hidden_stride * element_bytes(dtype);
  job.weight_stride = weight_stride * element_bytes(dtype);
  job.dtype = dtype;
  job.n = n;
  job.H = H;
  job.results.transform = transform;
  const int64_t scratch_bytes = divide_up(kernel.gather_scratch_bytes(H), 64) * 64;
  const Memory scratch = allocate(std::max(threads, 1) * scratch_bytes);
  const int64_t total = static_cast<int64_t>(pairs.size()), together = kernel.pairs_at_once;
  run_tasks(divide_up(total, together), threads, [&](int64_t task, int thread) {
    const int64_t first = task * together;
    kernel.gather(job, pairs.data() + first,
                  static_cast<int>(std::min(together, total - first)), out,
                  static_cast<unsigned char*>(scratch.get()) + thread * scratch_bytes);
  });
}

}  // namespace cpu
}  // namespace vllm_score
