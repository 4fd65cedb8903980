// What both devices' operators check before any pointer reaches a kernel. Torch's stable ABI only,
// and of that what torch 2.11 has, so that one build serves 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace vllm_score {

// kernels.py looks for this in the file before it is loaded. Change both whenever the arguments of
// the operators change.
__attribute__((used)) inline const char kStamp[] = "vllm_score operators 2";

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, int64_t part) { text += std::to_string(part); }
inline void append(std::string& text, int part) { text += std::to_string(part); }
inline void append(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  text += digits;
}

inline void append(std::string& text, const Tensor& part) {  // its shape
  text += '[';
  for (int64_t i = 0; i < part.dim(); ++i) {
    if (i) text += ", ";
    append(text, part.size(i));
  }
  text += ']';
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text = "vllm_score: ";
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

// The parts of the message are looked at only if the condition does not hold.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      require(false, name, " must be float32, bfloat16 or float16.");
      return Dtype::f32;
  }
}

inline void require_same_device(const Tensor& tensor, const char* name, const Tensor& first) {
  require(tensor.is_cpu() == first.is_cpu() && tensor.is_cuda() == first.is_cuda() &&
              tensor.get_device_index() == first.get_device_index(),
          name, " is on another device than the first argument.");
}

// A matrix whose rows are contiguous; the rows themselves may be any distance apart.
inline void require_matrix(const Tensor& tensor, const char* name) {
  require(tensor.dim() == 2, name, " must have two dimensions, not the shape ", tensor,
          ".");
  require(tensor.size(1) <= 1 || tensor.stride(1) == 1, name,
          " must have contiguous rows (inner stride 1, not ", tensor.stride(1), ").");
}

inline void require_contiguous(const Tensor& tensor, const char* name, ScalarType dtype,
                               const char* dtype_name, const Tensor& first) {
  require(tensor.scalar_type() == dtype, name, " must be ", dtype_name, ".");
  require(tensor.is_contiguous(), name, " must be contiguous.");
  require_same_device(tensor, name, first);
}

inline void require_rows(const Tensor& tensor, const char* name, int64_t rows) {
  require(tensor.dim() == 2 && tensor.size(0) == rows, name, " must be [", rows,
          ", k] as the first argument has ", rows, " rows, not ", tensor, ".");
}

inline RowOut checked_out(const Tensor& first, const Tensor& targets, int64_t first_id,
                          const std::optional<Tensor>& threshold, double scale, double soft_cap,
                          int64_t statistics, const Tensor& state, const Tensor& target_logits) {
  const int64_t rows = first.size(0);
  require(statistics >= 0 && statistics < 64, "statistics must be a mask of 0..63, not ",
          statistics, ".");
  require(!(statistics & kVarentropy) || (statistics & kEntropy),
          "the varentropy needs the entropy's bit as well.");
  require(first_id >= 0, "first_id must be at least 0, not ", first_id, ".");
  require_contiguous(targets, "targets", ScalarType::Long, "int64", first);
  require_rows(targets, "targets", rows);
  require_contiguous(state, "state", ScalarType::Float, "float32", first);
  require(state.dim() == 2 && state.size(0) == rows && state.size(1) == kStateColumns,
          "state must be [", rows, ", ", kStateColumns, "], not ", state, ".");
  require_contiguous(target_logits, "target_logits", ScalarType::Float, "float32", first);
  require(target_logits.dim() == 2 && target_logits.size(0) == rows &&
              target_logits.size(1) == targets.size(1),
          "target_logits must have the shape of targets, ", targets, ", not ",
          target_logits, ".");
  const float* thresholds = nullptr;
  if (statistics & kRankOfTarget) {
    require(threshold.has_value(), "the rank needs a threshold a row.");
    require_contiguous(*threshold, "threshold", ScalarType::Float, "float32", first);
    require(threshold->dim() == 1 && threshold->size(0) == rows, "threshold must be [", rows,
            "], not ", *threshold, ".");
    require(targets.size(1) > 0, "the rank needs at least one target a row.");
    thresholds = static_cast<const float*>(threshold->const_data_ptr());
  }
  return {static_cast<const int64_t*>(targets.const_data_ptr()),
          targets.size(1),
          first_id,
          thresholds,
          {static_cast<float>(scale), static_cast<float>(soft_cap)},
          static_cast<int>(statistics),
          static_cast<float*>(state.mutable_data_ptr()),
          static_cast<float*>(target_logits.mutable_data_ptr())};
}

// The operands of hidden @ weight.T + bias, checked.
struct Product {
  const void* hidden;
  int64_t hidden_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;
  Dtype dtype;
  int64_t rows, n, H;
};

inline Product checked_product(const Tensor& hidden, const Tensor& weight,
                               const std::optional<Tensor>& bias) {
  require_matrix(hidden, "hidden");
  require_matrix(weight, "weight");
  require(hidden.size(1) == weight.size(1), "hidden ", hidden, " and weight ",
          weight, " must have rows of one length.");
  require(hidden.size(1) > 0, "hidden must have at least one column.");
  const Dtype dtype = dtype_of(hidden, "hidden");
  require(dtype == dtype_of(weight, "weight"), "hidden and weight must be of one dtype.");
  require_same_device(weight, "weight", hidden);
  const void* bias_data = nullptr;
  if (bias.has_value()) {
    require_contiguous(*bias, "bias", hidden.scalar_type(), "of the dtype of hidden", hidden);
    require(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [", weight.size(0),
            "], not ", *bias, ".");
    bias_data = bias->const_data_ptr();
  }
  return {hidden.const_data_ptr(), hidden.stride(0), weight.const_data_ptr(), weight.stride(0),
          bias_data, dtype, hidden.size(0), weight.size(0), hidden.size(1)};
}

// The operators as torch calls them: the arguments are those of the schemas in
// vllm/score/ops/reference.py. `body` is a device's implementation, called with what was checked.
template <void (*body)(const Tensor& logits, Dtype dtype, const RowOut& out)>
void logits_operator(const Tensor& logits, const Tensor& targets, int64_t first_id,
                     std::optional<Tensor> threshold, double scale, double soft_cap,
                     int64_t statistics, Tensor state, Tensor target_logits) {
  require_matrix(logits, "logits");
  const Dtype dtype = dtype_of(logits, "logits");
  const RowOut out = checked_out(logits, targets, first_id, threshold, scale, soft_cap, statistics,
                                 state, target_logits);
  if (logits.numel() > 0) body(logits, dtype, out);
}

template <void (*body)(const Tensor& hidden, const Product& product, const RowOut& out)>
void head_operator(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                   const Tensor& targets, int64_t first_id, std::optional<Tensor> threshold,
                   double scale, double soft_cap, int64_t statistics, Tensor state,
                   Tensor target_logits) {
  const Product product = checked_product(hidden, weight, bias);
  const RowOut out = checked_out(hidden, targets, first_id, threshold, scale, soft_cap, statistics,
                                 state, target_logits);
  if (product.rows > 0 && product.n > 0) body(hidden, product, out);
}

}  // namespace vllm_score
