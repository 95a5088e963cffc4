// Masks of a 64x128 tile of scores, of which a warpgroup holds the accumulators in its registers.
//
// Masks along the axes of the grid are made by the tensor core, which adds minus infinity to scores
// (coordinate_mask.h). Masks of global keys, and of boxes with too many coordinates, are bitmasks.
//
// Layout (PTX ISA, "wgmma.mma_async", accumulator of m64nNk16): lane l of warp w has rows
// 16 w + l / 4 and 8 rows further down; element 4 n + 2 r + e is row r's column 8 n + 2 (l % 4) + e.
#pragma once

#include "../cuda/mask.cuh"
#include "../cuda/softmax.cuh"
#include "shared_storage.cuh"

namespace gna::sm90 {

// The columns of a tile that are not masked, 32 a word, for both rows of a thread.
struct Bitmask {
  uint32_t row[2][4];
};

// The keys that the two rows of a thread attend to; for bitmasks, relative to the first key of this lane's
// word.
struct AttendedKeys {
  Range rows[2][max_axes];
};

// `row`: the first of the two; the other lies 8 further. `for_bitmask`: how tiles will be masked.
__device__ __forceinline__ void find_attended_keys(const Params& params, const WorkTileInfo& work,
                                                   int row, bool for_bitmask, AttendedKeys& attended) {
  int axis_start = 0;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    const int first = for_bitmask ? first_of_word(params.key_words[a], threadIdx.x % 4) : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range keys = work.attended[axis_start + row_coordinate(params.problem, row + 8 * r, a)];
      attended.rows[r][a] = {keys.begin - first, keys.end - first};
    }
    axis_start += 1 << params.problem.axes[a].log2_query;
  }
}

// Calls visit(a, r, keys) for the given axes and both rows: the keys that row r attends to along axis a,
// relative to a tile.
template <typename Visit>
__device__ __forceinline__ void for_each_range(const AttendedKeys& attended, const KeyTileInfo& tile,
                                               uint32_t axes, Visit visit) {
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    if (!(axes & 1 << a)) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range keys = attended.rows[r][a];
      visit(a, r, Range{keys.begin - tile.at[a], keys.end - tile.at[a]});
    }
  }
}

// The mask by MMA ---------------------------------------------------------------------------------

// The coordinates of a key tile that are masked for both rows, along the given axes. Leaves `masked`
// alone if there are none.
__device__ __forceinline__ void find_masked_coordinates(const Params& params,
                                                        const AttendedKeys& attended,
                                                        const KeyTileInfo& tile, uint32_t axes,
                                                        uint32_t (&masked)[2]) {
  if (axes == 0) return;
  masked[0] = masked[1] = 0;
  for_each_range(attended, tile, axes, [&](int a, int r, Range keys) {
    masked[r] |= masked_coordinates(params.key_coordinates, a, keys);
  });
}

// The same as the left operand of an MMA: two steps of 16 columns.
__device__ __forceinline__ void make_mask_operand(const uint32_t (&masked)[2], uint32_t (&operand)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    operand[i] = two_columns(masked[i % 2], i / 2 * 4 + threadIdx.x % 4, masked_element);
}

// Writes the right operand: which coordinates the keys of a tile have. 128 threads.
__device__ __forceinline__ void write_key_coordinates(const CoordinateBits& bits, uint8_t* to) {
  const int key = threadIdx.x % 128;
  const uint32_t has = coordinates_of(bits, key);
  for (int chunk = 0; chunk < 4; ++chunk) {
    uint32_t columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) columns[i] = two_columns(has, 4 * chunk + i, has_element);
    *reinterpret_cast<uint4*>(to + key * row_bytes + (chunk ^ key % 8) * 16) = {columns[0], columns[1],
                                                                                columns[2], columns[3]};
  }
}

// Whether the MMA of scores must add a mask for this half.
__device__ __forceinline__ bool is_masked_by_mma(const KeyTileInfo& tile, int half) {
  return masked_axes(tile.flags, half) != 0 && !(tile.flags & needs_bitmask);
}

// Bitmasks ----------------------------------------------------------------------------------------

__device__ __forceinline__ void grid_bitmask(const Params& params, const AttendedKeys& attended,
                                             const KeyTileInfo& tile, uint32_t axes, Bitmask& bitmask) {
  // The four lanes of a row make one word each.
  uint32_t own[2] = {all_bits, all_bits};
  for_each_range(attended, tile, axes,
                 [&](int a, int r, Range keys) { own[r] &= word_bits(params.key_words[a], keys); });
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int word = 0; word < 4; ++word) bitmask.row[r][word] = __shfl_sync(full_warp, own[r], word, 4);
}

// The same for all rows.
__device__ __forceinline__ void global_bitmask(const Params& params, int batch, int part, int first,
                                               Bitmask& bitmask) {
#pragma unroll
  for (int word = 0; word < 4; ++word)
    bitmask.row[0][word] = bitmask.row[1][word] =
        global_bitmask_word(params, batch, part, first + 32 * word);
}

// Returns whether this half needs a mask for the tile, and makes it.
__device__ __forceinline__ bool find_bitmask(const Params& params, const AttendedKeys& attended,
                                             int batch, const KeyTileInfo& tile, int half,
                                             Bitmask& bitmask) {
  if (const uint32_t axes = masked_axes(tile.flags, half))
    grid_bitmask(params, attended, tile, axes, bitmask);
  else if (tile.flags & globals_masked)
    global_bitmask(params, batch, part_of(tile), tile.at[2], bitmask);
  else
    return false;
  return true;
}

__device__ __forceinline__ void apply_bitmask(float (&scores)[64], const Bitmask& bitmask) {
  const int shift = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t bits = bitmask.row[r][word] >> shift;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * (4 * word + n) + 2 * r + e];
          score = bits & (1u << (8 * n + e)) ? score : -infinity;
        }
    }
}

}  // namespace gna::sm90
