// The operators' CUDA kernels. vllm/score/ops/reference.py defines the operators.
//
// The library refers to no symbol of a CUDA build of torch and carries the CUDA runtime within it,
// so it can be built beside a CPU torch and loaded where there is no driver.
#include "../bindings.h"

#include <dlfcn.h>

namespace vllm_score {
namespace {

// The current stream as torch knows it. libtorch_cuda is loaded by torch itself, if it is there.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(
                         dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  require(function != nullptr, "this build of torch has no CUDA.");
  void* stream = nullptr;
  require(function(device, &stream) == AOTI_TORCH_SUCCESS, "torch gives no current CUDA stream.");
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* what) {
  require(error == cudaSuccess, what, ": ", cudaGetErrorString(error), ".");
}

// The device of a tensor is current while this exists, for torch's copy of the CUDA runtime and
// for the one within this library.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_stream(index_)) {
    check(cudaSetDevice(index_), "cudaSetDevice");
  }
  cudaStream_t stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

void reduce_logits(const Tensor& logits, Dtype dtype, const RowOut& out) {
  const CurrentDevice device(logits);
  check(cuda::reduce_logits(logits.const_data_ptr(), dtype, logits.size(0), logits.size(1),
                            logits.stride(0), out, device.stream()),
        "reduce_logits");
}

Tensor scratch(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  require(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                   aoti_torch_device_type_cuda(), like.get_device_index(),
                                   &handle) == AOTI_TORCH_SUCCESS,
          "no memory for a workspace of ", bytes, " bytes.");
  return Tensor(handle);
}

void score_head(const Tensor& hidden, const Product& p, const RowOut& out) {
  const CurrentDevice device(hidden);
  cuda::HeadOperands operands{p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias,
                              p.dtype,  p.rows,          p.n,      p.H,             nullptr};
  const char* refusal = cuda::score_head_sm90_refusal(operands, out);
  require(refusal == nullptr, "the fused kernel cannot do this: ", refusal ? refusal : "", ".");
  std::optional<Tensor> workspace;
  if (const int64_t bytes = cuda::score_head_sm90_workspace(operands, out); bytes > 0) {
    workspace = scratch(hidden, bytes);
    operands.workspace = workspace->mutable_data_ptr();
  }
  check(cuda::score_head_sm90(operands, out, device.stream()), "score_head");
}

void target_logits(const Tensor& hidden, const Product& p, const RowOut& out) {
  if (out.k == 0) return;
  const CurrentDevice device(hidden);
  check(cuda::target_logits(p.hidden, p.hidden_stride, p.weight, p.weight_stride, p.bias, p.dtype,
                            p.rows, p.n, p.H, out.targets, out.k, out.first_id, out.transform,
                            out.target_logits, device.stream()),
        "target_logits");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_score, CUDA, library) {
  library.impl("reduce_logits", TORCH_BOX(&logits_operator<reduce_logits>));
  library.impl("score_head", TORCH_BOX(&head_operator<score_head>));
  library.impl("target_logits", TORCH_BOX(&head_operator<target_logits>));
}

}  // namespace vllm_score

// Called through ctypes.
extern "C" __attribute__((visibility("default"))) const char* vllm_score_cuda_targets() {
  return VLLM_SCORE_CUDA_TARGETS;
}
