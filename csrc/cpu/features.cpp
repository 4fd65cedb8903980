#include "features.h"

#include <cstdint>

#if defined(__x86_64__)

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vllm_score {
namespace cpu {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers leaf(unsigned number, unsigned part = 0) {
  Registers r;
  if (!__get_cpuid_count(number, part, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool bit(unsigned value, int place) { return value >> place & 1; }

// The register files that the operating system saves (XCR0).
bool saves(uint64_t wanted) {
  if (!bit(leaf(1).c, 27)) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((static_cast<uint64_t>(high) << 32 | low) & wanted) == wanted;
}

constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_avx2() { return bit(leaf(7).b, 5) && bit(leaf(1).c, 12) && saves(kYmm); }

bool has_avx512() {
  const unsigned b = leaf(7).b;
  return has_avx2() && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && saves(kZmm);
}

bool has_avx512_bf16() { return has_avx512() && bit(leaf(7, 1).a, 5); }

bool gains_from_avx512_bf16() {
  constexpr unsigned kGenu = 0x756e6547;  // of "GenuineIntel"
  return has_avx512_bf16() && leaf(0).b != kGenu;
}

bool has_amx_bf16() {
  const unsigned d = leaf(7).d;
  return has_avx512() && bit(d, 22) && bit(d, 24) && saves(kTiles) && may_use_tiles();
}

}  // namespace cpu
}  // namespace vllm_score

#else

namespace vllm_score {
namespace cpu {
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool gains_from_avx512_bf16() { return false; }
bool has_amx_bf16() { return false; }
}  // namespace cpu
}  // namespace vllm_score

#endif
