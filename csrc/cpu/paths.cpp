#include "paths.h"

#include <atomic>
#include <cstring>

#include "features.h"

namespace vllm_score {
namespace cpu {
namespace {

constexpr int kPathCount = 5;

// Best first. float32 operands are never rounded to bfloat16: its instructions do not serve them.
const Path* paths() {
  static const Path all[kPathCount] = {
      {"amx_bf16", kAvx512F32, kAmxBf16, kAvx512Logits},
      {"avx512_bf16", kAvx512F32, kAvx512Bf16, kAvx512Logits},
      {"avx512", kAvx512F32, kAvx512Bf16Widened, kAvx512Logits},
      {"avx2", kAvx2F32, kAvx2Bf16, kAvx2Logits},
      {"portable", kPortableF32, kPortableBf16, kPortableLogits},
  };
  return all;
}

using Test = bool (*)();

bool passes(const Test (&tests)[kPathCount], int index) {
  const Path& path = paths()[index];
  return path.f32 && path.bf16 && path.logits && tests[index]();
}

bool always() { return true; }

constexpr Test kRuns[] = {has_amx_bf16, has_avx512_bf16, has_avx512, has_avx2, always};
constexpr Test kIsBest[] = {has_amx_bf16, gains_from_avx512_bf16, has_avx512, has_avx2, always};

std::atomic<const Path*>& current() {
  static std::atomic<const Path*> path{[] {
    int index = 0;
    while (!passes(kIsBest, index)) ++index;
    return &paths()[index];
  }()};
  return path;
}

}  // namespace

const Path& current_path() { return *current().load(std::memory_order_relaxed); }

const char* isa() { return current_path().name; }

bool set_isa(const char* name) {
  for (int i = 0; i < kPathCount; ++i)
    if (std::strcmp(paths()[i].name, name) == 0 && passes(kRuns, i)) {
      current().store(&paths()[i], std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace cpu
}  // namespace vllm_score
