// Masks of a row of a tile of scores, which one thread holds in its registers: bitmasks.
#pragma once

#include "../cuda/mask.cuh"
#include "../cuda/softmax.cuh"
#include "shared_storage.cuh"

namespace gna::sm100 {

// The columns of a tile that are not masked, 32 a word.
struct Bitmask {
  uint32_t word[4];
};

// `row`: of the query tile.
__device__ __forceinline__ void grid_bitmask(const Params& params, const WorkTileInfo& work, int row,
                                             const KeyTileInfo& tile, uint32_t axes, Bitmask& bitmask) {
#pragma unroll
  for (uint32_t& word : bitmask.word) word = all_bits;
  int axis_start = 0;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    if (axes & 1 << a) {
      const Range keys = work.attended[axis_start + row_coordinate(params.problem, row, a)];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int first = tile.at[a] + first_of_word(params.key_words[a], word);
        bitmask.word[word] &= word_bits(params.key_words[a], {keys.begin - first, keys.end - first});
      }
    }
    axis_start += 1 << params.problem.axes[a].log2_query;
  }
}

// The same for all rows.
__device__ __forceinline__ void global_bitmask(const Params& params, int batch, int part, int first,
                                               Bitmask& bitmask) {
#pragma unroll
  for (int word = 0; word < 4; ++word)
    bitmask.word[word] = global_bitmask_word(params, batch, part, first + 32 * word);
}

// Returns whether a half needs a mask for the tile, and makes it. `row`: of the half.
__device__ __forceinline__ bool find_bitmask(const Params& params, const WorkTileInfo& work,
                                             const KeyTileInfo& tile, int half, int row,
                                             Bitmask& bitmask) {
  const uint32_t axes = masked_axes(tile.flags, half);
  if (axes != 0)
    grid_bitmask(params, work, half * half_rows + row, tile, axes, bitmask);
  else if (tile.flags & globals_masked)
    global_bitmask(params, work.batch, part_of(tile), tile.at[2], bitmask);
  else
    return false;
  return true;
}

__device__ __forceinline__ void apply_bitmask(float (&scores)[128], const Bitmask& bitmask) {
#pragma unroll
  for (int i = 0; i < 128; ++i) scores[i] = bitmask.word[i / 32] & 1u << i % 32 ? scores[i] : -infinity;
}

}  // namespace gna::sm100
