// AVX2 with FMA: 6 rows by 16 columns in 12 of the 16 registers.
#include "jobs.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "fma_product.h"
#include "head_task.h"
#include "logits_task.h"
#include "transpose_avx2.h"

namespace vllm_score {
namespace cpu {
namespace {

template <Dtype dtype>
using Task = HeadTask<FmaProduct<Avx2Transposition<Simd<32>>, dtype, 6, 2>>;

constexpr HeadKernel kF32 = Task<Dtype::f32>::table();
constexpr HeadKernel kBf16 = Task<Dtype::bf16>::table();

}  // namespace

const HeadKernel* const kAvx2F32 = &kF32;
const HeadKernel* const kAvx2Bf16 = &kBf16;
const LogitsKernel kAvx2Logits = LogitsTask<Simd<32>>::reduce;

}  // namespace cpu
}  // namespace vllm_score

#else

namespace vllm_score {
namespace cpu {
const HeadKernel* const kAvx2F32 = nullptr;
const HeadKernel* const kAvx2Bf16 = nullptr;
const LogitsKernel kAvx2Logits = nullptr;
}  // namespace cpu
}  // namespace vllm_score

#endif
