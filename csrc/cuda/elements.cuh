// Reading 16 bytes of float32, bfloat16 or float16 as float32, and the transform of a logit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../ops.h"

namespace vllm_score::cuda {

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of one 16-byte access

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Read once: not kept in L1. (What the L2 does with it is left alone: a tile that the next
// product overwrites should stay there.)
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// A load that the compiler does not move down to where its result is used.
__device__ __forceinline__ float load_now(const float* address) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(address));
  return x;
}

__device__ __forceinline__ void unpack(const uint4& v, float* x, const float*) {
  x[0] = __uint_as_float(v.x);
  x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z);
  x[3] = __uint_as_float(v.w);
}

__device__ __forceinline__ void unpack(const uint4& v, float* x, const __nv_bfloat16*) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const uint4& v, float* x, const __half*) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// The operations of torch on a GPU (which divides by a number by multiplying with its inverse), so
// that a logit equals the same logit transformed there.
__device__ __forceinline__ float transformed(float z, const Transform& t) {
  if (t.soft_cap > 0.0f) z = tanhf(z * (1.0f / t.soft_cap)) * t.soft_cap;
  if (t.scale != 1.0f) z *= t.scale;
  return z;
}

}  // namespace vllm_score::cuda
