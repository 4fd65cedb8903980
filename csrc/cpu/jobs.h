// What the kernels of one instruction set are asked to do, and the tables by which dispatch.cpp
// finds them.
#pragma once

#include <cstdint>

#include "../ops.h"

namespace vllm_score {
namespace cpu {

// Columns of the vocabulary that are multiplied and reduced together. 256 columns and 256 elements
// of H of float32 weights are 256 KiB: half of a usual L2 cache.
constexpr int kTileColumns = 256;

// The targets of a group of rows, in ascending order of ids within each row.
struct SortedTargets {
  int64_t k;
  const int64_t* ids;    // [rows, k]
  const int32_t* slots;  // [rows, k] places in `targets`; null: k is 1
};

// How results leave a task. Pointers are those of the first row of the group of rows.
struct Results {
  Transform transform;
  int statistics;
  int64_t first_id;        // id of column 0
  const float* threshold;  // or null
  const int64_t* targets;  // [rows, k]; the first of each row is the one that the rank is about
  SortedTargets sorted;
  float* target_logits;    // [rows, k]
  float* partial;          // [slices, rows, kStateColumns], written before it is read
  int64_t rows;
};

// The product of a group of rows with the head.
struct HeadJob {
  const unsigned char* hidden;  // first row of the group
  const unsigned char* weight;
  const unsigned char* bias;  // or null
  int64_t hidden_stride, weight_stride;  // bytes
  Dtype dtype;
  int64_t n, H;
  uint32_t* packed_hidden;  // HeadKernel::packed_words(rows, H) words
  Results results;
};

// One row and one column of the product that target_logits needs.
struct TargetPair {
  int64_t row, column, place;  // place: in `out`
};

// A block of the matrix of tasks.
struct Block {
  int64_t slice;
  int64_t first_row, last_row;
  int64_t first_column, last_column;
};

struct HeadKernel {
  int64_t (*packed_words)(int64_t rows, int64_t H);
  // Bytes that each thread needs for blocks of up to `rows` rows.
  int64_t (*scratch_bytes)(int64_t rows, int64_t H);
  void (*pack_hidden)(const HeadJob& job, int64_t first_row, int64_t last_row);
  void (*score)(const HeadJob& job, const Block& block, void* scratch);
  int64_t (*gather_scratch_bytes)(int64_t H);
  int pairs_at_once;
  void (*gather)(const HeadJob& job, const TargetPair* pairs, int count, float* out,
                 void* scratch);
};

struct LogitsJob {
  const unsigned char* logits;
  int64_t row_stride;  // bytes
  Dtype dtype;
  Results results;
};

using LogitsKernel = void (*)(const LogitsJob& job, const Block& block);

// Each kernel_*.cpp defines the tables of one instruction set. Null where the compiler cannot
// generate it.
extern const HeadKernel* const kPortableF32;
extern const HeadKernel* const kPortableBf16;
extern const LogitsKernel kPortableLogits;
extern const HeadKernel* const kAvx2F32;
extern const HeadKernel* const kAvx2Bf16;
extern const LogitsKernel kAvx2Logits;
extern const HeadKernel* const kAvx512F32;
extern const HeadKernel* const kAvx512Bf16Widened;
extern const LogitsKernel kAvx512Logits;
extern const HeadKernel* const kAvx512Bf16;
extern const HeadKernel* const kAmxBf16;

}  // namespace cpu
}  // namespace vllm_score
