// A small program for compute-sanitizer: the reduction and the gathered dot products on awkward
// shapes, in allocations of exactly the size they need.
//
//   nvcc -std=c++17 -O2 -DVLLM_SCORE_CUDA -arch=sm_90 -Icsrc tests/ops/cuda_sanitizer.cu \
//        csrc/cuda/reduce.cu csrc/cuda/target_logits.cu -o sanitizer
//   compute-sanitizer --tool memcheck ./sanitizer && compute-sanitizer --tool racecheck ./sanitizer
#include <cuda_bf16.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ops.h"

using namespace vllm_score;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* to_device(const std::vector<T>& values) {
  T* out = nullptr;
  check(cudaMalloc(&out, values.size() * sizeof(T)));
  check(cudaMemcpy(out, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return out;
}

unsigned seed = 1;
float random_float() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(seed >> 8) / (1 << 24) * 8 - 4;
}

template <class T>
void run(Dtype dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t offset) {
  std::vector<T> logits(offset + (rows - 1) * row_stride + n);
  for (T& x : logits) x = T(random_float());
  std::vector<int64_t> targets(rows * 2);
  for (int64_t& id : targets) id = seed % n, random_float();
  std::vector<float> state(rows * kStateColumns, 0.0f), found(rows * 2), threshold(rows, 0.5f);
  T* x = to_device(logits);
  RowOut out{to_device(targets), 2, 0, to_device(threshold), {1.5f, 20.0f}, 63,
             to_device(state), to_device(found)};
  for (int statistics : {0, 21, 31, 53, 63}) {
    out.statistics = statistics;
    check(cuda::reduce_logits(x + offset, dtype, rows, n, row_stride, out, nullptr));
  }
  // The same memory as rows of hidden states and of the head, of n elements each.
  check(cuda::target_logits(x + offset, row_stride, x + offset, row_stride, nullptr, dtype, rows,
                            rows, n, out.targets, 2, 0, out.transform, out.target_logits, nullptr));
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(state.data(), out.state, state.size() * sizeof(float), cudaMemcpyDeviceToHost));
  double sum = 0;
  for (float s : state) sum += s;
  std::printf("%lld x %lld: %g\n", static_cast<long long>(rows), static_cast<long long>(n), sum);
  for (const void* p : {static_cast<const void*>(x), static_cast<const void*>(out.targets),
                        static_cast<const void*>(out.threshold),
                        static_cast<const void*>(out.state),
                        static_cast<const void*>(out.target_logits)})
    check(cudaFree(const_cast<void*>(p)));
}

}  // namespace

int main() {
  for (const int64_t n : {1, 5, 37, 1024, 1031, 4099, 20003}) {
    for (const int64_t offset : {0, 3}) {
      run<float>(Dtype::f32, 5, n, n + offset, offset);
      run<__nv_bfloat16>(Dtype::bf16, 5, n, n + offset, offset);
    }
  }
}
