// Vectors of the instruction set this file is compiled for, in GCC's and Clang's vector extensions.
//
// Everything in the kernel files lives in namespace gna::GNA_ISA and calls nothing inline from the
// standard library: the linker would otherwise be free to keep one instruction set's copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gna::GNA_ISA {

#if defined(__AVX512F__)
constexpr int width = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * width)));
typedef int32_t Ints __attribute__((vector_size(4 * width)));
typedef uint32_t Words __attribute__((vector_size(4 * width)));
typedef uint16_t Halves __attribute__((vector_size(2 * width)));

#define GNA_INLINE inline __attribute__((always_inline))

template <class V>
GNA_INLINE V load(const void* from) {
  V value;
  memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
GNA_INLINE void store(void* to, V value) {
  memcpy(to, &value, sizeof(V));
}

template <class To, class From>
GNA_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

GNA_INLINE Vec splat(float value) { return value - Vec{}; }
GNA_INLINE Words splat(uint32_t value) { return value - Words{}; }

// `a` unless it is smaller or NaN.
GNA_INLINE Vec highest(Vec a, Vec b) { return a > b ? a : b; }

// `value` in the lanes whose bit is set, `other` elsewhere.
GNA_INLINE Vec select(uint32_t bits, Vec value, Vec other) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(other, static_cast<__mmask16>(bits), value);
#else
  Words lane{};
  for (int i = 0; i < width; ++i) lane[i] = 1u << i;
  return (splat(bits) & lane) != 0 ? value : other;
#endif
}

// 2^x, relative error below 2e-7; 0 below -126.5, +inf from 128 on, NaN for NaN.
//
// x = n + f with n the nearest integer: 2^n by its exponent bits, 2^f by a polynomial (own minimax
// fit in relative error on [-1/2, 1/2], exactly 1 at 0).
GNA_INLINE Vec exp2(Vec x) {
  const float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  x = x < -127.f ? splat(-127.f) : x;
  x = x > 128.f ? splat(128.f) : x;
  const Vec shifted = x + round;
  const Vec f = x - (shifted - round);
  Vec power = splat(0x1.5bba14p-10f);
  power = power * f + 0x1.3cea88p-7f;
  power = power * f + 0x1.c6b752p-5f;
  power = power * f + 0x1.ebf9bcp-3f;
  power = power * f + 0x1.62e42ap-1f;
  power = power * f + 1.f;
  const Words exponent = (bits_of<Words>(shifted) + 127u) << 23;
  return power * bits_of<Vec>(exponent);
}

// Element types, converted exactly to fp32 and rounded to nearest even from it.

struct Fp32 {
  using Element = float;
  static GNA_INLINE Vec load(const Element* from) { return GNA_ISA::load<Vec>(from); }
  static GNA_INLINE void store(Element* to, Vec value) { GNA_ISA::store(to, value); }
};

#if defined(__AVX512F__)
// GCC 12 makes several instructions of each conversion.
GNA_INLINE Words widen(Halves halves) {
  return bits_of<Words>(_mm512_cvtepu16_epi32(bits_of<__m256i>(halves)));
}
GNA_INLINE Halves narrow(Words words) {
  return bits_of<Halves>(_mm512_cvtepi32_epi16(bits_of<__m512i>(words)));
}
#else
GNA_INLINE Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }
GNA_INLINE Halves narrow(Words words) { return __builtin_convertvector(words, Halves); }
#endif

struct Bf16 {
  using Element = uint16_t;
  static GNA_INLINE Vec load(const Element* from) {
    return bits_of<Vec>(widen(GNA_ISA::load<Halves>(from)) << 16);
  }
  static GNA_INLINE void store(Element* to, Vec value) {
    const Words bits = bits_of<Words>(value);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words result = (bits & 0x7fffffffu) > 0x7f800000u ? splat(0x7fc0u) : rounded;
    GNA_ISA::store(to, narrow(result));
  }
};

struct Fp16 {
  using Element = uint16_t;
  static GNA_INLINE Vec load(const Element* from) {
    const Words bits = widen(GNA_ISA::load<Halves>(from));
    // The bits read as a float are 2^-112 times the value, subnormals included.
    const Vec finite = bits_of<Vec>((bits & 0x7fffu) << 13) * 0x1p112f;
    const Words infinite = (bits & 0x7c00u) == 0x7c00u ? splat(0x7f800000u) : Words{};
    return bits_of<Vec>(bits_of<Words>(finite) | infinite | ((bits & 0x8000u) << 16));
  }
  static GNA_INLINE void store(Element* to, Vec value) {
    const Words bits = bits_of<Words>(value);
    const Words size = bits & 0x7fffffffu;
    const Words normal = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
    // The spacing of floats from 1/2 on is the smallest fp16.
    const Words small = bits_of<Words>(bits_of<Vec>(size) + 0.5f) - 0x3f000000u;
    Words result = size < 0x38800000u ? small : normal;
    result = size >= 0x477ff000u ? splat(0x7c00u) : result;
    result = size > 0x7f800000u ? splat(0x7e00u) : result;
    GNA_ISA::store(to, narrow(result | ((bits >> 16) & 0x8000u)));
  }
};

}  // namespace gna::GNA_ISA
