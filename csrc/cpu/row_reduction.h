// The reduction of a stretch of one row of logits into its state (see vllm/score/ops/row_state.py).
#pragma once

#include <math.h>

#include "jobs.h"
#include "simd.h"

namespace vllm_score {
namespace cpu {
namespace {

template <class S>
struct RowReduction {
  using F = typename S::F;
  using I = typename S::I;
  static constexpr int W = S::kWidth;

  // z becomes x = scale * cap(z + bias). `bias` may be null.
  static void transform(float* z, int n, const float* bias, const Transform& t) {
    const bool caps = t.soft_cap > 0, scales = t.scale != 1;
    if (!bias && !caps && !scales) return;
    for (int i = 0; i < n; i += W) {
      const bool whole = i + W <= n;
      F v = whole ? S::load(z + i) : S::load_part(z + i, n - i, 0);
      if (bias) v += whole ? S::load(bias + i) : S::load_part(bias + i, n - i, 0);
      if (caps) v = S::tanh(v / t.soft_cap) * t.soft_cap;
      if (scales) v *= t.scale;
      if (whole)
        S::store(z + i, v);
      else
        std::memcpy(z + i, &v, (n - i) * sizeof(float));
    }
  }

  // Adds the n columns at x to `state`; column 0 has the id `first_id`.
  static void add(const float* x, int n, int64_t first_id, const Results& out, int64_t row,
                  float* state) {
    const bool moments = out.statistics & kMoments, rank = out.statistics & kRankOfTarget;
    First first;
    if (moments)
      first = rank ? first_pass<true, true>(x, n, out.threshold[row])
                   : first_pass<true, false>(x, n, 0);
    else
      first = rank ? first_pass<false, true>(x, n, out.threshold[row])
                   : first_pass<false, false>(x, n, 0);
    if (rank) add_rank(x, n, first.above, first_id, out, row, state);
    if (out.statistics & kTop && first.max > state[kSecond])
      add_top(x, n, first.max, first_id, state);
    if (first.max > state[kMax]) raise_max(first.max, out.statistics, state);
    const Sums before{state[kSumExp], state[kSumExpX]};
    const Sums here = add_sums(x, n, first.sum / n, out.statistics, state);
    if (out.statistics & kVarentropy) add_deviations(x, n, before, here, state);
  }

 private:
  // Of exponentials, and of these times their exponents.
  struct Sums {
    float exp, x;
  };

  static Sums add_sums(const float* x, int n, float mean, int statistics, float* state) {
    switch (statistics & (kEntropy | kCollision | kMoments)) {
      case 0:
        return second_pass<false, false, false>(x, n, mean, state);
      case kEntropy:
        return second_pass<true, false, false>(x, n, mean, state);
      case kCollision:
        return second_pass<false, true, false>(x, n, mean, state);
      case kEntropy | kCollision:
        return second_pass<true, true, false>(x, n, mean, state);
      case kMoments:
        return second_pass<false, false, true>(x, n, mean, state);
      case kEntropy | kMoments:
        return second_pass<true, false, true>(x, n, mean, state);
      case kCollision | kMoments:
        return second_pass<false, true, true>(x, n, mean, state);
      default:
        return second_pass<true, true, true>(x, n, mean, state);
    }
  }

  struct First {
    float max = -kInfinity;
    float sum = 0;      // Moments
    int64_t above = 0;  // Rank
  };

  template <bool Moments, bool Rank>
  static First first_pass(const float* x, int n, float threshold) {
    F top = S::all(-kInfinity), sum{};
    I above{};
    const auto each = [&](F v) {
      top = S::max(v, top);
      if (Rank) above -= v > threshold;
    };
    int i = 0;
    for (; i + W <= n; i += W) {
      const F v = S::load(x + i);
      each(v);
      if (Moments) sum += v;
    }
    if (i < n) {
      each(S::load_part(x + i, n - i, -kInfinity));
      if (Moments) sum += S::load_part(x + i, n - i, 0);
    }
    return {S::max_of(top), Moments ? S::sum_of(sum) : 0.0f, Rank ? S::sum_of(above) : 0};
  }

  static void add_rank(const float* x, int n, int64_t above, int64_t first_id, const Results& out,
                       int64_t row, float* state) {
    const int64_t target = out.targets[row * out.sorted.k] - first_id;
    if (target >= 0 && target < n && x[target] > out.threshold[row]) --above;
    state[kRank] += static_cast<float>(above);
  }

  // Only a stretch that holds one of the two largest so far comes here. m is its largest.
  static void add_top(const float* x, int n, float m, int64_t first_id, float* state) {
    F rest = S::all(-kInfinity);
    I place{}, equal{};
    const auto each = [&](int i, F v) {
      const I is_top = v == m;
      equal -= is_top;
      place = is_top ? I{} + i : place;
      rest = S::max(is_top ? S::all(-kInfinity) : v, rest);
    };
    // From the end, so that the first of equals is what stays.
    const int whole = n / W * W;
    if (whole < n) each(whole, S::load_part(x + whole, n - whole, -kInfinity));
    for (int i = whole - W; i >= 0; i -= W) each(i, S::load(x + i));

    const float second = S::sum_of(equal) > 1 ? m : S::max_of(rest);
    if (m > state[kMax]) {
      state[kSecond] = state[kMax] > second ? state[kMax] : second;
      state[kArgmax] = static_cast<float>(first_id + S::first_set(equal, place));
    } else {
      state[kSecond] = m;  // at most MAX, whose id is the lower one
    }
  }

  static void raise_max(float m, int statistics, float* state) {
    const float before = state[kMax];
    state[kMax] = m;
    if (before == -kInfinity) return;  // the sums are 0, or NaN
    const float shift = before - m;
    const float weight = expf(shift);
    if (statistics & kEntropy)
      state[kSumExpX] = weight > 0 ? weight * (state[kSumExpX] + shift * state[kSumExp]) : 0.0f;
    if (statistics & kVarentropy) state[kSumExpDev2] *= weight;
    if (statistics & kCollision) state[kSumExp2] *= weight * weight;
    state[kSumExp] *= weight;
  }

  // Adds the sums over the stretch and returns them. `mean`: its mean, up to rounding.
  template <bool Entropy, bool Collision, bool Moments>
  static Sums second_pass(const float* x, int n, float mean, float* state) {
    // Where all is -inf so far, any finite number keeps the differences free of NaN.
    const float m = state[kMax] == -kInfinity ? 0.0f : state[kMax];
    F sum{}, sum_x{}, sum_2{}, off{}, squares{};
    const auto each = [&](F v) {
      F d = v - m;
      const F e = S::exp_of_nonpositive(d);
      sum += e;
      if (Entropy) sum_x += e * d;
      if (Collision) sum_2 += e * e;
    };
    const auto each_moment = [&](F v) {
      const F d = v - mean;
      off += d;
      squares += d * d;
    };
    int i = 0;
    for (; i + W <= n; i += W) {
      const F v = S::load(x + i);
      each(v);
      if (Moments) each_moment(v);
    }
    if (i < n) {
      each(S::load_part(x + i, n - i, -kInfinity));
      if (Moments) each_moment(S::load_part(x + i, n - i, mean));
    }
    const Sums here{S::sum_of(sum), Entropy ? S::sum_of(sum_x) : 0.0f};
    state[kSumExp] += here.exp;
    if (Entropy) state[kSumExpX] += here.x;
    if (Collision) state[kSumExp2] += S::sum_of(sum_2);
    if (Moments) add_moments(n, mean, S::sum_of(off), S::sum_of(squares), state);
    return here;
  }

  // The exponentials are taken once more, as the stretch's own mean is known only now. `before`:
  // the state's sums without the stretch, relative to its present maximum.
  static void add_deviations(const float* x, int n, Sums before, Sums here, float* state) {
    if (!(here.exp > 0)) return;  // all -inf, or NaN, which SUM_EXP tells
    const float m = state[kMax], mean = here.x / here.exp;
    F squares{};
    const auto each = [&](F v) {
      F d = v - m;
      const F e = S::exp_of_nonpositive(d);
      d -= mean;
      squares += e * d * d;
    };
    int i = 0;
    for (; i + W <= n; i += W) each(S::load(x + i));
    if (i < n) each(S::load_part(x + i, n - i, -kInfinity));
    float sum = S::sum_of(squares);
    if (before.exp > 0) {
      // Chan, Golub and LeVeque (1979), with weights.
      const float apart = mean - before.x / before.exp;
      sum += apart * apart * (before.exp * (here.exp / (before.exp + here.exp)));
    }
    state[kSumExpDev2] += sum;
  }

  // `off` is what rounding left out of `mean`. Chan, Golub and LeVeque (1979).
  static void add_moments(int n, float mean, float off, float squares, float* state) {
    const float before = state[kCount], count = before + n;
    const float apart = mean + off / n - state[kMean];
    state[kMean] += apart * (n / count);
    state[kM2] += squares - off * off / n + apart * apart * (before * (n / count));
    state[kCount] = count;
  }
};

// Copies the x of the row's targets among the n columns at x.
inline void pick_targets(const float* x, int n, int64_t first_id, const Results& out,
                         int64_t row) {
  const int64_t k = out.sorted.k;
  const int64_t* ids = out.sorted.ids + row * k;
  int64_t low = 0, high = k;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < first_id)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < k && ids[low] < first_id + n; ++low) {
    const int64_t slot = out.sorted.slots ? out.sorted.slots[row * k + low] : 0;
    out.target_logits[row * k + slot] = x[ids[low] - first_id];
  }
}

inline void clear_state(float* state) {
  for (int i = 0; i < kStateColumns; ++i) state[i] = 0;
  state[kMax] = state[kSecond] = -kInfinity;
  state[kArgmax] = -1;
}

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
