// What one thread does with its row of a tile of scores: mask it, soften it.
#pragma once

#include "../cuda/mask.cuh"
#include "../cuda/softmax.cuh"
#include "layout.cuh"
#include "ptx.cuh"

namespace gna::sm100 {

// The visible columns of a tile, 32 a word.
struct MaskWords {
  uint32_t word[4];
};

// What the softmax of a row has come to.
struct Row {
  float offset = 0.0f;        // weights are 2^(scaled score - offset)
  float limit = -infinity;    // the offset must be raised for a scaled score that is larger
  float sum = 0.0f;           // of the weights
};

// Visible columns of a tile of grid keys, for a row of the query tile.
__device__ __forceinline__ void grid_mask(const Parameters& parameters, const WorkRecord& work,
                                          int row, const KeyRecord& tile, uint32_t axes,
                                          MaskWords& words) {
#pragma unroll
  for (uint32_t& word : words.word) word = all_bits;
  int axis_start = 0;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    if (axes & 1 << a) {
      const Range keys = work.sees[axis_start + row_coordinate(parameters.problem, row, a)];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int first = tile.at[a] + first_of_word(parameters.key_words[a], word);
        words.word[word] &=
            word_bits(parameters.key_words[a], {keys.begin - first, keys.end - first});
      }
    }
    axis_start += 1 << parameters.problem.axes[a].log2_query;
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
  return largest(most[0], most[1], largest(most[2], most[3], most[3]));
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

// 2^x for two numbers without the unit for exponentials, for x up to 127: the whole part of x becomes the
// exponent, a polynomial gives 2 to the rest, which is in -1/2 .. 1/2, within a relative error of 1.1e-4,
// less than half a unit of a 16-bit weight. Below -127 it is 0. As in FlashAttention-4; the coefficients
// are those of the least largest relative error with 1 at 0.
__device__ __forceinline__ Pair exp2_polynomial(Pair x) {
  constexpr float to_whole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
  x = {fmaxf(x.low, -127.0f), fmaxf(x.high, -127.0f)};
  const Pair moved = add(x, Pair{to_whole, to_whole});
  const Pair whole = add(moved, Pair{-to_whole, -to_whole});
  const Pair rest = multiply_add(whole, Pair{-1.0f, -1.0f}, x);
  Pair power = multiply_add(rest, Pair{0.055008933f, 0.055008933f}, Pair{0.24221097f, 0.24221097f});
  power = multiply_add(rest, power, Pair{0.6932829f, 0.6932829f});
  power = multiply_add(rest, power, Pair{1.0f, 1.0f});
  return {__uint_as_float(__float_as_uint(power.low) + (__float_as_uint(moved.low) << 23)),
          __uint_as_float(__float_as_uint(power.high) + (__float_as_uint(moved.high) << 23))};
}

// Turns 32 scores into weights, as pairs of 16-bit elements. `polynomials`: how many exponentials of 16
// are worked out beside the unit for them.
template <typename Element, int polynomials>
__device__ __forceinline__ void weigh(const float* scores, float scale, Row& row,
                                      uint32_t (&weights)[16]) {
  Pair sums[2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const Pair shifted = multiply_add(Pair{scores[2 * i], scores[2 * i + 1]}, Pair{scale, scale},
                                      Pair{-row.offset, -row.offset});
    const Pair weight = i * polynomials % 16 < polynomials
                            ? exp2_polynomial(shifted)
                            : Pair{exp2_approximate(shifted.low), exp2_approximate(shifted.high)};
    sums[i % 2] = add(sums[i % 2], weight);
    weights[i] = pack<Element>(weight.low, weight.high);
  }
  const Pair sum = add(sums[0], sums[1]);
  row.sum += sum.low + sum.high;
}

}  // namespace gna::sm100
