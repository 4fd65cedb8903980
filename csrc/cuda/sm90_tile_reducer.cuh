// What a group of four warps of the fused kernel does with its accumulators once the product of a
// tile is there: logits, targets, and the running sums of its rows.
#pragma once

#include "elements.cuh"
#include "sm90_row_sums.cuh"
#include "tile_order.cuh"

namespace vllm_score::cuda::sm90 {

constexpr int kTileRows = 128;      // of a block
constexpr int kGroupThreads = 128;  // they take 64 rows

struct Arguments {
  TileOrder order;
  int64_t rows;
  int64_t row_stride;  // of the workspace: rows of a column
  int columns;         // n
  int steps;           // stages of a tile
  int blocks;          // of a cluster, 1 or 2
  float c;             // exponent of a raw value, base 2
  float factor;        // x of a raw value
  Transform transform;
  const void* bias;
  const int64_t* targets;  // the first of each row, or null
  int64_t targets_stride;
  int64_t first_id;
  const float* threshold;
  float* target_logits;
  float* workspace;
};

// Raw products to logits, in place.
template <class Element>
__device__ __forceinline__ void transform_tile(float (&d)[kAccumulators], const Arguments& a,
                                               int first_column) {
  const auto* bias = static_cast<const Element*>(a.bias);
#pragma unroll
  for (int j = 0; j < kWordsPerRow; ++j) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int column = first_column + 8 * j + b;
      const float added = bias != nullptr && column < a.columns ? to_float(bias[column]) : 0.0f;
      d[4 * j + b] = transformed(d[4 * j + b] + added, a.transform);
      d[4 * j + 2 + b] = transformed(d[4 * j + 2 + b] + added, a.transform);
    }
  }
}

// The element of row kRow in a column of this thread's. Selected in assembly: from a chain of
// comparisons the compiler would make an indexed access, and put the accumulators into memory.
template <int kRow>
__device__ __forceinline__ float element(const float (&d)[kAccumulators], int column) {
  float found = 0.0f;
  const int pair = column / 8 * 2 + column % 2;
#pragma unroll
  for (int i = 0; i < kAccumulators / 2; ++i) {
    asm("{\n.reg .pred here;\nsetp.eq.s32 here, %1, %2;\nselp.f32 %0, %3, %0, here;\n}\n"
        : "+f"(found)
        : "r"(pair), "r"(i), "f"(d[4 * (i / 2) + 2 * kRow + i % 2]));
  }
  return found;
}

template <class Element, int kStatistics, bool kTransform>
struct Reducer {
  const Arguments& a;
  int lane, row_in_tile;
  int64_t row[2];
  int target[2];  // column, or -1
  float threshold[2];
  RowSums<kStatistics> sums[2];
  int64_t target_id[2];
  int row_block = -1;
  bool entered = false;

  __device__ __forceinline__ Reducer(const Arguments& arguments, int group)
      : a(arguments),
        lane(threadIdx.x % 32),
        row_in_tile(64 * group + 16 * (threadIdx.x % kGroupThreads / 32) + lane / 4) {}

  __device__ __forceinline__ float* slot(int cluster, int64_t r) const {
    constexpr int64_t kColumns = kStatistics == 0 ? 2 : kWorkspaceColumns;
    return a.workspace + cluster * kColumns * a.row_stride + r;
  }

  __device__ __forceinline__ void leave(int cluster) {
    if (row_block < 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[h].merge_quad(a.c);
      if (lane % 4 == 0 && row[h] < a.rows) {
        sums[h].store(slot(cluster, row[h]), a.row_stride);
      }
    }
    __syncwarp();
  }

  // What it reads is looked at only after the product of the tile, when it has long arrived.
  __device__ __forceinline__ void enter(int cluster, int new_block, uint32_t rank) {
    row_block = new_block;
    entered = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t block = static_cast<int64_t>(new_block) * a.blocks + rank;
      row[h] = block * kTileRows + row_in_tile + 8 * h;
      target_id[h] = -1;
      threshold[h] = 0.0f;
      sums[h].clear();
      if (row[h] >= a.rows) continue;
      sums[h].fetch(slot(cluster, row[h]), a.row_stride);
      if (a.targets != nullptr) target_id[h] = a.targets[row[h] * a.targets_stride];
      if constexpr (RowSums<kStatistics>::kHasRank) {
        if (a.threshold != nullptr) threshold[h] = a.threshold[row[h]];
      }
    }
  }

  template <int kRow>
  __device__ __forceinline__ void take_target(const float (&d)[kAccumulators], int start) {
    const int column = target[kRow] - start;
    const bool mine = target[kRow] >= 0 && column >= 0 && column < kTileColumns &&
                      column % 8 / 2 == lane % 4;
    if (!__any_sync(kWholeWarp, mine)) return;
    const float raw = element<kRow>(d, column);
    if (!mine) return;
    if (a.target_logits != nullptr) a.target_logits[row[kRow]] = raw * a.factor;
    if constexpr (RowSums<kStatistics>::kHasRank) {
      if (raw > threshold[kRow]) sums[kRow].rank -= 1.0f;
    }
  }

  __device__ __forceinline__ void reduce(float (&d)[kAccumulators], int column_block) {
    if (entered) {
      entered = false;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[h].settle(a.c, lane % 4 == 0);
        if constexpr (RowSums<kStatistics>::kHasRank) {
          threshold[h] = raw_threshold(threshold[h], a.factor);
        }
        const int64_t id = target_id[h] - a.first_id;
        target[h] = target_id[h] >= 0 && id >= 0 && id < a.columns ? static_cast<int>(id) : -1;
      }
    }
    const int start = column_block * kTileColumns;
    const int lane_column = 2 * (lane % 4);
    const int valid = min(a.columns - start, kTileColumns);
    if constexpr (kTransform) transform_tile<Element>(d, a, start + lane_column);
    if (valid < kTileColumns) {
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) {
        if (lane_column + 8 * (i / 4) + i % 2 >= valid) d[i] = kMinusInfinity;
      }
    }
    sums[0].template add<0>(d, a.c, threshold[0], start, lane_column, valid);
    sums[1].template add<1>(d, a.c, threshold[1], start, lane_column, valid);
    take_target<0>(d, start);
    take_target<1>(d, start);
  }
};

}  // namespace vllm_score::cuda::sm90
