// AVX-512 (F, BW, DQ, VL): 14 rows by 32 columns in 28 of the 32 registers.
#include "jobs.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "fma_product.h"
#include "head_task.h"
#include "logits_task.h"
#include "transpose_avx2.h"

namespace vllm_score {
namespace cpu {
namespace {

template <Dtype dtype>
using Task = HeadTask<FmaProduct<Avx2Transposition<Simd<64>>, dtype, 14, 2>>;

constexpr HeadKernel kF32 = Task<Dtype::f32>::table();
constexpr HeadKernel kBf16 = Task<Dtype::bf16>::table();

}  // namespace

const HeadKernel* const kAvx512F32 = &kF32;
const HeadKernel* const kAvx512Bf16Widened = &kBf16;
const LogitsKernel kAvx512Logits = LogitsTask<Simd<64>>::reduce;

}  // namespace cpu
}  // namespace vllm_score

#else

namespace vllm_score {
namespace cpu {
const HeadKernel* const kAvx512F32 = nullptr;
const HeadKernel* const kAvx512Bf16Widened = nullptr;
const LogitsKernel kAvx512Logits = nullptr;
}  // namespace cpu
}  // namespace vllm_score

#endif
