// The LM-head product and the reduction of its rows in one kernel, for compute capability 9.0.
//
// A pair of blocks (a cluster) takes 256 rows by 256 columns at a time, a block 128 rows of it. One
// warp feeds a ring of shared-memory stages through the copy engine, the weights of a stage sent
// to both blocks by one read; two groups of four warps multiply 64 rows each and keep float32
// accumulators in registers, from which they reduce the rows. The groups share the stages but wait
// for each other only through the ring, so that one reduces while the other keeps the tensor cores
// busy. Logits never leave the registers.
//
// Tiles are dealt to the clusters in a fixed order (tile_order.cuh). What a cluster summed of a row
// waits in the workspace while it works on other rows; a second kernel (merge_sm90.cuh) adds up the
// clusters' sums, in their order. So the same input gives the same bits on the same GPU.
#include <type_traits>

#include "merge_sm90.cuh"
#include "sm90_launch.cuh"
#include "sm90_tile_reducer.cuh"

namespace vllm_score::cuda {
namespace sm90 {

constexpr int kDepth = 64;  // of a stage: 128 bytes, the width of the swizzle
constexpr int kStages = 4;  // as many as fit
constexpr int kHiddenBytes = kTileRows * kDepth * 2;
constexpr int kWeightBytes = kTileColumns * kDepth * 2;
constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
constexpr int kHalfColumns = kTileColumns / 2;
constexpr int kSharedBytes = kStages * kStageBytes + 1024 + 2 * kStages * 8;
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kProductWarps = 8;

struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// One thread: copy the stages of all tiles of this cluster.
__device__ __forceinline__ void feed(const Arguments& a, const CUtensorMap* hidden,
                                     const CUtensorMap* weight, uint32_t stages, uint32_t full,
                                     uint32_t empty, int cluster, uint32_t rank) {
  Stage stage;
  for (TileCursor tile(a.order, cluster); !tile.done(); tile.next()) {
    const int row = (tile.row_block() * a.blocks + static_cast<int>(rank)) * kTileRows;
    const int column = tile.column_block() * kTileColumns;
    for (int step = 0; step < a.steps; ++step) {
      const uint32_t to = stages + stage.index * kStageBytes;
      const uint32_t to_weight = to + kHiddenBytes;
      const uint32_t ready = full + stage.index * 8;
      const int depth = step * kDepth;
      barrier_wait(empty + stage.index * 8, stage.parity ^ 1);
      barrier_expect(ready, kStageBytes);
      copy_box(to, hidden, ready, depth, row);
      if (a.blocks == 2) {
        const int half = static_cast<int>(rank) * kHalfColumns;
        copy_box_to(3, to_weight + half * kDepth * 2, weight, ready, depth, column + half);
      } else {
        copy_box(to_weight, weight, ready, depth, column);
        copy_box(to_weight + kHalfColumns * kDepth * 2, weight, ready, depth,
                 column + kHalfColumns);
      }
      stage.next();
    }
  }
}

template <class Element, int kStatistics, bool kTransform>
__global__ void __launch_bounds__(kThreads, 1)
    score_head_kernel(const __grid_constant__ CUtensorMap hidden,
                      const __grid_constant__ CUtensorMap weight,
                      const __grid_constant__ Arguments a) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  extern __shared__ char shared[];
  const uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t full = stages + kStages * kStageBytes;
  const uint32_t empty = full + kStages * 8;
  const uint32_t rank = a.blocks == 2 ? cluster_rank() : 0;
  const int cluster = blockIdx.x / a.blocks;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, kProductWarps * a.blocks);
    }
    barrier_init_fence();
    prefetch_map(&hidden);
    prefetch_map(&weight);
  }
  cluster_sync();

  const int group = threadIdx.x / kGroupThreads - 1;
  if (group < 0) {
    give_registers<40>();
    if (threadIdx.x == 0) feed(a, &hidden, &weight, stages, full, empty, cluster, rank);
  } else {
    take_registers<232>();
    const int lane = threadIdx.x % 32;
    // Lane r tells block r of the cluster that this warp is done with a stage.
    const uint32_t empty_at = peer_address(empty, lane < a.blocks ? lane : 0);
    const auto release = [&](int stage) {
      if (lane < a.blocks) barrier_arrive_peer(empty_at + stage * 8);
    };
    Reducer<Element, kStatistics, kTransform> reducer(a, group);
    float d[kAccumulators];
    Stage stage;
    for (TileCursor tile(a.order, cluster); !tile.done(); tile.next()) {
      const int row_block = tile.row_block(), column_block = tile.column_block();
      if (row_block != reducer.row_block) {
        reducer.leave(cluster);
        reducer.enter(cluster, row_block, rank);
      }
      int previous = 0;
      for (int step = 0; step < a.steps; ++step) {
        barrier_wait(full + stage.index * 8, stage.parity);
        const uint32_t at = stages + stage.index * kStageBytes;
        const uint64_t left = matrix_descriptor(at + group * 64 * kDepth * 2);
        const uint64_t right = matrix_descriptor(at + kHiddenBytes);
        product_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          product<kHalf>(d, left + 2 * k, right + 2 * k, step + k > 0);
        }
        product_commit();
        if (step > 0) {
          product_wait<1>();
          release(previous);
        }
        previous = stage.index;
        stage.next();
      }
      product_wait<0>();
      release(previous);
      reducer.reduce(d, column_block);
    }
    reducer.leave(cluster);
  }
  // No block may leave while the other can still write to its shared memory.
  cluster_sync();
}

// ---- the host's side ----------------------------------------------------------------------------

struct Plan {
  Arguments arguments;
  bool transform;
  int statistics;  // of the instance: none, the usual ones, or all
};

constexpr int kUsual = kEntropy | kTop | kRankOfTarget;
constexpr int kAll = kUsual | kCollision | kMoments;

int instance_of(int statistics) {
  if (statistics == 0) return 0;
  return (statistics & ~kUsual) == 0 ? kUsual : kAll;
}

Plan make_plan(const HeadOperands& p, const RowOut& out) {
  Plan plan{};
  Arguments& a = plan.arguments;
  a.rows = p.rows;
  a.row_stride = (p.rows + 31) / 32 * 32;
  a.columns = static_cast<int>(p.n);
  a.steps = static_cast<int>((p.H + kDepth - 1) / kDepth);
  // Pairs read the weights once for both; a single block is slower even where it saves the pair's
  // other half, unless there are no rows for that.
  a.blocks = p.rows > kTileRows ? 2 : 1;
  const Transform& t = out.transform;
  const float factor = t.scale;
  plan.transform = p.bias != nullptr || t.soft_cap > 0.0f || !(factor > 1e-6f && factor < 1e6f);
  plan.statistics = instance_of(out.statistics);
  a.factor = plan.transform ? 1.0f : factor;
  a.c = a.factor * 1.4426950408889634f;
  a.transform = t;
  a.bias = p.bias;
  a.targets = out.k == 0 ? nullptr : out.targets;
  a.targets_stride = out.k;
  a.first_id = out.first_id;
  a.threshold = out.threshold;
  a.target_logits = out.k == 1 ? out.target_logits : nullptr;
  a.workspace = static_cast<float*>(p.workspace);
  const int64_t block_rows = a.blocks * kTileRows;
  const int row_blocks = static_cast<int>((p.rows + block_rows - 1) / block_rows);
  const int column_blocks = (a.columns + kTileColumns - 1) / kTileColumns;
  const int64_t block_bytes = block_rows * p.H * 2;
  a.order = TileOrder::make(row_blocks, column_blocks, block_bytes,
                            resident_clusters(score_head_kernel<__nv_bfloat16, 0, false>, a.blocks,
                                              kThreads, kSharedBytes));
  return plan;
}

template <class Element, int kStatistics, bool kTransform>
cudaError_t launch(const HeadOperands& p, const Arguments& a, cudaStream_t stream) {
  const auto kernel = score_head_kernel<Element, kStatistics, kTransform>;
  CUtensorMap hidden, weight;
  if (cudaError_t e = make_map(&hidden, p.hidden, p.dtype, p.rows, p.H, p.hidden_stride,
                               kDepth, kTileRows); e != cudaSuccess) return e;
  if (cudaError_t e = make_map(&weight, p.weight, p.dtype, p.n, p.H, p.weight_stride,
                               kDepth, kHalfColumns); e != cudaSuccess) return e;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           kSharedBytes); e != cudaSuccess) return e;
  return launch_clusters(kernel, a.order.clusters, a.blocks, kThreads, kSharedBytes, stream, hidden,
                         weight, a);
}

template <class Element>
cudaError_t launch_instance(const HeadOperands& p, const Plan& plan, cudaStream_t stream) {
  const Arguments& a = plan.arguments;
  if (plan.transform) {
    return plan.statistics == 0 ? launch<Element, 0, true>(p, a, stream)
                                : launch<Element, kAll, true>(p, a, stream);
  }
  switch (plan.statistics) {
    case 0: return launch<Element, 0, false>(p, a, stream);
    case kUsual: return launch<Element, kUsual, false>(p, a, stream);
    default: return launch<Element, kAll, false>(p, a, stream);
  }
}

cudaError_t launch_merge_of(const Plan& plan, const RowOut& out, cudaStream_t stream) {
  const Arguments& a = plan.arguments;
  // It does not matter that the instance for all reads columns that were not written.
  const auto merge = plan.statistics == 0 ? launch_merge<0> : launch_merge<kAll>;
  return merge(a.workspace, a.order.clusters, a.row_stride, a.rows, a.c, a.factor, out, stream);
}

}  // namespace sm90

const char* score_head_sm90_refusal(const HeadOperands& p, const RowOut& out) {
  return sm90::refusal(p, out);
}

int64_t score_head_sm90_workspace(const HeadOperands& p, const RowOut& out) {
  const sm90::Plan plan = sm90::make_plan(p, out);
  return sm90::workspace_bytes(plan.arguments.order.clusters, plan.arguments.row_stride,
                               plan.statistics);
}

cudaError_t score_head_sm90(const HeadOperands& p, const RowOut& out, cudaStream_t stream) {
  if (p.rows == 0 || p.n == 0) return cudaSuccess;
  const sm90::Plan plan = sm90::make_plan(p, out);
  const sm90::Arguments& a = plan.arguments;
  const int64_t bytes = sm90::workspace_bytes(a.order.clusters, a.row_stride, plan.statistics);
  // Every byte 0xff is NaN: nothing stored yet.
  if (cudaError_t e = cudaMemsetAsync(p.workspace, 0xff, bytes, stream); e != cudaSuccess) return e;
  const cudaError_t error = p.dtype == Dtype::f16
                                ? sm90::launch_instance<__half>(p, plan, stream)
                                : sm90::launch_instance<__nv_bfloat16>(p, plan, stream);
  if (error != cudaSuccess) return error;
  if (cudaError_t e = sm90::launch_merge_of(plan, out, stream); e != cudaSuccess) return e;
  if (out.k <= 1) return cudaSuccess;
  return target_logits(p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias, p.dtype,
                       p.rows, p.n, p.H, out.targets, out.k, out.first_id, out.transform,
                       out.target_logits, stream);
}

}  // namespace vllm_score::cuda
