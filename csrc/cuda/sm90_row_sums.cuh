// The running sums that a thread of the fused kernel keeps for one row of the logits, over the
// columns that it has seen in its accumulators.
//
// Values are "raw": products before the scale, which is folded into the
// exponent, or, where there is a bias, a soft cap or an odd factor, logits already transformed.
// Exponentials are powers of two, 2 ^ (c * raw - reference), where the reference lies within a few
// dozen of the row's maximum so far; in the workspace it is round(c * max), and merge_sm90.cuh
// makes up for the rounding.
#pragma once

#include <limits>

#include "../ops.h"
#include "sm90_ptx.cuh"

namespace vllm_score::cuda::sm90 {

constexpr int kTileColumns = 256;
constexpr int kWordsPerRow = kAccumulators / 4;  // pairs of columns of a row in a thread
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr unsigned kWholeWarp = 0xffffffffu;
// 2 ^ it is 0, and so is its product with 0: stands for -inf where 0 * -inf would be NaN.
constexpr float kFarBelow = -1e4f;
// The varentropy, whose column is the last of the row state, is left to the tiled product (see
// head_path in vllm/score/ops/kernels.py).
constexpr int kWorkspaceColumns = kSumExpDev2;
static_assert(kWorkspaceColumns == kStateColumns - 1);

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The exponent that a maximum of `max` is compared with; a row without a finite logit has none.
__device__ __forceinline__ float reference_of(float max, float c) {
  return max == kMinusInfinity ? 0.0f : max * c;
}

// Merge two disjoint sets of numbers: count, mean, sum of squared deviations (Chan et al.).
__device__ __forceinline__ void merge_moments(float& count, float& mean, float& m2, float count_b,
                                              float mean_b, float m2_b) {
  const float total = count + count_b;
  if (total == 0.0f) return;
  const float share = __fdividef(count_b, total);
  const float difference = mean_b - mean;
  m2 += m2_b + difference * difference * count * share;
  mean += difference * share;
  count = total;
}

// raw > the result if, and only if, raw * factor > threshold as float32 products go.
__device__ __forceinline__ float raw_threshold(float threshold, float factor) {
  if (factor == 1.0f || !isfinite(threshold)) return threshold;
  float raw = threshold / factor;
  for (int i = 0; i < 4 && raw * factor > threshold; ++i) raw = nextafterf(raw, kMinusInfinity);
  for (int i = 0; i < 4; ++i) {
    const float above = nextafterf(raw, -kMinusInfinity);
    if (above * factor > threshold) break;
    raw = above;
  }
  return raw;
}

template <int kStatistics>
struct RowSums {
  static constexpr int kGroups = 8;  // of the columns of a tile
  static constexpr bool kHasEntropy = (kStatistics & kEntropy) != 0;
  static constexpr bool kHasCollision = (kStatistics & kCollision) != 0;
  static constexpr bool kHasTop = (kStatistics & kTop) != 0;
  static constexpr bool kHasMoments = (kStatistics & kMoments) != 0;
  static constexpr bool kHasRank = (kStatistics & kRankOfTarget) != 0;

  float max, reference, exp;
  float exp_x, exp2;                   // sums of e * exponent and of e * e
  float first, second, column;         // the two largest that this thread noted, and where
  float bound;                         // the row's second largest is known to be no less
  float count, mean, m2, rank;

  __device__ __forceinline__ void clear() {
    max = kMinusInfinity;
    reference = exp = exp_x = exp2 = 0.0f;
    first = second = bound = kMinusInfinity;
    column = -1.0f;
    count = mean = m2 = rank = 0.0f;
  }

  // Let the sums stand relative to `new_max`, which is at least the maximum so far.
  __device__ __forceinline__ void raise(float new_max, float c) {
    const float new_reference = reference_of(new_max, c);
    // A large positive shift means that the sums are still 0.
    const float shift = fminf(reference - new_reference, 60.0f);
    const float factor = power_of_two(shift);
    if constexpr (kHasEntropy) exp_x = factor * (exp_x + fmaxf(shift, kFarBelow) * exp);
    if constexpr (kHasCollision) exp2 *= factor * factor;
    exp *= factor;
    max = new_max;
    reference = new_reference;
  }

  // What a pass over the tile finds: sums of e, of e * exponent, of e * e.
  struct Exponentials {
    float e, x, square;
  };
  // And, in the first pass: the largest of each group of columns, how many are above the threshold.
  struct Found {
    float largest[kGroups], above;
  };

  // kFirst: fills `found`. Later, exponents of -inf are kept out of the product with e = 0.
  template <int kRow, bool kFirst>
  __device__ __forceinline__ Exponentials pass(const float (&d)[kAccumulators], float c,
                                               float threshold, Found& found) const {
    // So steep that the difference of two unequal logits saturates to 1, or to 0 if negative.
    constexpr float kSteep = 0x1p80f;
    const float steep_threshold = threshold * kSteep;
    constexpr int kChains = 4, kGroupSize = 2 * kWordsPerRow / kGroups;
    float sums[kChains] = {}, sums_x[2] = {}, squares[2] = {}, above[2] = {};
#pragma unroll
    for (int i = 0; i < 2 * kWordsPerRow; ++i) {
      const float raw = d[4 * (i / 2) + 2 * kRow + i % 2];
      const float exponent = fmaf(raw, c, -reference);
      const float e = power_of_two(exponent);
      sums[i % kChains] += e;
      if constexpr (kHasEntropy) {
        sums_x[i % 2] = fmaf(e, kFirst ? exponent : fmaxf(exponent, kFarBelow), sums_x[i % 2]);
      }
      if constexpr (kHasCollision) squares[i % 2] = fmaf(e, e, squares[i % 2]);
      if constexpr (kFirst) {
        float& largest = found.largest[i / kGroupSize];
        largest = i % kGroupSize == 0 ? raw : fmaxf(largest, raw);
        if constexpr (kHasRank) above[i % 2] += __saturatef(fmaf(raw, kSteep, -steep_threshold));
      }
    }
    if constexpr (kFirst) found.above = above[0] + above[1];
    return {(sums[0] + sums[1]) + (sums[2] + sums[3]), sums_x[0] + sums_x[1],
            squares[0] + squares[1]};
  }

  // The columns of row kRow (0, or 1: the one 8 below) of a tile. `valid` columns of it exist,
  // those beyond hold -inf; `lane_column` is this thread's first; columns count from `tile_start`.
  //
  // The exponentials are taken relative to the maximum of earlier tiles, so that they need not wait
  // for this tile's. Only where that turns out to be far off (in the first tile of a row, as a
  // rule), or a logit to be -inf, are they taken again.
  template <int kRow>
  __device__ __forceinline__ void add(const float (&d)[kAccumulators], float c, float threshold,
                                      int tile_start, int lane_column, int valid) {
    constexpr float kFarthestBelow = -16.0f, kFarthestAbove = 50.0f;
    Found found;
    Exponentials sums = pass<kRow, true>(d, c, threshold, found);
    float tile_max = found.largest[0];
#pragma unroll
    for (int g = 1; g < kGroups; ++g) tile_max = fmaxf(tile_max, found.largest[g]);
    const float reached = fmaxf(max, tile_max);
    const float distance = fmaf(reached, c, -reference);
    const bool far = !(distance >= kFarthestBelow && distance <= kFarthestAbove);
    if (__any_sync(kWholeWarp, far || (kHasEntropy && isnan(sums.x)))) {
      if (far) raise(reached, c);
      sums = pass<kRow, false>(d, c, threshold, found);
    }
    max = reached;
    exp += sums.e;
    if constexpr (kHasEntropy) exp_x += sums.x;
    if constexpr (kHasCollision) exp2 += sums.square;
    if constexpr (kHasRank) rank += found.above;
    if constexpr (kHasTop) {
      if (__any_sync(kWholeWarp, tile_max > bound)) {
        note_largest<kRow>(d, found.largest, tile_start + lane_column);
      }
    }
    if constexpr (kHasMoments) {
      if (valid >= kTileColumns) {
        add_moments<kRow, true>(d, lane_column, valid);
      } else if (valid > lane_column) {
        add_moments<kRow, false>(d, lane_column, valid);
      }
    }
  }

  // Rarely more than a few groups of the whole warp hold anything new.
  template <int kRow>
  __device__ __forceinline__ void note_largest(const float (&d)[kAccumulators],
                                               const float (&largest)[kGroups], int start) {
    constexpr int kGroupWords = kWordsPerRow / kGroups;
    bool news = false;
    int where = -1;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (!__any_sync(kWholeWarp, largest[g] > bound)) continue;
      news = true;
#pragma unroll
      for (int j = g * kGroupWords; j < (g + 1) * kGroupWords; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const float raw = d[4 * j + 2 * kRow + b];
          second = fmaxf(second, fminf(raw, first));
          if (raw > first) {
            first = raw;
            where = 8 * j + b;
          }
        }
      }
    }
    if (where >= 0) column = static_cast<float>(start + where);
    if (news) bound = fmaxf(bound, second_of_quad());
  }

  __device__ __forceinline__ float second_of_quad() const {
    float high = first, low = second;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other = __shfl_xor_sync(kWholeWarp, high, distance);
      const float other_low = __shfl_xor_sync(kWholeWarp, low, distance);
      low = fmaxf(fminf(high, other), fmaxf(low, other_low));
      high = fmaxf(high, other);
    }
    return low;
  }

  template <int kRow, bool kWhole>
  __device__ __forceinline__ void add_moments(const float (&d)[kAccumulators], int lane_column,
                                              int valid) {
    const float shift = d[2 * kRow];
    float sum = 0.0f, square = 0.0f, seen = 0.0f;
#pragma unroll
    for (int j = 0; j < kWordsPerRow; ++j) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const bool exists = kWhole || lane_column + 8 * j + b < valid;
        const float difference = exists ? d[4 * j + 2 * kRow + b] - shift : 0.0f;
        sum += difference;
        square = fmaf(difference, difference, square);
        seen += exists ? 1.0f : 0.0f;
      }
    }
    const float offset = sum / seen;
    merge_moments(count, mean, m2, seen, shift + offset, fmaxf(square - sum * offset, 0.0f));
  }

  // Add what the other three threads of the row have; all four then hold the same.
  __device__ __forceinline__ void merge_quad(float c) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const auto other = [&](float mine) { return __shfl_xor_sync(kWholeWarp, mine, distance); };
      raise(fmaxf(max, other(max)), c);
      exp += other(exp);
      if constexpr (kHasEntropy) exp_x += other(exp_x);
      if constexpr (kHasCollision) exp2 += other(exp2);
      if constexpr (kHasRank) rank += other(rank);
      if constexpr (kHasTop) {
        const float high = other(first), low = other(second), where = other(column);
        second = fmaxf(fminf(first, high), fmaxf(second, low));
        // The lowest id among equals; -1 is none.
        if (high > first || (high == first && where >= 0.0f && where < column)) column = where;
        first = fmaxf(first, high);
      }
      if constexpr (kHasMoments) {
        const float their_count = other(count), their_mean = other(mean), their_m2 = other(m2);
        // In the same order on both sides, so that they keep agreeing.
        if ((threadIdx.x & distance) == 0) {
          merge_moments(count, mean, m2, their_count, their_mean, their_m2);
        } else {
          float n = their_count, average = their_mean, squares = their_m2;
          merge_moments(n, average, squares, count, mean, m2);
          count = n, mean = average, m2 = squares;
        }
      }
    }
  }

  // To and from the workspace: column k of a row is at `at[k * stride]`.
  __device__ __forceinline__ void store(float* at, int64_t stride) const {
    at[kMax * stride] = max;
    at[kSumExp * stride] = exp;
    if constexpr (kHasEntropy) at[kSumExpX * stride] = exp_x;
    if constexpr (kHasCollision) at[kSumExp2 * stride] = exp2;
    if constexpr (kHasTop) {
      at[kSecond * stride] = second;
      at[kArgmax * stride] = column;
    }
    if constexpr (kHasMoments) {
      at[kMean * stride] = mean;
      at[kM2 * stride] = m2;
      at[kCount * stride] = count;
    }
    if constexpr (kHasRank) at[kRank * stride] = rank;
  }

  // Only reads; settle() makes sums of it.
  __device__ __forceinline__ void fetch(const float* at, int64_t stride) {
    max = at[kMax * stride];
    exp = at[kSumExp * stride];
    if constexpr (kHasEntropy) exp_x = at[kSumExpX * stride];
    if constexpr (kHasCollision) exp2 = at[kSumExp2 * stride];
    if constexpr (kHasTop) {
      second = at[kSecond * stride];
      column = at[kArgmax * stride];
    }
    if constexpr (kHasMoments) {
      mean = at[kMean * stride];
      m2 = at[kM2 * stride];
      count = at[kCount * stride];
    }
    if constexpr (kHasRank) rank = at[kRank * stride];
  }

  // A maximum of NaN, which no sum has, says that nothing was stored yet. Of the four threads of
  // a row only the `keeper` takes the sums; all take the bounds.
  __device__ __forceinline__ void settle(float c, bool keeper) {
    const float stored = max, stored_second = second;
    if (isnan(stored) || !keeper) clear();
    if (isnan(stored)) return;
    max = stored;
    reference = reference_of(max, c);
    if constexpr (kHasTop) {
      bound = stored_second;
      if (keeper) first = max;
    }
  }
};

}  // namespace vllm_score::cuda::sm90
