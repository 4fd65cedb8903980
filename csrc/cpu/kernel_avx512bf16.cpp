// AVX-512 BF16: pairs of bfloat16 are multiplied and added up in float32 by one instruction.
#include "jobs.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)

#include "head_task.h"
#include "pair_product.h"

namespace vllm_score {
namespace cpu {
namespace {

constexpr HeadKernel kBf16 = HeadTask<DotProduct<14, 2>>::table();

}  // namespace

const HeadKernel* const kAvx512Bf16 = &kBf16;

}  // namespace cpu
}  // namespace vllm_score

#else

namespace vllm_score {
namespace cpu {
const HeadKernel* const kAvx512Bf16 = nullptr;
}  // namespace cpu
}  // namespace vllm_score

#endif
