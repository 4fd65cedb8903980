// Packing for the instructions that multiply pairs of bfloat16: a word is a pair, as it lies in
// memory.
#pragma once

#include "pack.h"
#include "simd.h"
#include "transpose_avx2.h"

namespace vllm_score {
namespace cpu {
namespace {

template <int Columns, int Words, int Step, int RowStep>
struct PairPacking {
  using S = Simd<64>;
  static constexpr int kColumns = Columns;
  static constexpr int kWords = Words;
  static constexpr int kRowWords = Words + 16;
  static constexpr int kStep = Step;
  static constexpr int kRowStep = RowStep;
  static constexpr int kElementBytes = 2;
  static constexpr int kSourceBytes = 4;

  // A null row is one of zeros.
  static void pack_row(const unsigned char* row, int64_t bytes, int words, uint32_t* packed) {
    const int64_t filled = row ? bytes : 0;
    if (row) std::memcpy(packed, row, bytes);
    std::memset(reinterpret_cast<unsigned char*>(packed) + filled, 0, 4 * int64_t{words} - filled);
  }

  static void pack_panel(const unsigned char* const* columns, int64_t bytes, int words,
                         int64_t ahead, uint32_t* panel) {
    Packing<Avx2Transposition<S>, Columns, false>::run(columns, bytes, ahead, panel);
    const int64_t written = (bytes + 31) / 32 * 8;
    if (words > written)
      std::memset(panel + written * Columns, 0, (words - written) * Columns * 4);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
