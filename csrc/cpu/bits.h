// Masks of boxes as bits: 32 tokens of a box a word, the words of its axes combined by AND.
//
// A box has extents that are powers of two; token t of it has the coordinate
// (t >> log2_inner) & (extent - 1) on an axis, log2_inner being the sum of the log2 extents of the
// axes inside that axis. What is visible along an axis is an interval of coordinates: an interval
// of bits, its ends scaled by the axes inside, repeated by the axes outside.
#pragma once

#include <cstdint>

#include "gna/axis.h"
#include "gna/macros.h"

namespace gna {

// The lowest `count` bits, 0 <= count <= 32.
GNA_HD constexpr uint32_t low_bits(int32_t count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1u;
}

// The bits of `range`, cut to 0 .. 31.
GNA_HD constexpr uint32_t range_bits(Range range) {
  const uint32_t before = low_bits(smaller(larger(range.begin, 0), 32));
  return low_bits(smaller(larger(range.end, 0), 32)) & ~before;
}

// The lowest 2^log2_period bits of `bits`, repeated over the word; log2_period <= 5.
GNA_HD constexpr uint32_t repeat_bits(uint32_t bits, int32_t log2_period) {
  bits &= low_bits(1 << log2_period);
  bits |= log2_period <= 0 ? bits << 1 : 0u;
  bits |= log2_period <= 1 ? bits << 2 : 0u;
  bits |= log2_period <= 2 ? bits << 4 : 0u;
  bits |= log2_period <= 3 ? bits << 8 : 0u;
  bits |= log2_period <= 4 ? bits << 16 : 0u;
  return bits;
}

// Tokens 32 * word .. 32 * word + 31 of a box whose coordinate on one axis lies in `range`.
//
// log2_extent: of the axis. range: coordinates in the box, cut to it here.
GNA_HD constexpr uint32_t axis_bits(Range range, int32_t log2_inner, int32_t log2_extent,
                                    int32_t word) {
  const int32_t extent = 1 << log2_extent;
  const int32_t log2_period = log2_inner + log2_extent;
  const int32_t start = (word * 32) & ((1 << log2_period) - 1);
  const int32_t begin = smaller(larger(range.begin, 0), extent) << log2_inner;
  const int32_t end = smaller(larger(range.end, 0), extent) << log2_inner;
  return repeat_bits(range_bits({begin - start, end - start}), smaller(log2_period, 5));
}

}  // namespace gna
