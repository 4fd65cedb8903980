// The schemas of the operators and their CPU implementation. The CUDA library adds its own.
#include "bindings.h"

#include <torch/csrc/stable/ops.h>

namespace vllm_score {
namespace {

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void reduce_logits(const Tensor& logits, const Tensor& targets, int64_t first_id,
                   std::optional<Tensor> threshold, double scale, double soft_cap,
                   double temperature, int64_t statistics, Tensor state, Tensor target_logits) {
  require_matrix(logits, "logits");
  const Dtype dtype = dtype_of(logits, "logits");
  const RowOut out = checked_out(logits, targets, first_id, threshold,
                                 checked_transform(scale, soft_cap, temperature), statistics,
                                 state, target_logits);
  if (logits.numel() == 0) return;
  cpu::reduce_logits(logits.const_data_ptr(), dtype, logits.size(0), logits.size(1),
                     logits.stride(0), out, threads());
}

Product cpu_product(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Product product = checked_product(hidden, weight, bias);
  require(product.dtype != Dtype::f16, "on the CPU hidden must be float32 or bfloat16.");
  return product;
}

void score_head(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                const Tensor& targets, int64_t first_id, std::optional<Tensor> threshold,
                double scale, double soft_cap, double temperature, int64_t statistics,
                Tensor state, Tensor target_logits) {
  const Product p = cpu_product(hidden, weight, bias);
  const RowOut out = checked_out(hidden, targets, first_id, threshold,
                                 checked_transform(scale, soft_cap, temperature), statistics,
                                 state, target_logits);
  if (p.rows == 0 || p.n == 0) return;
  cpu::score_head(p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias, p.dtype, p.rows,
                  p.n, p.H, out, threads());
}

void target_logits(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                   const Tensor& targets, int64_t first_id, double scale, double soft_cap,
                   double temperature, Tensor out) {
  const Product p = cpu_product(hidden, weight, bias);
  require_target_logits(hidden, targets, first_id, out);
  if (targets.numel() == 0) return;
  cpu::target_logits(p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias, p.dtype, p.rows,
                     p.n, p.H, static_cast<const int64_t*>(targets.const_data_ptr()),
                     targets.size(1), first_id, checked_transform(scale, soft_cap, temperature),
                     static_cast<float*>(out.mutable_data_ptr()), threads());
}

}  // namespace

void cpu::run_parallel(int count, void (*body)(int, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i), context);
  });
}

STABLE_TORCH_LIBRARY(vllm_score, library) {
  library.def(
      "reduce_logits(Tensor logits, Tensor targets, int first_id, Tensor? threshold, "
      "float scale, float soft_cap, float temperature, int statistics, Tensor(a!) state, "
      "Tensor(b!) target_logits) -> ()");
  library.def(
      "score_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int first_id, "
      "Tensor? threshold, float scale, float soft_cap, float temperature, int statistics, "
      "Tensor(a!) state, Tensor(b!) target_logits) -> ()");
  library.def(
      "target_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int first_id, "
      "float scale, float soft_cap, float temperature, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_score, CPU, library) {
  library.impl("reduce_logits", TORCH_BOX(&reduce_logits));
  library.impl("score_head", TORCH_BOX(&score_head));
  library.impl("target_logits", TORCH_BOX(&target_logits));
}

}  // namespace vllm_score

// Called through ctypes: strings do not pass through operators.
extern "C" {
__attribute__((visibility("default"))) const char* vllm_score_cpu_isa() {
  return vllm_score::cpu::isa();
}
__attribute__((visibility("default"))) bool vllm_score_set_cpu_isa(const char* name) {
  return vllm_score::cpu::set_isa(name);
}
}
