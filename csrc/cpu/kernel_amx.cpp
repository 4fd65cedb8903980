// AMX: two by two tiles of 16 rows by 16 columns, products of pairs of bfloat16, float32 sums.
#include "jobs.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512VL__)

#include <immintrin.h>

#include "head_task.h"
#include "pair_packing.h"

namespace vllm_score {
namespace cpu {
namespace {

// 512 words: longer sums in the tiles than elsewhere, because taking them out costs more.
struct TileProduct : PairPacking<32, 512, 16, 16> {
  static constexpr int kRows = 32;

  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Configuration) == 64);

  static void begin() {
    const Configuration configuration;
    _tile_loadconfig(&configuration);
  }
  static void end() { _tile_release(); }

  // The intrinsics do not tell the compiler which memory they read.
  static void order_memory() { __asm__ volatile("" ::: "memory"); }

  static void multiply(const uint32_t* a, const uint32_t* b, int words, int rows, float* c,
                       int64_t stride, bool adds) {
    if (!adds && rows == kRows) return multiply_tiles<2>(a, b, words, c, stride);
    alignas(64) float sum[kRows * kColumns];
    if (rows > 16)
      multiply_tiles<2>(a, b, words, sum, kColumns);
    else
      multiply_tiles<1>(a, b, words, sum, kColumns);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kColumns; j += S::kWidth) {
        float* place = c + i * stride + j;
        const S::F v = S::load(sum + i * kColumns + j);
        S::store(place, adds ? S::load(place) + v : v);
      }
  }

  // Tiles 0..3 hold sums, 4 and 5 rows, 6 and 7 columns.
  template <int RowTiles>
  static void multiply_tiles(const uint32_t* a, const uint32_t* b, int words, float* c,
                             int64_t stride) {
    order_memory();
    _tile_zero(0);
    _tile_zero(1);
    if (RowTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < words; k += 16) {
      const uint32_t* columns = b + k * kColumns;
      _tile_loadd(6, columns, kColumns * 4);
      _tile_loadd(7, columns + 16, kColumns * 4);
      _tile_loadd(4, a + k, kRowWords * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (RowTiles == 2) {
        _tile_loadd(5, a + 16 * kRowWords + k, kRowWords * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    if (RowTiles == 2) {
      _tile_stored(2, c + 16 * stride, stride * 4);
      _tile_stored(3, c + 16 * stride + 16, stride * 4);
    }
    order_memory();
  }
};

constexpr HeadKernel kBf16 = HeadTask<TileProduct>::table();

}  // namespace

const HeadKernel* const kAmxBf16 = &kBf16;

}  // namespace cpu
}  // namespace vllm_score

#else

namespace vllm_score {
namespace cpu {
const HeadKernel* const kAmxBf16 = nullptr;
}  // namespace cpu
}  // namespace vllm_score

#endif
