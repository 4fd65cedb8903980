// Packing of the head: from rows of the weight, contiguous along H, to panels [words, columns].
#pragma once

#include "simd.h"

namespace vllm_score {
namespace cpu {
namespace {

// Instructions::transpose(const unsigned char* const rows[8], Each each) reads 32 bytes at each of
// the eight rows, and calls each(i, words) for i in 0..7 with word i of all rows, as
// Instructions::Eight.
//
// Widens: a word of the source is a pair of bfloat16, and becomes two words of the panel.
template <class Instructions, int Columns, bool Widens>
struct Packing {
  using Eight = typename Instructions::Eight;
  static constexpr int kStepBytes = 32;
  static_assert(Columns % 8 == 0);

  // Writes ceil(bytes / source bytes of a word) rounded up to a multiple of 8 (Widens: 16) words
  // of each column; those beyond the source are zero. The panel has room for them. What lies
  // `ahead` bytes further is prefetched.
  static void run(const unsigned char* const* columns, int64_t bytes, int64_t ahead,
                  uint32_t* panel) {
    int64_t at = 0;
    for (; at + kStepBytes <= bytes; at += kStepBytes, panel += words_per_step() * Columns)
      for (int group = 0; group < Columns; group += 8) {
        const unsigned char* rows[8];
        for (int i = 0; i < 8; ++i) {
          rows[i] = columns[group + i] + at;
          if (at % 64 == 0) __builtin_prefetch(rows[i] + ahead, 0, 2);
        }
        step(rows, panel + group);
      }
    if (at == bytes) return;
    for (int group = 0; group < Columns; group += 8) {
      alignas(32) unsigned char rest[8][kStepBytes] = {};
      const unsigned char* rows[8];
      for (int i = 0; i < 8; ++i) {
        std::memcpy(rest[i], columns[group + i] + at, bytes - at);
        rows[i] = rest[i];
      }
      step(rows, panel + group);
    }
  }

 private:
  static constexpr int words_per_step() { return Widens ? 16 : 8; }

  static void step(const unsigned char* const* rows, uint32_t* panel) {
    Instructions::transpose(rows, [&](int word, const Eight& v) {
      if (Widens) {
        store(panel + 2 * word * Columns, v << 16);
        store(panel + (2 * word + 1) * Columns, v & 0xffff0000u);
      } else {
        store(panel + word * Columns, v);
      }
    });
  }

  static void store(uint32_t* place, const Eight& v) { std::memcpy(place, &v, sizeof v); }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
