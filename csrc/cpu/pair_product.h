// Products of pairs of bfloat16 in AVX-512 registers, a few rows by a few vectors of columns.
#pragma once

#include <immintrin.h>

#include <utility>

#include "pair_packing.h"

namespace vllm_score {
namespace cpu {
namespace {

template <int Rows, int Vectors>
struct DotProduct : PairPacking<Vectors * 16, 256, 1, 1> {
  using Base = PairPacking<Vectors * 16, 256, 1, 1>;
  static constexpr int kRows = Rows;

  static void begin() {}
  static void end() {}

  template <int Count>
  static void multiply_rows(const uint32_t* a, const uint32_t* b, int words, float* c,
                            int64_t stride, bool adds) {
    __m512 sum[Count][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int k = 0; k < words; ++k) {
      __m512i column[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) column[j] = _mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 16
      for (int i = 0; i < Count; ++i) {
        const __m512i row = _mm512_set1_epi32(static_cast<int>(a[i * Base::kRowWords]));
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j)
          sum[i][j] = _mm512_dpbf16_ps(sum[i][j], reinterpret_cast<__m512bh>(row),
                                       reinterpret_cast<__m512bh>(column[j]));
      }
      ++a;
      b += Base::kColumns;
    }
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        float* place = c + i * stride + 16 * j;
        _mm512_storeu_ps(place, adds ? _mm512_loadu_ps(place) + sum[i][j] : sum[i][j]);
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
