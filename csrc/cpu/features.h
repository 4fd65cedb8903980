// What this processor and its operating system can run.
#pragma once

namespace vllm_score {
namespace cpu {

bool has_avx2();         // with FMA
bool has_avx512();       // F, BW, DQ, VL
bool has_avx512_bf16();
// Whether that is a gain. On Sapphire Rapids its two products an instruction ran at less than half
// the rate of a float32 multiply-add.
bool gains_from_avx512_bf16();
bool has_amx_bf16();     // asks the kernel for the tile registers; all threads may use them then

}  // namespace cpu
}  // namespace vllm_score
