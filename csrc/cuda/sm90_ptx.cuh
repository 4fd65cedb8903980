// The instructions of compute capability 9.0 that CUDA C++ has no words for: transaction barriers,
// tensor copies into shared memory, and the matrix product of a warpgroup.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vllm_score::cuda::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of every block of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- transaction barriers -----------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other block of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// The address of the same shared variable in block `rank` of the cluster.
__device__ __forceinline__ uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  return peer;
}

// Orders no memory accesses of the program across the blocks: what it reports, products that no
// longer read a stage, is over when the product has been waited for.
__device__ __forceinline__ void barrier_arrive_peer(uint32_t peer_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier)
               : "memory");
}

// ---- the copy engine ----------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// A box of the map, its first element at (inner, outer); what lies outside the tensor is zero.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(inner), "r"(outer)
      : "memory");
}

// The same, to the same place in each block of `blocks`, whose own barrier it completes.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* map,
                                            uint32_t barrier, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "h"(blocks), "r"(inner), "r"(outer)
      : "memory");
}

// ---- the product of a warpgroup -----------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Rows of 128 bytes, 16-byte pieces permuted within groups of 8 rows (1024 bytes) as the copy
// engine's 128-byte swizzle does; the groups follow each other.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kGroupStride = static_cast<uint64_t>(1024 >> 4) << 32;
  constexpr uint64_t kUnused = 1ull << 16;
  return kSwizzle128 | kGroupStride | kUnused | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

constexpr int kAccumulators = 128;  // floats a thread of a 64 x 256 product

#define VS_OUT8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define VS_PRODUCT(TYPE)                                                                   \
  asm volatile(                                                                            \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                    \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                             \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                   \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                   \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"                   \
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                   \
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                   \
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"       \
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"  \
      " %128, %129, add, 1, 1, 0, 0;\n}\n"                                                 \
      : VS_OUT8(0), VS_OUT8(8), VS_OUT8(16), VS_OUT8(24), VS_OUT8(32), VS_OUT8(40),        \
        VS_OUT8(48), VS_OUT8(56), VS_OUT8(64), VS_OUT8(72), VS_OUT8(80), VS_OUT8(88),      \
        VS_OUT8(96), VS_OUT8(104), VS_OUT8(112), VS_OUT8(120)                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// d (+)= A . B^T with A 64 x 16 and B 256 x 16, 16-bit, in shared memory. Thread t of the
// warpgroup holds of row 16 (t / 32) + (t % 32) / 4 the columns 8 j + 2 (t % 4) + {0, 1} in
// d[4 j + {0, 1}], and of the row 8 below in d[4 j + {2, 3}].
template <bool kHalf>
__device__ __forceinline__ void product(float (&d)[kAccumulators], uint64_t a, uint64_t b,
                                        bool add) {
  if constexpr (kHalf) {
    VS_PRODUCT("f16");
  } else {
    VS_PRODUCT("bf16");
  }
}

#undef VS_PRODUCT
#undef VS_OUT8

}  // namespace vllm_score::cuda::sm90
