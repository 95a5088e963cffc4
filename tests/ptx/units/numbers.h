// Number formats, the roundings of cvt, and approximate functions (PTX ISA, "cvt" and "ex2").
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gna::ptx {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What instructions make of any NaN.
constexpr uint32_t canonical_nan = 0x7fffffff;
constexpr uint16_t canonical_nan_16 = 0x7fff;

enum class Element { fp16, bf16 };

inline float bf16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline float fp16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0)
    return float_of(sign | bits_of(std::ldexp(static_cast<float>(mantissa), -24)));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline float to_float(Element type, uint16_t bits) {
  return type == Element::bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// cvt.rn.bf16.f32: to nearest, ties to even.
inline uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return canonical_nan_16;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// cvt.rn.f16.f32: to nearest, ties to even; subnormal results are kept.
inline uint16_t float_to_fp16(float x) {
  if (std::isnan(x)) return canonical_nan_16;
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // 65520 and more round to infinity.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude >= 0x38800000u) {
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
  }
  // Subnormal: in units of 2^-24, which nearbyint rounds to even.
  return static_cast<uint16_t>(
      sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(float_of(magnitude), 24))));
}

inline uint16_t from_float(Element type, float x) {
  return type == Element::bf16 ? float_to_bf16(x) : float_to_fp16(x);
}

// cvt.rn.{bf16x2,f16x2}.f32 d, a, b: the first source goes to the upper half.
inline uint32_t pack(Element type, float high, float low) {
  return static_cast<uint32_t>(from_float(type, high)) << 16 | from_float(type, low);
}

// .ftz: subnormal numbers become zeros of their sign.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// ex2.approx{.ftz}.f32, but rounded correctly: the hardware is at most 2 ulp away (PTX ISA, "ex2").
inline float exp2_approximate(float x, bool flush) {
  if (std::isnan(x)) return float_of(canonical_nan);
  const float y = static_cast<float>(std::exp2(static_cast<double>(flush ? flushed(x) : x)));
  return flush ? flushed(y) : y;
}

}  // namespace gna::ptx
