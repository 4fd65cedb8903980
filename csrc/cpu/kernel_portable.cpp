// Any processor: vectors of 16 bytes, which every 64-bit instruction set has.
#include "fma_product.h"
#include "head_task.h"
#include "logits_task.h"

namespace vllm_score {
namespace cpu {
namespace {

struct Portable {
  using S = Simd<16>;
  typedef uint32_t Eight __attribute__((vector_size(32)));

  template <class Each>
  static void transpose(const unsigned char* const* rows, const Each& each) {
    uint32_t words[8][8];
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) std::memcpy(&words[j][i], rows[i] + 4 * j, 4);
    for (int j = 0; j < 8; ++j) {
      Eight v;
      std::memcpy(&v, words[j], sizeof v);
      each(j, v);
    }
  }
};

template <Dtype dtype>
using Task = HeadTask<FmaProduct<Portable, dtype, 4, 2>>;

constexpr HeadKernel kF32 = Task<Dtype::f32>::table();
constexpr HeadKernel kBf16 = Task<Dtype::bf16>::table();

}  // namespace

const HeadKernel* const kPortableF32 = &kF32;
const HeadKernel* const kPortableBf16 = &kBf16;
const LogitsKernel kPortableLogits = LogitsTask<Simd<16>>::reduce;

}  // namespace cpu
}  // namespace vllm_score
