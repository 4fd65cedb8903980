// The sums that a thread of the one-pass reduction keeps of its columns, and their merging.
#pragma once

#include <limits>

#include "../ops.h"

namespace vllm_score::cuda {

constexpr int kWarp = 32;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr unsigned kNoId = 0xffffffffu;
// exp() of it is 0, and so is its product with 0: stands for -inf where 0 * -inf would be NaN.
constexpr float kFarBelow = -1e4f;

__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// Sums over some columns of a row, relative to `max`.
template <int kStatistics>
struct Sums {
  float max, exp, exp_x, exp2, second;
  unsigned argmax;          // column
  float shifted, shifted2;  // sums of x - shift and of its square
  unsigned above;           // columns above the threshold
  float exp_dev2;           // sum of exponentials times squares about their mean

  __device__ __forceinline__ static Sums none() {
    return {kMinusInfinity, 0.0f, 0.0f, 0.0f, kMinusInfinity, kNoId, 0.0f, 0.0f, 0, 0.0f};
  }

  // Make the sums relative to a maximum that is at least as large.
  __device__ __forceinline__ void rescale(float new_max) {
    const float shift = fmaxf(max - (new_max == kMinusInfinity ? 0.0f : new_max), kFarBelow);
    const float factor = fast_exp(shift);
    if constexpr (kStatistics & kEntropy) exp_x = factor * (exp_x + shift * exp);
    if constexpr (kStatistics & kCollision) exp2 *= factor * factor;
    if constexpr (kStatistics & kVarentropy) exp_dev2 *= factor;
    exp *= factor;
    max = new_max;
  }

  // Element i of x is in column(i), ascending. Elements from `valid` on are -inf and no columns.
  template <int N, class Column>
  __device__ __forceinline__ void add(const float (&x)[N], int valid, const Column& column,
                                      float shift, float threshold) {
    float largest = max;
    if constexpr (kStatistics & kTop) {
      if (argmax == kNoId) argmax = column(0);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        second = fmaxf(second, fminf(x[i], largest));
        if (x[i] > largest) argmax = column(i);
        largest = fmaxf(largest, x[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) largest = fmaxf(largest, x[i]);
    }
    rescale(largest);
    const float base = largest == kMinusInfinity ? 0.0f : largest;
    if constexpr (kStatistics & kVarentropy) add_exponentials_twice(x, base);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float below = x[i] - base;
      const float term = fast_exp(below);
      if constexpr (!(kStatistics & kVarentropy)) {
        exp += term;
        if constexpr (kStatistics & kEntropy) exp_x += term * fmaxf(below, kFarBelow);
      }
      if constexpr (kStatistics & kCollision) exp2 += term * term;
      if constexpr (kStatistics & kRankOfTarget) above += x[i] > threshold;
      if constexpr (kStatistics & kMoments) {
        const float d = i < valid ? x[i] - shift : 0.0f;
        shifted += d;
        shifted2 += d * d;
      }
    }
  }

  // Take in squares about the mean of numbers whose exponentials have that sum, which are not yet in
  // `exp`: Chan, Golub, LeVeque, with weights. A sum of NaN passes no comparison; `exp` tells it.
  __device__ __forceinline__ void merge_deviations(float other_exp, float other_mean,
                                                   float other_dev2) {
    if (!(other_exp > 0.0f)) return;
    exp_dev2 += other_dev2;
    if (!(exp > 0.0f)) return;
    const float apart = other_mean - __fdividef(exp_x, exp);
    exp_dev2 += apart * apart * (exp * __fdividef(other_exp, exp + other_exp));
  }

  // The sums of exponentials, and then, about their mean, the squares.
  template <int N>
  __device__ __forceinline__ void add_exponentials_twice(const float (&x)[N], float base) {
    float sum = 0.0f, sum_x = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float term = fast_exp(x[i] - base);
      sum += term;
      sum_x += term * fmaxf(x[i] - base, kFarBelow);
    }
    const float mean = sum > 0.0f ? __fdividef(sum_x, sum) : 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float apart = fmaxf(x[i] - base, kFarBelow) - mean;
      squares += fast_exp(x[i] - base) * apart * apart;
    }
    merge_deviations(sum, mean, squares);
    exp += sum;
    exp_x += sum_x;
  }

  // Merge the largest, the second largest and the column of the largest (lowest among equals).
  __device__ __forceinline__ void merge_top(float other_max, float other_second,
                                            unsigned other_argmax, float own_max) {
    second = fmaxf(fmaxf(second, other_second), fminf(own_max, other_max));
    if (other_max > own_max || (other_max == own_max && other_argmax < argmax)) {
      argmax = other_argmax;
    }
  }
};

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

// The sums of the warp, in every lane. Sums that xor-shuffles build are the same in all lanes:
// each step adds the same two numbers, and addition commutes.
template <int kStatistics>
__device__ __forceinline__ void merge_warp(Sums<kStatistics>& s) {
  float largest = s.max;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAll, largest, offset);
    if constexpr (kStatistics & kTop) {
      const float other_second = __shfl_xor_sync(kAll, s.second, offset);
      const unsigned other_argmax = __shfl_xor_sync(kAll, s.argmax, offset);
      s.merge_top(other, other_second, other_argmax, largest);
    }
    largest = fmaxf(largest, other);
  }
  s.rescale(largest);
  const float own_exp = s.exp, own_x = s.exp_x;
  s.exp = warp_sum(s.exp);
  if constexpr (kStatistics & kEntropy) s.exp_x = warp_sum(s.exp_x);
  if constexpr (kStatistics & kVarentropy) {
    const float apart = own_exp > 0.0f ? __fdividef(own_x, own_exp) - __fdividef(s.exp_x, s.exp) : 0.0f;
    s.exp_dev2 = warp_sum(s.exp_dev2 + own_exp * apart * apart);
  }
  if constexpr (kStatistics & kCollision) s.exp2 = warp_sum(s.exp2);
  if constexpr (kStatistics & kMoments) {
    s.shifted = warp_sum(s.shifted);
    s.shifted2 = warp_sum(s.shifted2);
  }
  if constexpr (kStatistics & kRankOfTarget) s.above = __reduce_add_sync(kAll, s.above);
}

}  // namespace vllm_score::cuda
