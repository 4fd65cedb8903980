// A small program for compute-sanitizer: the fused product of compute capability 9.0 on awkward
// shapes, in allocations of exactly the size they need, each result compared with a plain loop.
//
//   nvcc -std=c++20 -O2 -DVLLM_SCORE_CUDA -gencode=arch=compute_90a,code=sm_90a -Icsrc \
//        tests/ops/cuda_sanitizer_fused.cu csrc/cuda/score_head_sm90.cu \
//        csrc/cuda/target_logits.cu -o sanitizer
//   compute-sanitizer --tool memcheck ./sanitizer && compute-sanitizer --tool racecheck ./sanitizer
#include <cuda_bf16.h>

#include <cmath>
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
  return static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
}

std::vector<__nv_bfloat16> random_matrix(int64_t size) {
  std::vector<__nv_bfloat16> values(size);
  for (auto& x : values) x = __float2bfloat16(random_float());
  return values;
}

// The largest |log sum exp - float64's|.
double run(int64_t rows, int64_t n, int64_t H, int64_t stride, int statistics, int64_t k,
           bool with_bias) {
  const auto hidden = random_matrix((rows - 1) * stride + H);
  const auto weight = random_matrix((n - 1) * stride + H);
  const auto bias = random_matrix(n);
  std::vector<int64_t> targets(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) targets[i] = (i * 37) % (n + 3);  // some beyond
  std::vector<float> state(rows * kStateColumns, 0.0f), found(rows * k, -INFINITY);
  for (int64_t r = 0; r < rows; ++r) {
    state[r * kStateColumns + kMax] = state[r * kStateColumns + kSecond] = -INFINITY;
    state[r * kStateColumns + kArgmax] = -1;
  }
  RowOut out{to_device(targets), k, 0, to_device(std::vector<float>(rows, 0.5f)),
             {1.0f, with_bias ? 20.0f : 0.0f}, statistics, to_device(state),
             to_device(found)};
  cuda::HeadOperands p{to_device(hidden), stride, to_device(weight), stride,
                       with_bias ? to_device(bias) : nullptr, Dtype::bf16, rows, n, H, nullptr};
  if (const char* reason = cuda::score_head_sm90_refusal(p, out)) {
    std::printf("refused: %s\n", reason);
    std::exit(1);
  }
  check(cudaMalloc(&p.workspace, cuda::score_head_sm90_workspace(p, out)));
  check(cuda::score_head_sm90(p, out, nullptr));
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(state.data(), out.state, state.size() * sizeof(float), cudaMemcpyDeviceToHost));
  double worst = 0;
  for (int64_t r = 0; r < rows; r += 1 + rows / 5) {
    double sum = 0;
    for (int64_t v = 0; v < n; ++v) {
      double z = with_bias ? static_cast<double>(__bfloat162float(bias[v])) : 0.0;
      for (int64_t i = 0; i < H; ++i) {
        z += static_cast<double>(__bfloat162float(hidden[r * stride + i])) *
             __bfloat162float(weight[v * stride + i]);
      }
      sum += std::exp(with_bias ? 20 * std::tanh(z / 20) : z);
    }
    const float* s = &state[r * kStateColumns];
    worst = std::fmax(worst, std::fabs(s[kMax] + std::log(s[kSumExp]) - std::log(sum)));
  }
  return worst;
}

}  // namespace

int main() {
  const int64_t shapes[][4] = {{1, 1, 8, 8}, {3, 5, 20, 24}, {70, 257, 72, 72}, {129, 300, 40, 48},
                               {257, 515, 328, 328}, {130, 70000, 16, 16}};
  for (const auto& [rows, n, H, stride] : shapes) {
    for (int statistics : {0, 21, 31}) {
      for (int with_bias : {0, 1}) {
        const double error = run(rows, n, H, stride, statistics, with_bias ? 3 : 1, with_bias);
        std::printf("%lld x %lld x %lld, statistics %d, bias %d: off by %.1e\n",
                    static_cast<long long>(rows), static_cast<long long>(n),
                    static_cast<long long>(H), statistics, with_bias, error);
        if (!(error < 1e-4)) return 1;
      }
    }
  }
  return 0;
}
