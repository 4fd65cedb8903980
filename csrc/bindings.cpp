// The operators' CPU kernels. vllm/score/ops/reference.py defines the operators.
#include "bindings.h"

#include <torch/csrc/stable/ops.h>

namespace vllm_score {
namespace {

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void reduce_logits(const Tensor& logits, Dtype dtype, const RowOut& out) {
  cpu::reduce_logits(logits.const_data_ptr(), dtype, logits.size(0), logits.size(1),
                     logits.stride(0), out, threads());
}

void require_served(const Product& p) {
  require(p.dtype != Dtype::f16, "on the CPU hidden must be float32 or bfloat16.");
}

void score_head(const Tensor&, const Product& p, const RowOut& out) {
  require_served(p);
  cpu::score_head(p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias, p.dtype, p.rows,
                  p.n, p.H, out, threads());
}

void target_logits(const Tensor&, const Product& p, const RowOut& out) {
  require_served(p);
  cpu::target_logits(p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias, p.dtype, p.rows,
                     p.n, p.H, out.targets, out.k, out.first_id, out.transform, out.target_logits,
                     threads());
}

}  // namespace

void cpu::run_parallel(int count, void (*body)(int, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i), context);
  });
}

STABLE_TORCH_LIBRARY_IMPL(vllm_score, CPU, library) {
  library.impl("reduce_logits", TORCH_BOX(&logits_operator<reduce_logits>));
  library.impl("score_head", TORCH_BOX(&head_operator<score_head>));
  library.impl("target_logits", TORCH_BOX(&head_operator<target_logits>));
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
