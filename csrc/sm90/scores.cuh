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
constexpr unsigned full_warp = 0xffffffffu;

// The two rows of a thread.
struct ThreadRows {
  Range sees[2][max_axes];  // keys, relative to the first one of this lane's word
  float top[2];             // the largest score when the sums were last rescaled
  float sum[2];             // of this thread's columns
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
    rows.top[r] = -infinity;
    rows.sum[r] = 0.0f;
  }
}

// Visible columns of a tile of grid keys, 32 a word, for both rows.
__device__ __forceinline__ void grid_mask(const Parameters& parameters, const ThreadRows& rows,
                                          const KeyRecord& tile, uint32_t axes,
                                          uint32_t (&words)[2][4]) {
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
      words[r][word] = __shfl_sync(full_warp, own[r], word, 4);
}

// Visible columns of a tile of global keys, alike for all rows.
__device__ __forceinline__ void global_mask(const Parameters& parameters, int batch,
                                            int part, int first, uint32_t (&words)[2][4]) {
  const Problem& problem = parameters.problem;
  const int lane = threadIdx.x % 32;
  const int tokens = part_tokens(problem, part);
  const int before = part == suffix_part ? problem.prefix : 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int token = first + 32 * word + lane;
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

// Both rows' [r][0] over their pairs and then over the four lanes of a row.
template <typename Combine>
__device__ __forceinline__ void row_reduce(float (&x)[2][2], Combine combine) {
#pragma unroll
  for (int r = 0; r < 2; ++r) x[r][0] = combine(x[r][0], x[r][1]);
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      x[r][0] = combine(x[r][0], __shfl_xor_sync(full_warp, x[r][0], distance));
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
  // Two chains a row, and both rows side by side, for what can run at the same time.
  float largest[2][2], sums[2][2] = {}, offset[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) largest[i / 2][i % 2] = scores[i];
#pragma unroll
  for (int i = 4; i < 64; ++i)
    largest[i / 2 % 2][i % 2] = fmaxf(largest[i / 2 % 2][i % 2], scores[i]);
  row_reduce(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(rows.top[r], largest[r][0]);
    const bool grows = (top - rows.top[r]) * scale_log2 > most;
    rescale[r] = grows ? exp2_approximate((rows.top[r] - top) * scale_log2) : 1.0f;
    rows.top[r] = grows ? top : rows.top[r];
    offset[r] = rows.top[r] == -infinity ? 0.0f : rows.top[r] * scale_log2;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int r = i / 2 % 2;
    scores[i] = exp2_approximate(fmaf(scores[i], scale_log2, -offset[r]));
    sums[r][i % 2] += scores[i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    rows.sum[r] = fmaf(rows.sum[r], rescale[r], sums[r][0] + sums[r][1]);
}

// Multiplies the rows of an accumulator.
template <int n>
__device__ __forceinline__ void scale_rows(float (&accumulator)[n], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < n; ++i) accumulator[i] *= by[(i / 2) % 2];
}

// Whether earlier weights of any row of this warp are to be multiplied.
//
// Sums are never negative. But as the branch on this needs them, the assembler must put the whole
// softmax before it, and so beside the matrix work that is waited for behind it; left to itself it
// moves the exponentials behind the wait.
__device__ __forceinline__ bool needs_rescale(const ThreadRows& rows, const float (&rescale)[2]) {
  return __any_sync(full_warp, rescale[0] != 1.0f || rescale[1] != 1.0f ||
                                   rows.sum[0] < 0.0f || rows.sum[1] < 0.0f);
}

// Weights as the matrix unit takes them from registers: the layout of the scores, 16-bit.
template <typename Element>
__device__ __forceinline__ void pack_weights(const float (&scores)[64], uint32_t (&weights)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) weights[i] = pack<Element>(scores[2 * i], scores[2 * i + 1]);
}

}  // namespace gna::sm90
