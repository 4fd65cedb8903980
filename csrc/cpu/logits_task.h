// The reduction of logits that lie in memory.
#pragma once

#include "jobs.h"
#include "row_reduction.h"
#include "simd.h"

namespace vllm_score {
namespace cpu {
namespace {

template <class S>
struct LogitsTask {
  using Reduction = RowReduction<S>;
  // Logits that are read several times while they are in the L1 cache.
  static constexpr int kStretch = 512;

  static void widen(const unsigned char* from, int n, Dtype dtype, float* to) {
    if (dtype == Dtype::f32) {
      std::memcpy(to, from, n * sizeof(float));
      return;
    }
    const auto each = [&](const uint16_t* p) {
      return dtype == Dtype::bf16 ? S::from_bf16(p) : S::from_f16(p);
    };
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    int i = 0;
    for (; i + S::kWidth <= n; i += S::kWidth) S::store(to + i, each(half + i));
    if (i < n) {
      uint16_t rest[S::kWidth] = {};
      std::memcpy(rest, half + i, (n - i) * sizeof(uint16_t));
      S::store(to + i, each(rest));
    }
  }

  static void reduce(const LogitsJob& job, const Block& block) {
    const Results& out = job.results;
    const int bytes = job.dtype == Dtype::f32 ? 4 : 2;
    alignas(64) float x[kStretch];
    for (int64_t row = block.first_row; row < block.last_row; ++row) {
      float* state = out.partial + (block.slice * out.rows + row) * kStateColumns;
      clear_state(state);
      for (int64_t first = block.first_column; first < block.last_column; first += kStretch) {
        const int64_t left = block.last_column - first;
        const int n = static_cast<int>(left < kStretch ? left : kStretch);
        widen(job.logits + row * job.row_stride + first * bytes, n, job.dtype, x);
        Reduction::transform(x, n, nullptr, out.transform);
        Reduction::add(x, n, out.first_id + first, out, row, state);
        if (out.sorted.k > 0) pick_targets(x, n, out.first_id + first, out, row);
      }
    }
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
