// The choice among the instruction sets.
#pragma once

#include "jobs.h"

namespace vllm_score {
namespace cpu {

struct Path {
  const char* name;
  const HeadKernel* f32;
  const HeadKernel* bf16;
  LogitsKernel logits;
};

// The one that calls run on: the best this processor has, unless set_isa chose another.
const Path& current_path();

}  // namespace cpu
}  // namespace vllm_score
