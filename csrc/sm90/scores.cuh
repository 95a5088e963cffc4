// What one warpgroup does with a 64x128 tile of scores in its registers: mask it, soften it.
//
// Layout (PTX ISA, "wgmma.mma_async", accumulator of m64nNk16): lane l of warp w has rows
// 16 w + l / 4 and 8 rows further down; element 4 n + 2 r + e is row r's column 8 n + 2 (l % 4) + e.
#pragma once

#include "gna/bits.h"
#include "gna/walk.h"
#include "parameters.cuh"
#include "ptx.cuh"

namespace gna::sm90 {

constexpr float infinity = __builtin_huge_valf();
constexpr unsigned full_warp = 0xffffffffu;

// The two rows of a thread: which keys they see, and their softmax so far.
struct ThreadRows {
  Range sees[2][max_axes];
  float top[2];  // the largest score when the sums were last rescaled
  float sum[2];  // of this thread's columns
};

__device__ __forceinline__ void start_rows(const Problem& problem, const QueryTile& tile, int row,
                                           ThreadRows& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.top[r] = -infinity;
    rows.sum[r] = 0.0f;
#pragma unroll
    for (int a = 0; a < max_axes; ++a) {
      rows.sees[r][a] = tile.keys[a];
      if (tile.part != grid_part) continue;
      const int query = tile.queries[a].begin + row_coordinate(problem, row + 8 * r, a);
      // A row outside the grid is computed like the last one inside, and not stored.
      rows.sees[r][a] = keys_of(tile.axes[a], smaller(query, tile.axes[a].length - 1));
    }
  }
}

// Visible columns of a tile of grid keys, 32 a word, for both rows.
__device__ __forceinline__ void grid_mask(const Problem& problem, const ThreadRows& rows,
                                          const KeyTile& tile, uint32_t (&words)[2][4]) {
  const int lane = threadIdx.x % 32;
  // The four lanes of a row work out one word each.
  uint32_t own[2] = {all_bits, all_bits};
  int log2_inner = 0;
#pragma unroll
  for (int a = max_axes - 1; a >= 0; --a) {
    const int log2_extent = problem.axes[a].log2_key;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range sees = rows.sees[r][a];
      own[r] &= axis_bits({sees.begin - tile.at[a], sees.end - tile.at[a]}, log2_inner, log2_extent,
                          lane % 4);
    }
    log2_inner += log2_extent;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int word = 0; word < 4; ++word)
      words[r][word] = __shfl_sync(full_warp, own[r], word, 4);
}

// Visible columns of a tile of global keys, alike for all rows.
__device__ __forceinline__ void global_mask(const Parameters& parameters, int batch,
                                            const KeyTile& tile, uint32_t (&words)[2][4]) {
  const Problem& problem = parameters.problem;
  const int lane = threadIdx.x % 32;
  const int tokens = part_tokens(problem, tile.part);
  const int before = tile.part == suffix_part ? problem.prefix : 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int token = tile.at[2] + 32 * word + lane;
    bool visible = token < tokens;
    if (visible && parameters.key_mask != nullptr)
      visible = parameters.key_mask[batch * parameters.key_mask_batch_stride +
                                    (before + token) * parameters.key_mask_token_stride] != 0;
    words[0][word] = words[1][word] = __ballot_sync(full_warp, visible);
  }
}

__device__ __forceinline__ void hide(float (&scores)[64], const uint32_t (&words)[2][4]) {
  const int shift = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t bits = words[r][word] >> shift;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * (4 * word + n) + 2 * r + e];
          score = bits & (1u << (8 * n + e)) ? score : -infinity;
        }
    }
}

// The largest (with fmaxf) or the sum over the four lanes of a row.
__device__ __forceinline__ float row_largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(full_warp, x, 1));
  return fmaxf(x, __shfl_xor_sync(full_warp, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(full_warp, x, 1);
  return x + __shfl_xor_sync(full_warp, x, 2);
}

// Turns scores into weights relative to `top`; `rescale` is what earlier weights are now to be
// multiplied by.
//
// Online softmax (Milakov and Gimelshein, arXiv 1805.02867). The old top is kept until the new one
// is 2^8 times larger (as FlashAttention-4 does): weights then stay below 2^8, and the result is
// the same, since the sum is relative to the same top.
__device__ __forceinline__ void soften(float (&scores)[64], ThreadRows& rows, float scale_log2,
                                       float (&rescale)[2]) {
  constexpr float most = 8.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = fmaxf(scores[2 * r], scores[2 * r + 1]);
#pragma unroll
    for (int n = 1; n < 16; ++n)
      largest = fmaxf(largest, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
    largest = fmaxf(rows.top[r], row_largest(largest));
    const bool grows = (largest - rows.top[r]) * scale_log2 > most;
    rescale[r] = grows ? exp2_approximate((rows.top[r] - largest) * scale_log2) : 1.0f;
    rows.top[r] = grows ? largest : rows.top[r];
    const float offset = rows.top[r] == -infinity ? 0.0f : rows.top[r] * scale_log2;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[4 * n + 2 * r + e];
        score = exp2_approximate(fmaf(score, scale_log2, -offset));
        sum += score;
      }
    rows.sum[r] = fmaf(rows.sum[r], rescale[r], sum);
  }
}

// Multiplies the rows of an accumulator.
template <int n>
__device__ __forceinline__ void scale_rows(float (&accumulator)[n], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < n; ++i) accumulator[i] *= by[(i / 2) % 2];
}

template <int n>
__device__ __forceinline__ void rescale_rows(float (&accumulator)[n], const float (&by)[2]) {
  if (__any_sync(full_warp, by[0] != 1.0f || by[1] != 1.0f)) scale_rows(accumulator, by);
}

// Weights as the matrix unit takes them from registers: the layout of the scores, 16-bit.
template <typename Element>
__device__ __forceinline__ void pack_weights(const float (&scores)[64], uint32_t (&weights)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) weights[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
}

}  // namespace gna::sm90
