// The transposition of eight rows of eight words, for the instruction sets that include AVX2.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace vllm_score {
namespace cpu {
namespace {

template <class Simd_>
struct Avx2Transposition {
  using S = Simd_;
  typedef uint32_t Eight __attribute__((vector_size(32)));

  template <class Each>
  static inline __attribute__((always_inline)) void transpose(const unsigned char* const* rows,
                                                              const Each& each) {
    // Half rows first: the two 128-bit lanes of a register hold rows i and i + 4, so that the
    // shuffles, which stay within lanes, finish the work.
    __m256 part[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(rows[i]) + 4 * half);
        const float* high = reinterpret_cast<const float*>(rows[i + 4]) + 4 * half;
        part[4 * half + i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low),
                                                  _mm_loadu_ps(high), 1);
      }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256* p = part + 4 * half;
      const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(p[0], p[1]));
      const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(p[0], p[1]));
      const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(p[2], p[3]));
      const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(p[2], p[3]));
      each(4 * half + 0, reinterpret_cast<Eight>(_mm256_unpacklo_pd(a, c)));
      each(4 * half + 1, reinterpret_cast<Eight>(_mm256_unpackhi_pd(a, c)));
      each(4 * half + 2, reinterpret_cast<Eight>(_mm256_unpacklo_pd(b, d)));
      each(4 * half + 3, reinterpret_cast<Eight>(_mm256_unpackhi_pd(b, d)));
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
