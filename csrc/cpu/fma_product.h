// Products by float32 multiply-add, a few rows by a few vectors of columns in registers. bfloat16
// operands are widened to float32, exactly, while they are packed.
#pragma once

#include <utility>

#include "../ops.h"
#include "pack.h"
#include "simd.h"

namespace vllm_score {
namespace cpu {
namespace {

// Instructions: how 32-bit words are transposed (pack.h). Vectors: of columns held in registers.
template <class Instructions, Dtype dtype, int Rows, int Vectors>
struct FmaProduct {
  using S = typename Instructions::S;
  using F = typename S::F;
  static constexpr int kRows = Rows;
  static constexpr int kColumns = Vectors * S::kWidth;
  static constexpr int kWords = 256;
  static constexpr int kRowWords = kWords + 16;
  static constexpr int kStep = 1;
  static constexpr int kRowStep = 1;
  static constexpr bool kWidens = dtype == Dtype::bf16;
  static constexpr int kElementBytes = kWidens ? 2 : 4;
  static constexpr int kSourceBytes = kElementBytes;

  static void begin() {}
  static void end() {}

  static void pack_row(const unsigned char* row, int64_t bytes, int words, uint32_t* packed) {
    if (!kWidens) {
      std::memcpy(packed, row, bytes);
      return;
    }
    for (int i = 0; i < words; ++i) {
      uint16_t half;
      std::memcpy(&half, row + 2 * i, 2);
      packed[i] = static_cast<uint32_t>(half) << 16;
    }
  }

  static void pack_panel(const unsigned char* const* columns, int64_t bytes, int, int64_t ahead,
                         uint32_t* panel) {
    Packing<Instructions, kColumns, kWidens>::run(columns, bytes, ahead, panel);
  }

  template <int Count>
  static void multiply_rows(const uint32_t* a_words, const uint32_t* b_words, int words, float* c,
                            int64_t stride, bool adds) {
    const float* a = reinterpret_cast<const float*>(a_words);
    const float* b = reinterpret_cast<const float*>(b_words);
    F sum[Count][Vectors] = {};
    for (int k = 0; k < words; ++k) {
      F column[Vectors];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) column[j] = S::load(b + j * S::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < Count; ++i) {
        const F row = S::all(a[i * kRowWords]);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) sum[i][j] += row * column[j];
      }
      ++a;
      b += kColumns;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        float* place = c + i * stride + j * S::kWidth;
        S::store(place, adds ? S::load(place) + sum[i][j] : sum[i][j]);
      }
  }

  using Multiply = void (*)(const uint32_t*, const uint32_t*, int, float*, int64_t, bool);

  template <int... Counts>
  static Multiply choose(int count, std::integer_sequence<int, Counts...>) {
    static constexpr Multiply table[] = {multiply_rows<Counts + 1>...};
    return table[count - 1];
  }

  static void multiply(const uint32_t* a, const uint32_t* b, int words, int rows, float* c,
                       int64_t stride, bool adds) {
    choose(rows, std::make_integer_sequence<int, Rows>{})(a, b, words, c, stride, adds);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
