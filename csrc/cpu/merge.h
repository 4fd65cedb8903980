// Merging the states of two parts of the vocabulary.
#pragma once

#include <cmath>
#include <limits>

#include "../ops.h"

namespace vllm_score {
namespace cpu {

// A part without a finite logit weighs nothing; its sum may still be NaN, and 0 * NaN is NaN.
struct PartWeight {
  float shift, weight;
  PartWeight(float top, float m) {
    const bool empty = top == -std::numeric_limits<float>::infinity();
    shift = empty ? 0.0f : top - m;
    weight = empty ? 0.0f : std::exp(shift);
  }
};

inline void merge_top(float* into, const float* part) {
  if (part[kMax] > into[kMax]) {
    into[kSecond] = std::fmax(into[kMax], part[kSecond]);
    into[kArgmax] = part[kArgmax];
  } else if (part[kMax] == into[kMax]) {
    into[kSecond] = into[kMax];  // its ids come before the part's
  } else {
    into[kSecond] = std::fmax(into[kSecond], part[kMax]);
  }
}

// Adds `part` to `into`: the columns that `statistics` names, MAX and SUM_EXP. The part's ids are
// the higher ones.
inline void merge_state(float* into, const float* part, int statistics) {
  const float m = part[kMax] > into[kMax] ? part[kMax] : into[kMax];
  const PartWeight a(into[kMax], m), b(part[kMax], m);
  if (statistics & kVarentropy) {
    // With weights, otherwise as the moments below. A sum of NaN passes no comparison, and stays.
    const float sum = into[kSumExp] * a.weight, part_sum = part[kSumExp] * b.weight;
    into[kSumExpDev2] = into[kSumExpDev2] * a.weight + part[kSumExpDev2] * b.weight;
    if (sum > 0 && part_sum > 0) {
      const float mean = a.shift + into[kSumExpX] / into[kSumExp];
      const float apart = b.shift + part[kSumExpX] / part[kSumExp] - mean;
      into[kSumExpDev2] += apart * apart * (sum * (part_sum / (sum + part_sum)));
    }
  }
  if (statistics & kEntropy) {
    const auto moved = [](const float* state, const PartWeight& w) {
      return w.weight == 0 ? 0.0f
                           : w.weight * (state[kSumExpX] + w.shift * state[kSumExp]);
    };
    into[kSumExpX] = moved(into, a) + moved(part, b);
  }
  if (statistics & kCollision)
    into[kSumExp2] =
        into[kSumExp2] * (a.weight * a.weight) + part[kSumExp2] * (b.weight * b.weight);
  if (statistics & kTop) merge_top(into, part);
  if (statistics & kMoments && part[kCount] > 0) {
    // Chan, Golub and LeVeque (1979).
    const float count = into[kCount] + part[kCount];
    const float share = part[kCount] / count, apart = part[kMean] - into[kMean];
    into[kMean] += apart * share;
    into[kM2] += part[kM2] + apart * apart * (into[kCount] * share);
    into[kCount] = count;
  }
  if (statistics & kRankOfTarget) into[kRank] += part[kRank];
  into[kSumExp] = into[kSumExp] * a.weight + part[kSumExp] * b.weight;
  into[kMax] = m;
}

}  // namespace cpu
}  // namespace vllm_score
