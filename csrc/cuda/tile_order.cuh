// The order in which the tiles of the product are worked on.
//
// Clusters take tiles i, i + clusters, i + 2 clusters, ... of one list, so those that run together
// share what they read through the L2 cache. The list goes through groups of row blocks whose
// hidden states stay in that cache; within a group it takes all row blocks of a column block, then
// the next column block, so that the weights are read from memory once a group. Where the size of
// a group divides the number of clusters, a cluster keeps its row block throughout the group.
#pragma once

#include <cstdint>

namespace vllm_score::cuda::sm90 {

struct TileOrder {
  static constexpr int kMostKinds = 4;
  int column_blocks;
  int clusters;
  unsigned tiles;
  int rows[kMostKinds];   // row blocks of a group of this kind
  int count[kMostKinds];  // groups of this kind, one after the other

  // Bytes of hidden states of a group: about half of the L2 cache.
  static constexpr int64_t kGroupBytes = 24 << 20;
  // In smaller groups the weights would be read from memory too often.
  static constexpr int kSmallest = 6;

  static TileOrder make(int row_blocks, int column_blocks, int64_t block_bytes, int clusters) {
    TileOrder order{};
    order.column_blocks = column_blocks;
    order.tiles = static_cast<unsigned>(row_blocks) * column_blocks;
    const bool few = order.tiles < static_cast<unsigned>(clusters);
    order.clusters = few ? static_cast<int>(order.tiles) : clusters;
    int most = static_cast<int>(kGroupBytes / block_bytes);
    if (most < 1) most = 1;
    int left = row_blocks;
    for (int kind = 0; kind < kMostKinds && left > 0; ++kind) {
      int size = most < left ? most : left;
      if (kind < kMostKinds - 1) {
        int divisor = size;
        while (order.clusters % divisor != 0) --divisor;
        if (divisor >= kSmallest) size = divisor;
      }
      order.rows[kind] = size;
      order.count[kind] = left / size;
      left %= size;
    }
    return order;
  }
};

// Steps through the tiles of one cluster.
struct TileCursor {
  const TileOrder& order;
  unsigned index, kind_end;
  unsigned inside;  // index within the kind
  int kind, kind_row;

  __device__ __forceinline__ TileCursor(const TileOrder& o, int cluster)
      : order(o), index(cluster), kind_end(0), inside(cluster), kind(-1), kind_row(0) {
    settle(0);
  }

  __device__ __forceinline__ bool done() const { return index >= order.tiles; }

  __device__ __forceinline__ void next() {
    index += order.clusters;
    inside += order.clusters;
    settle(kind_tiles());
  }

  __device__ __forceinline__ int row_block() const {
    return kind_row + group() * order.rows[kind] + static_cast<int>(rest() % order.rows[kind]);
  }
  __device__ __forceinline__ int column_block() const {
    return static_cast<int>(rest() / order.rows[kind]);
  }

 private:
  __device__ __forceinline__ unsigned group_tiles() const {
    return static_cast<unsigned>(order.rows[kind]) * order.column_blocks;
  }
  __device__ __forceinline__ unsigned kind_tiles() const {
    return group_tiles() * order.count[kind];
  }
  __device__ __forceinline__ int group() const { return static_cast<int>(inside / group_tiles()); }
  __device__ __forceinline__ unsigned rest() const {
    return inside % group_tiles();
  }
  __device__ __forceinline__ void settle(unsigned tiles_here) {
    while (!done() && index >= kind_end) {
      inside -= tiles_here;
      if (kind >= 0) kind_row += order.rows[kind] * order.count[kind];
      ++kind;
      tiles_here = kind_tiles();
      kind_end += tiles_here;
    }
  }
};

}  // namespace vllm_score::cuda::sm90
