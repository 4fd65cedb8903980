// Vectors of float32 of one width, and the elementary functions on them. Written with the vector
// extensions of GCC and Clang, so that one source serves every instruction set.
//
// Everything that kernel_*.cpp include lies in an unnamed namespace: each of these files is
// compiled for another instruction set, and the linker must never take one's copy for another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace vllm_score {
namespace cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Spelt out, because GCC loses the attribute where it depends on a template parameter.
template <int Bytes>
struct Vectors;

template <>
struct Vectors<16> {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint16_t Half __attribute__((vector_size(8)));
};

template <>
struct Vectors<32> {
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t Half __attribute__((vector_size(16)));
};

template <>
struct Vectors<64> {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));
};

template <int Bytes>
struct Simd {
  using F = typename Vectors<Bytes>::F;
  using I = typename Vectors<Bytes>::I;
  using U = typename Vectors<Bytes>::U;
  using Half = typename Vectors<Bytes>::Half;
  static constexpr int kWidth = Bytes / 4;

  static F load(const void* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, F v) { std::memcpy(p, &v, sizeof v); }
  // Minus zero, not plus: that changes no number, and compiles to nothing.
  static F all(float x) { return x - F{}; }

  // The first `count` floats at p, followed by `fill`.
  static F load_part(const float* p, int count, float fill) {
    float part[kWidth];
    for (int i = 0; i < kWidth; ++i) part[i] = i < count ? p[i] : fill;
    return load(part);
  }

  // NaN in x is passed over: it never becomes the maximum.
  static F max(F x, F m) { return x > m ? x : m; }

  static float max_of(F v) {
    float lane[kWidth];
    store(lane, v);
    float m = lane[0];
    for (int i = 1; i < kWidth; ++i) m = lane[i] > m ? lane[i] : m;
    return m;
  }

  static float sum_of(F v) {
    float lane[kWidth];
    store(lane, v);
    for (int step = kWidth / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
    return lane[0];
  }

  static int64_t sum_of(I v) {
    int32_t lane[kWidth];
    std::memcpy(lane, &v, sizeof v);
    int64_t total = 0;
    for (int i = 0; i < kWidth; ++i) total += lane[i];
    return total;
  }

  // The least place + lane among the lanes in which `set` is not 0; there is one.
  static int first_set(I set, I place) {
    int first = std::numeric_limits<int>::max();
    for (int i = 0; i < kWidth; ++i)
      if (set[i] && place[i] + i < first) first = place[i] + i;
    return first;
  }

  static F from_bf16(const uint16_t* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<F>(__builtin_convertvector(h, U) << 16);
  }

  static F from_f16(const uint16_t* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    const U bits = __builtin_convertvector(h, U);
    const U sign = (bits & 0x8000u) << 16;
    const U magnitude = (bits & 0x7fffu) << 13;
    // Read as a float32 the magnitude is 2^112 too small, subnormal numbers included.
    const F scaled = reinterpret_cast<F>(magnitude) * 0x1p112f;
    // The largest exponent means infinity or NaN in both formats.
    const U special = reinterpret_cast<U>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return reinterpret_cast<F>(reinterpret_cast<U>(scaled) | special | sign);
  }

  // exp(d) for d <= 0, relative error below 1.2e-7; 0 where the result would be subnormal. NaN
  // stays NaN. `d` itself becomes 0 where the result is 0, so that d * exp(d) is 0 also at -inf.
  //
  // exp(d) = 2^n exp(r), |r| <= ln(2)/2; exp(r) = 1 + r + r^2 q(r), q the polynomial of degree 4
  // with the least relative error (3e-9), fitted by the Lawson iteration.
  static F exp_of_nonpositive(F& d) {
    // Adding this rounds to an integer, and leaves the biased exponent of 2^n in the low bits.
    constexpr float kRound = 0x1.8p23f + 127.0f;
    const F shifted = d * 1.44269504f + kRound;
    const F n = shifted - kRound;
    // ln(2) in two parts; the first has 15 bits, so that its product with n is exact.
    F r = d - n * 0x1.62e4p-1f;
    r = r - n * 1.4286068e-06f;
    F q = r * 0.0013814538f + 0.008368745f;
    q = q * r + 0.04166839f;
    q = q * r + 0.16666521f;
    q = q * r + 0.49999994f;
    const F p = (q * r) * r + r + 1.0f;
    const F power = reinterpret_cast<F>(reinterpret_cast<U>(shifted) << 23);
    const I vanishes = d < -87.33f;
    d = vanishes ? F{} : d;
    return vanishes ? F{} : p * power;
  }

  // tanh(y): an odd polynomial below 0.625 (relative error 4e-9, fitted likewise), above that
  // (1 - t) / (1 + t) with t = exp(-2|y|).
  static F tanh(F y) {
    const F z = y * y;
    F q = z * -0.0057049785f + 0.020639079f;
    q = q * z - 0.05373971f;
    q = q * z + 0.13331442f;
    q = q * z - 0.3333328f;
    const F small = (q * z) * y + y;
    const U sign = reinterpret_cast<U>(y) & 0x80000000u;
    const F magnitude = reinterpret_cast<F>(reinterpret_cast<U>(y) ^ sign);
    F d = magnitude * -2.0f;
    const F t = exp_of_nonpositive(d);
    const F large = (1.0f - t) / (1.0f + t);
    const F signed_large = reinterpret_cast<F>(reinterpret_cast<U>(large) | sign);
    return magnitude < 0.625f ? small : signed_large;
  }
};

}  // namespace
}  // namespace cpu
}  // namespace vllm_score
