// The mask of a tile of keys as a product of two matrices.
//
// A row attends to a key of a box if it attends to the key's coordinate on every axis. So with a column for every
// coordinate of every axis, let H [rows, columns] have minus infinity where a row does not attend to a
// coordinate and zero elsewhere, and K [keys, columns] say which coordinates a key has: H K^T, added to
// the scores, masks what the mask masks. K is the same for all tiles; H is a few bits a row.
//
// A column is a bit of a word; bits m and m + 16 are neighbors in the matrices, columns 2 m and 2 m + 1,
// so that two elements of 16 bits are made of a word by a shift, a mask and a product.
#pragma once

#include <cstdint>

#include "gna/box_mask.h"
#include "gna/tile_walk.h"

namespace gna {

// bf16. H's elements times K's must be minus infinity, and zero times either zero: so both are finite.
constexpr uint32_t masked_element = 0xff7f;  // -3.4e38
constexpr uint32_t has_element = 0x4000;     // 2

// Which bits stand for the coordinates of an axis of a box.
struct CoordinateBits {
  int32_t start[max_axes], extent[max_axes];
  int32_t steps;  // of 16 columns; 0 if the box has more than 32 coordinates
};

// One step if the axes fit into its bits, 0 to 7 and 16 to 23, like those of a box of 4, 4 and 8 keys.
GNA_HD constexpr CoordinateBits coordinate_bits(const int32_t (&log2_extent)[max_axes]) {
  CoordinateBits bits{};
  int32_t used[2] = {}, all = 0;
  bool fits = true;
  for (int32_t a = 0; a < max_axes; ++a) {
    const int32_t extent = 1 << log2_extent[a];
    const int32_t half = used[0] + extent <= 8 ? 0 : 1;
    bits.extent[a] = extent;
    bits.start[a] = 16 * half + used[half];
    used[half] += extent;
    fits &= used[half] <= 8;
    all += extent;
  }
  bits.steps = fits ? 1 : all <= 32 ? 2 : 0;
  if (bits.steps == 0) return {{0, 0, 0}, {1, 1, 1}, 0};
  for (int32_t a = 0, start = 0; a < max_axes && !fits; start += bits.extent[a++]) bits.start[a] = start;
  return bits;
}

// The coordinates that key `key` of a box has.
GNA_HD constexpr uint32_t coordinates_of(const CoordinateBits& bits, int32_t key) {
  uint32_t has = 0;
  for (int32_t a = max_axes - 1; a >= 0; --a) {
    has |= 1u << (bits.start[a] + (key & (bits.extent[a] - 1)));
    key /= bits.extent[a];
  }
  return has;
}

// The coordinates on axis `a` outside `attended`, which is relative to the box; all bits if that is empty.
GNA_HD uint32_t masked_coordinates(const CoordinateBits& bits, int32_t a, Range attended) {
  const int32_t extent = bits.extent[a];
  const uint32_t begin = power_of_two(smaller(larger(attended.begin, 0), extent));
  const uint32_t end = power_of_two(smaller(larger(attended.end, 0), extent));
  return begin == end ? all_bits
                      : (power_of_two(extent) - 1 - (end - begin)) << bits.start[a];
}

// Columns 2 `pair` and 2 `pair` + 1.
GNA_HD constexpr uint32_t two_columns(uint32_t bits, int32_t pair, uint32_t element) {
  return (bits >> pair & 0x00010001u) * element;
}

}  // namespace gna
