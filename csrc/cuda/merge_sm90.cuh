// Second kernel of the fused product: adds up what the clusters left in the workspace, in their
// order, and merges it into the row state.
//
// Workspace: float32 [clusters, columns, row_stride], columns as in the row state (the first two,
// or all but the varentropy's), values raw and exponents base 2 as sm90_row_sums.cuh says; a maximum of NaN marks a row
// that the cluster never saw.
#pragma once

#include "sm90_row_sums.cuh"

namespace vllm_score::cuda::sm90 {

constexpr int kMergeRows = 32;
constexpr int kMergeParts = 8;

inline int workspace_columns(int statistics) { return statistics == 0 ? 2 : kWorkspaceColumns; }

inline int64_t workspace_bytes(int clusters, int64_t row_stride, int statistics) {
  return static_cast<int64_t>(clusters) * workspace_columns(statistics) * row_stride * 4;
}

// Take in what another set of columns had; ids of equal maxima: the lowest.
template <int kStatistics>
__device__ __forceinline__ void merge_sums(RowSums<kStatistics>& a, const RowSums<kStatistics>& b,
                                           float c) {
  using Sums = RowSums<kStatistics>;
  Sums other = b;
  const float max = fmaxf(a.max, b.max);
  a.raise(max, c);
  other.raise(max, c);
  a.exp += other.exp;
  if constexpr (Sums::kHasEntropy) a.exp_x += other.exp_x;
  if constexpr (Sums::kHasCollision) a.exp2 += other.exp2;
  if constexpr (Sums::kHasRank) a.rank += other.rank;
  if constexpr (Sums::kHasTop) {
    a.second = fmaxf(fminf(a.first, b.first), fmaxf(a.second, b.second));
    if (b.first > a.first ||
        (b.first == a.first && b.column >= 0.0f && (a.column < 0.0f || b.column < a.column))) {
      a.column = b.column;
    }
    a.first = fmaxf(a.first, b.first);
  }
  if constexpr (Sums::kHasMoments) merge_moments(a.count, a.mean, a.m2, b.count, b.mean, b.m2);
}

// Merge into the state, in nats and logits.
template <int kStatistics>
__device__ __forceinline__ void add_to_state(const RowSums<kStatistics>& sums, float* state,
                                             float c, float factor, int64_t first_id,
                                             int statistics) {
  constexpr float kLn2 = 0.6931471805599453f;
  const auto x_of = [&](float raw) { return raw == kMinusInfinity ? raw : raw * factor; };
  // The sums are relative to round(c * max): make them relative to c * max.
  const float excess = sums.max == kMinusInfinity || isinf(sums.max)
                           ? 0.0f
                           : fmaf(sums.max, c, -sums.reference);
  const float repair = power_of_two(-excess);
  const float sum = sums.exp * repair;
  const float max = x_of(sums.max);

  const float old_max = state[kMax];
  const float new_max = fmaxf(old_max, max);
  const float base = new_max == kMinusInfinity ? 0.0f : new_max;
  const float old_shift = fmaxf(old_max - base, kFarBelow), shift = fmaxf(max - base, kFarBelow);
  const float old_factor = expf(old_shift), new_factor = expf(shift);
  const float old_sum = state[kSumExp];
  state[kMax] = new_max;
  state[kSumExp] = old_sum * old_factor + sum * new_factor;
  if (statistics & kEntropy) {
    const float sum_x = kLn2 * repair * (sums.exp_x - excess * sums.exp);
    state[kSumExpX] = old_factor * (state[kSumExpX] + old_shift * old_sum) +
                      new_factor * (sum_x + shift * sum);
  }
  if (statistics & kCollision) {
    state[kSumExp2] = state[kSumExp2] * old_factor * old_factor +
                      sums.exp2 * repair * repair * new_factor * new_factor;
  }
  if (statistics & kTop) {
    state[kSecond] = fmaxf(fminf(old_max, max), fmaxf(state[kSecond], x_of(sums.second)));
    // Of equal logits the lowest id; a row of -inf only has its first column as its largest.
    const float id = static_cast<float>(first_id) + fmaxf(sums.column, 0.0f);
    const float old_id = state[kArgmax];
    if (old_id < 0.0f || max > old_max || (max == old_max && id < old_id)) state[kArgmax] = id;
  }
  if (statistics & kMoments) {
    float count = state[kCount], mean = state[kMean], m2 = state[kM2];
    merge_moments(count, mean, m2, sums.count, sums.mean * factor, sums.m2 * factor * factor);
    state[kCount] = count;
    state[kMean] = mean;
    state[kM2] = m2;
  }
  if (statistics & kRankOfTarget) state[kRank] += sums.rank;
}

// A block takes 32 rows; part p of it the clusters p, p + 8, ...
template <int kStatistics>
__global__ void __launch_bounds__(kMergeRows* kMergeParts)
    merge_kernel(const float* workspace, int clusters, int64_t row_stride, int64_t rows, float c,
                 float factor, int64_t first_id, int statistics, float* state) {
  __shared__ RowSums<kStatistics> parts[kMergeParts][kMergeRows];
  const int part = threadIdx.x / kMergeRows, column = threadIdx.x % kMergeRows;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeRows + column;
  constexpr int kColumns = kStatistics == 0 ? 2 : kWorkspaceColumns;
  RowSums<kStatistics> sums;
  sums.clear();
  if (row < rows) {
    for (int cluster = part; cluster < clusters; cluster += kMergeParts) {
      RowSums<kStatistics> one;
      one.clear();
      one.fetch(workspace + cluster * kColumns * row_stride + row, row_stride);
      one.settle(c, true);
      merge_sums(sums, one, c);
    }
  }
  parts[part][column] = sums;
  __syncthreads();
  if (part != 0 || row >= rows) return;
  for (int p = 1; p < kMergeParts; ++p) merge_sums(sums, parts[p][column], c);
  add_to_state(sums, state + row * kStateColumns, c, factor, first_id, statistics);
}

template <int kStatistics>
cudaError_t launch_merge(const float* workspace, int clusters, int64_t row_stride, int64_t rows,
                         float c, float factor, const RowOut& out, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((rows + kMergeRows - 1) / kMergeRows);
  merge_kernel<kStatistics><<<blocks, kMergeRows * kMergeParts, 0, stream>>>(
      workspace, clusters, row_stride, rows, c, factor, out.first_id, out.statistics, out.state);
  return cudaGetLastError();
}

}  // namespace vllm_score::cuda::sm90
