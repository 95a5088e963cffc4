// What one thread does with its row of a tile of scores: mask it, soften it.
#pragma once

#include "gna/bits.h"
#include "gna/box_mask.h"
#include "layout.cuh"
#include "ptx.cuh"

namespace gna::sm100 {

constexpr float infinity = __builtin_huge_valf();

// The largest shifted score that needs no new offset: 2 to it, and sums of it, must be far below what
// the type of the weights can hold. The higher, the seldomer offsets change.
template <typename Element>
constexpr float most_shifted = std::is_same_v<Element, __half> ? 10.0f : 30.0f;

// The visible columns of a tile, 32 a word.
struct MaskWords {
  uint32_t word[4];
};

struct Row {
  Range sees[max_axes];  // keys
  float offset;          // weights are 2^(scaled score - offset)
  float limit;           // the offset must be raised for a scaled score that is larger
  float sum;             // of the weights
};

// `row`: of the query tile.
__device__ __forceinline__ void start_row(const Parameters& parameters, const WorkRecord& work,
                                          int row, Row& state) {
  int axis_start = 0;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    state.sees[a] = work.sees[axis_start + row_coordinate(parameters.problem, row, a)];
    axis_start += 1 << parameters.problem.axes[a].log2_query;
  }
  state.offset = state.sum = 0.0f;
  state.limit = -infinity;
}

// Visible columns of a tile of grid keys.
__device__ __forceinline__ void grid_mask(const Parameters& parameters, const Row& row,
                                          const KeyRecord& tile, uint32_t axes, MaskWords& words) {
#pragma unroll
  for (uint32_t& word : words.word) word = all_bits;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    if (!(axes & 1 << a)) continue;
    const Range sees{row.sees[a].begin - tile.at[a], row.sees[a].end - tile.at[a]};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int first = first_of_word(parameters.key_words[a], word);
      words.word[word] &=
          word_bits(parameters.key_words[a], {sees.begin - first, sees.end - first});
    }
  }
}

// Visible columns of a tile of global keys, alike for all rows.
__device__ __forceinline__ void global_mask(const Parameters& parameters, int batch, int part,
                                            int first, MaskWords& words) {
#pragma unroll
  for (int word = 0; word < 4; ++word)
    words.word[word] = global_word(parameters, batch, part, first + 32 * word);
}

__device__ __forceinline__ void hide(float (&scores)[128], const MaskWords& words) {
#pragma unroll
  for (int i = 0; i < 128; ++i)
    scores[i] = words.word[i / 32] & 1u << i % 32 ? scores[i] : -infinity;
}

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867), in three steps. The offset of a row is
// raised only when a score is far larger, and the result is the same, since the sum is relative to the
// same offset.

__device__ __forceinline__ float largest_of(const float (&scores)[128]) {
  float most[4] = {-infinity, -infinity, -infinity, -infinity};
#pragma unroll
  for (int i = 0; i < 128; i += 2)
    most[i / 2 % 4] = largest(most[i / 2 % 4], scores[i], scores[i + 1]);
  return fmaxf(largest(most[0], most[1], most[2]), most[3]);
}

// Raises the offset of a row to its largest scaled score if that is above the limit; what earlier
// weights are now to be multiplied by.
__device__ __forceinline__ float raise_offset(Row& row, float scaled, float margin) {
  if (!(scaled > row.limit)) return 1.0f;
  const float rescale = row.limit == -infinity ? 1.0f : exp2_approximate(row.offset - scaled);
  row.offset = scaled;
  row.limit = scaled + margin;
  row.sum *= rescale;
  return rescale;
}

// Turns 64 scores into weights, as pairs of 16-bit elements.
template <typename Element>
__device__ __forceinline__ void weigh(float* scores, float scale, Row& row, uint32_t (&weights)[32]) {
  Pair sums[2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const Pair shifted = multiply_add(Pair{scores[i], scores[i + 1]}, Pair{scale, scale},
                                      Pair{-row.offset, -row.offset});
    const Pair weight{exp2_approximate(shifted.low), exp2_approximate(shifted.high)};
    sums[i / 2 % 2] = add(sums[i / 2 % 2], weight);
    weights[i / 2] = pack<Element>(weight.low, weight.high);
  }
  const Pair sum = add(sums[0], sums[1]);
  row.sum += sum.low + sum.high;
}

}  // namespace gna::sm100
