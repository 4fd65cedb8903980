// The entry points of the kernels: plain pointers, free of torch types, so that each kernel can be
// written and tested alone. bindings.cpp checks shapes, dtypes and devices before it calls them.
//
// The numerical contract (what every column holds, and how a call adds to it) is described in
// vllm/score/ops/row_state.py; the constants here must agree with the ones there.
#pragma once

#include <cstdint>

#ifdef VLLM_SCORE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace vllm_score {

enum class Dtype { f32, bf16, f16 };

// Columns of the row state, float32 [R, kStateColumns].
enum StateColumn : int {
  kMax = 0,
  kSumExp = 1,
  kSumExpX = 2,
  kSumExp2 = 3,
  kSecond = 4,
  kArgmax = 5,
  kMean = 6,
  kM2 = 7,
  kCount = 8,
  kRank = 9,
  kSumExpDev2 = 10,
};
constexpr int kStateColumns = 11;

// Bits of `statistics`: which columns beside kMax and kSumExp are computed.
enum Statistic : int {
  kEntropy = 1,    // kSumExpX
  kCollision = 2,  // kSumExp2
  kTop = 4,        // kSecond, kArgmax
  kMoments = 8,    // kMean, kM2, kCount
  kRankOfTarget = 16,
  kVarentropy = 32,  // kSumExpDev2; only beside kEntropy
};

// x = scale * cap(z) with cap(z) = soft_cap * tanh(z / soft_cap) if soft_cap > 0, else z; all in
// float32. The temperature is part of the scale.
struct Transform {
  float scale;
  float soft_cap;
};

// What a call computes and where it adds it.
struct RowOut {
  const int64_t* targets;  // [R, k] contiguous; null if k == 0
  int64_t k;
  int64_t first_id;        // id of column 0 of this tile or shard
  const float* threshold;  // [R]; null unless statistics has kRankOfTarget
  Transform transform;
  int statistics;
  float* state;          // [R, kStateColumns] contiguous, merged in place
  float* target_logits;  // [R, k] contiguous; only ids in first_id .. first_id + n - 1 are written
};

namespace cpu {

// Calls body(i, context) once for each i in 0 .. count - 1, on the threads that torch's own
// operators use, and returns when all are done. Threads of our own would compete for the cores
// with torch's, which keep spinning for a while after each operator. Defined in bindings.cpp; a
// program that tests a kernel alone brings its own.
void run_parallel(int count, void (*body)(int index, void* context), void* context);

template <class Body>
void parallel(int count, const Body& body) {
  run_parallel(
      count, [](int index, void* context) { (*static_cast<const Body*>(context))(index); },
      const_cast<Body*>(&body));
}

// logits [rows, n], row i at logits + i * row_stride elements.
void reduce_logits(const void* logits, Dtype dtype, int64_t rows, int64_t n, int64_t row_stride,
                   const RowOut& out, int threads);

// hidden [rows, H], weight [n, H], bias [n] or null, all of one dtype; strides in elements.
void score_head(const void* hidden, int64_t hidden_stride, const void* weight,
                int64_t weight_stride, const void* bias, Dtype dtype, int64_t rows, int64_t n,
                int64_t H, const RowOut& out, int threads);

// out [rows, k]: x of the targets with ids in first_id .. first_id + n - 1; others untouched.
void target_logits(const void* hidden, int64_t hidden_stride, const void* weight,
                   int64_t weight_stride, const void* bias, Dtype dtype, int64_t rows, int64_t n,
                   int64_t H, const int64_t* targets, int64_t k, int64_t first_id,
                   const Transform& transform, float* out, int threads);

// The path chosen at run time: "amx_bf16", "avx512_bf16", "avx512", "avx2" or "portable".
const char* isa();
// For tests: use this path from now on. False, and nothing changes, when this CPU cannot.
bool set_isa(const char* name);

}  // namespace cpu

#ifdef VLLM_SCORE_CUDA
namespace cuda {

// Each returns the error of its launches (cudaSuccess if none); none synchronises. The caller has
// made the tensors' device current.
cudaError_t reduce_logits(const void* logits, Dtype dtype, int64_t rows, int64_t n,
                          int64_t row_stride, const RowOut& out, cudaStream_t stream);

// bias may be null. bf16 and f16.
cudaError_t target_logits(const void* hidden, int64_t hidden_stride, const void* weight,
                          int64_t weight_stride, const void* bias, Dtype dtype, int64_t rows,
                          int64_t n, int64_t H, const int64_t* targets, int64_t k,
                          int64_t first_id, const Transform& transform, float* out,
                          cudaStream_t stream);

// The operands of the fused kernel. `workspace` is what score_head_sm90_workspace asks for, of
// which nothing is expected and nothing kept.
struct HeadOperands {
  const void* hidden;
  int64_t hidden_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;  // or null
  Dtype dtype;
  int64_t rows;
  int64_t n;
  int64_t H;
  void* workspace;
};

// Whether the fused kernel can do this on the current device: compute capability 9.0, 16-bit
// dtype, 16-byte aligned rows (base pointers and strides). Null if so, else the reason in words
// (a string literal).
const char* score_head_sm90_refusal(const HeadOperands& operands, const RowOut& out);
// Bytes of scratch memory the call below needs.
int64_t score_head_sm90_workspace(const HeadOperands& operands, const RowOut& out);
cudaError_t score_head_sm90(const HeadOperands& operands, const RowOut& out, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace vllm_score
