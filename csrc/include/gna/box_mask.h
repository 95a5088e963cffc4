// Masks of boxes as bits, with what is the same for all tiles worked out beforehand.
//
// A word holds 32 tokens of a box in raster order. Along one axis a word covers the coordinates
// [first, first + width), each for 2^shift tokens in a row, and then perhaps the same ones again; so
// an interval of coordinates is an interval of bits, repeated by a multiplication.
#pragma once

#include <cstdint>

#include "gna/axis.h"
#include "gna/macros.h"

namespace gna {

constexpr uint32_t all_bits = 0xffffffffu;

// One axis of a box as the words see it.
struct AxisWords {
  int32_t width, shift;
  uint32_t repeat;
  int32_t log2_inner, log2_extent;
};

// log2_inner: log2 of the tokens of the axes inside this one.
GNA_HD constexpr AxisWords axis_words(int32_t log2_inner, int32_t log2_extent) {
  const int32_t shift = smaller(log2_inner, 5);
  const int32_t log2_width = smaller(log2_extent, 5 - shift);
  uint32_t repeat = 0;
  for (int32_t bit = 0; bit < 32; bit += 1 << (shift + log2_width)) repeat |= 1u << bit;
  return {1 << log2_width, shift, repeat, log2_inner, log2_extent};
}

// The first coordinate that word `word` covers.
GNA_HD constexpr int32_t first_of_word(const AxisWords& axis, int32_t word) {
  return (word * 32 >> axis.log2_inner) & ((1 << axis.log2_extent) - 1);
}

// 2^count, 0 <= count <= 32; 2^32 is 0.
GNA_HD uint32_t power_of_two(int32_t count) {
#if defined(__CUDA_ARCH__)
  // As the shift of the hardware, unlike that of C++, does it.
  uint32_t result = 0;
  asm("shl.b32 %0, 1, %1;" : "=r"(result) : "r"(count));
  return result;
#else
  return count >= 32 ? 0u : 1u << count;
#endif
}

// The tokens of a word whose coordinates lie in `range`, its ends relative to the word's first one.
GNA_HD uint32_t word_bits(const AxisWords& axis, Range range) {
  const int32_t begin = smaller(larger(range.begin, 0), axis.width) << axis.shift;
  const int32_t end = smaller(larger(range.end, 0), axis.width) << axis.shift;
  return (power_of_two(end) - power_of_two(begin)) * axis.repeat;
}

}  // namespace gna
