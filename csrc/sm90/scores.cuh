// What one warpgroup does with a 64x128 tile of scores in its registers: mask it, soften it.
//
// Layout (PTX ISA, "wgmma.mma_async", accumulator of m64nNk16): lane l of warp w has rows
// 16 w + l / 4 and 8 rows further down; element 4 n + 2 r + e is row r's column 8 n + 2 (l % 4) + e.
#pragma once

#include "gna/bits.h"
#include "gna/box_mask.h"
#include "parameters.cuh"
#include "ptx.cuh"

namespace gna::sm90 {

constexpr float infinity = __builtin_huge_valf();

// Limits of a shifted score; floats above zero compare as their bits do.
constexpr int no_offset_yet = INT32_MIN;

// The largest shifted score that needs no new offset: 2 to it, and sums of it, must be far below what
// the type of the weights can hold. The higher, the seldomer offsets change.
template <typename Element>
constexpr float most_shifted = std::is_same_v<Element, __half> ? 10.0f : 30.0f;

// The visible columns of a tile, 32 a word, for both rows of a thread.
struct MaskWords {
  uint32_t row[2][4];

  __device__ __forceinline__ bool any(int r) const {
    return (row[r][0] | row[r][1] | row[r][2] | row[r][3]) != 0;
  }
};

// The two rows of a thread.
struct ThreadRows {
  Range sees[2][max_axes];  // keys, relative to the first one of this lane's word
  float offset[2];          // weights are 2^(scaled score - offset)
  int limit[2];             // the offset must be raised if a shifted score is larger, as float bits
  float sum[2];             // of the weights of this thread's columns
};

// `row`: the first of the two; the other lies 8 further.
__device__ __forceinline__ void start_rows(const Parameters& parameters, const WorkRecord& work,
                                           int row, ThreadRows& rows) {
  int axis_start = 0;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    const int first = first_of_word(parameters.key_words[a], threadIdx.x % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range sees =
          work.sees[axis_start + row_coordinate(parameters.problem, row + 8 * r, a)];
      rows.sees[r][a] = {sees.begin - first, sees.end - first};
    }
    axis_start += 1 << parameters.problem.axes[a].log2_query;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.offset[r] = rows.sum[r] = 0.0f;
    rows.limit[r] = no_offset_yet;
  }
}

// Visible columns of a tile of grid keys, 32 a word, for both rows.
__device__ __forceinline__ void grid_mask(const Parameters& parameters, const ThreadRows& rows,
                                          const KeyRecord& tile, uint32_t axes,
                                          MaskWords& words) {
  // The four lanes of a row work out one word each.
  uint32_t own[2] = {all_bits, all_bits};
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    if (!(axes & 1 << a)) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range sees = rows.sees[r][a];
      own[r] &= word_bits(parameters.key_words[a],
                          {sees.begin - tile.at[a], sees.end - tile.at[a]});
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int word = 0; word < 4; ++word)
      words.row[r][word] = __shfl_sync(full_warp, own[r], word, 4);
}

// Visible columns of a tile of global keys, alike for all rows.
__device__ __forceinline__ void global_mask(const Parameters& parameters, int batch,
                                            int part, int first, MaskWords& words) {
#pragma unroll
  for (int word = 0; word < 4; ++word)
    words.row[0][word] = words.row[1][word] =
        global_word(parameters, batch, part, first + 32 * word);
}

__device__ __forceinline__ void hide(float (&scores)[64], const MaskWords& words) {
  const int shift = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t bits = words.row[r][word] >> shift;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * (4 * word + n) + 2 * r + e];
          score = bits & (1u << (8 * n + e)) ? score : -infinity;
        }
    }
}

// Both rows' values over the four lanes of a row.
template <typename Combine>
__device__ __forceinline__ void row_reduce(float (&x)[2], Combine combine) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = combine(x[r], __shfl_xor_sync(full_warp, x[r], distance));
}

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867), in three steps.
//
// The offset of a row is raised only when a score is far larger, and the result is the same, since the
// sum is relative to the same offset. That is rare, and all that a tile needs otherwise is to know that
// it is not the case: no reduction over the lanes of a row, no chain from the largest score to the
// first weight.

// Scales and shifts the scores; whether the offset of any row of the warp must be raised.
// `limit`: of the shifted scores, by row.
__device__ __forceinline__ bool shift_scores(float (&scores)[64], const ThreadRows& rows,
                                             float scale_log2, const int (&limit)[2]) {
  int largest[2][2] = {{INT32_MIN, INT32_MIN}, {INT32_MIN, INT32_MIN}};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int r = i / 2 % 2;
    scores[i] = fmaf(scores[i], scale_log2, -rows.offset[r]);
    largest[r][i % 2] = max(largest[r][i % 2], __float_as_int(scores[i]));
  }
  return __any_sync(full_warp, max(largest[0][0], largest[0][1]) >= limit[0] ||
                                   max(largest[1][0], largest[1][1]) >= limit[1]);
}

// Raises the offsets of the warp's rows to their largest score where its shifted value is at least
// `limit`, and shifts the scores accordingly; `rescale` is what earlier weights are now to be
// multiplied by.
__device__ __forceinline__ void raise_offsets(float (&scores)[64], ThreadRows& rows, float limit,
                                              float (&rescale)[2]) {
  float largest[2] = {-infinity, -infinity};
#pragma unroll
  for (int i = 0; i < 64; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
  row_reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  float by[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Nothing visible yet leaves minus infinity: such a row waits for its first score.
    const bool first = rows.limit[r] == no_offset_yet;
    const bool raises = first ? largest[r] != -infinity : largest[r] >= limit;
    by[r] = raises ? largest[r] : 0.0f;
    rescale[r] = first ? 1.0f : exp2_approximate(-by[r]);
    rows.offset[r] += by[r];
    rows.limit[r] = raises || !first ? __float_as_int(limit) : no_offset_yet;
    rows.sum[r] *= rescale[r];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] -= by[i / 2 % 2];
}

// Turns shifted scores into weights, as 16-bit operands of the matrix unit: in the scores' layout.
template <typename Element>
__device__ __forceinline__ void weigh(float (&scores)[64], ThreadRows& rows,
                                      uint32_t (&weights)[32]) {
  constexpr int part = 8;
  float sums[2][2] = {};
  // What follows from the exponentials of one part stands behind those of the next.
#pragma unroll
  for (int start = 0; start <= 64; start += part) {
    if (start < 64)
#pragma unroll
      for (int i = start; i < start + part; ++i) scores[i] = exp2_approximate(scores[i]);
    if (start > 0)
#pragma unroll
      for (int i = start - part; i < start; i += 2) {
        sums[i / 2 % 2][0] += scores[i];
        sums[i / 2 % 2][1] += scores[i + 1];
        weights[i / 2] = pack<Element>(scores[i], scores[i + 1]);
      }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.sum[r] += sums[r][0] + sums[r][1];
}

// Multiplies the rows of an accumulator.
template <int n>
__device__ __forceinline__ void scale_rows(float (&accumulator)[n], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < n; ++i) accumulator[i] *= by[(i / 2) % 2];
}

}  // namespace gna::sm90
