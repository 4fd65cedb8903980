// The logits of single tokens: a dot product of one row of hidden states and one of the head.
#include "elements.cuh"

namespace vllm_score::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // a block; a warp computes one dot product

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWarp* kWarps)
    dot_products(const T* __restrict__ hidden, int64_t hidden_stride,
                 const T* __restrict__ weight, int64_t weight_stride, const T* __restrict__ bias,
                 int64_t rows, int64_t n, int64_t H, const int64_t* __restrict__ targets,
                 int64_t k, int64_t first_id, Transform transform, float* __restrict__ out) {
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (index >= rows * k) return;
  const int64_t column = targets[index] - first_id;
  if (column < 0 || column >= n) return;
  const T* a = hidden + index / k * hidden_stride;
  const T* b = weight + column * weight_stride;
  float sum = 0.0f;
  int64_t done = 0;
  if constexpr (kAligned) {
    constexpr int V = kVector<T>;
    done = H / V * V;
    for (int64_t i = lane * V; i < done; i += kWarp * V) {
      float x[V], y[V];
      unpack(load_16_bytes(a + i), x, static_cast<const T*>(nullptr));
      unpack(load_16_bytes(b + i), y, static_cast<const T*>(nullptr));
#pragma unroll
      for (int j = 0; j < V; ++j) sum = fmaf(x[j], y[j], sum);
    }
  }
  for (int64_t i = done + lane; i < H; i += kWarp) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (lane == 0) {
    if (bias) sum += to_float(bias[column]);
    out[index] = transformed(sum, transform);
  }
}

template <class T>
cudaError_t launch(const void* hidden, int64_t hidden_stride, const void* weight,
                   int64_t weight_stride, const void* bias, int64_t rows, int64_t n, int64_t H,
                   const int64_t* targets, int64_t k, int64_t first_id,
                   const Transform& transform, float* out, cudaStream_t stream) {
  const auto aligned = [](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  };
  const int64_t blocks = (rows * k + kWarps - 1) / kWarps;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const bool vectors = aligned(hidden, hidden_stride) && aligned(weight, weight_stride);
  const auto kernel = vectors ? &dot_products<T, true> : &dot_products<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kWarp * kWarps, 0, stream>>>(
      static_cast<const T*>(hidden), hidden_stride, static_cast<const T*>(weight), weight_stride,
      static_cast<const T*>(bias), rows, n, H, targets, k, first_id, transform, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t target_logits(const void* hidden, int64_t hidden_stride, const void* weight,
                          int64_t weight_stride, const void* bias, Dtype dtype, int64_t rows,
                          int64_t n, int64_t H, const int64_t* targets, int64_t k,
                          int64_t first_id, const Transform& transform, float* out,
                          cudaStream_t stream) {
  if (rows <= 0 || k <= 0) return cudaSuccess;
  const auto call = [&](auto function) {
    return function(hidden, hidden_stride, weight, weight_stride, bias, rows, n, H, targets, k,
                    first_id, transform, out, stream);
  };
  switch (dtype) {
    case Dtype::f32:
      return call(launch<float>);
    case Dtype::bf16:
      return call(launch<__nv_bfloat16>);
    case Dtype::f16:
      return call(launch<__half>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_score::cuda
