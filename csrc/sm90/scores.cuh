// What one warpgroup does with a 64x128 tile of scores in its registers: mask it, soften it.
//
// Layout (PTX ISA, "wgmma.mma_async", accumulator of m64nNk16): lane l of warp w has rows
// 16 w + l / 4 and 8 rows further down; element 4 n + 2 r + e is row r's column 8 n + 2 (l % 4) + e.
#pragma once

#include "../cuda/mask.cuh"
#include "../cuda/softmax.cuh"
#include "parameters.cuh"
#include "ptx.cuh"

namespace gna::sm90 {

// A sum of 32 weights from here on has one that is at least 2^most_shifted; below it the type of the
// weights can hold them all.
template <typename Element>
constexpr float most_summed = std::is_same_v<Element, __half> ? 0x1p15f : 0x1p35f;

// The visible columns of a tile, 32 a word, for both rows of a thread.
struct MaskWords {
  uint32_t row[2][4];
};

// The two rows of a thread.
struct ThreadRows {
  Range sees[2][max_axes];  // keys; for masks by words, relative to the first one of this lane's word
  float offset[2];          // weights are 2^(scaled score - offset)
  bool has_offset[2];       // it has seen a score
  float sum[2];             // of the weights of this thread's columns
};

// `row`: the first of the two; the other lies 8 further. `by_words`: how tiles will be masked.
__device__ __forceinline__ void start_rows(const Parameters& parameters, const WorkRecord& work,
                                           int row, bool by_words, ThreadRows& rows) {
  int axis_start = 0;
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    const int first = by_words ? first_of_word(parameters.key_words[a], threadIdx.x % 4) : 0;
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
    rows.has_offset[r] = false;
  }
}

// Calls visit(a, r, keys) for some axes and both rows: what row r sees along axis a, relative to a tile.
template <typename Visit>
__device__ __forceinline__ void for_each_seen(const ThreadRows& rows, const KeyRecord& tile,
                                              uint32_t axes, Visit visit) {
#pragma unroll
  for (int a = 0; a < max_axes; ++a) {
    if (!(axes & 1 << a)) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Range sees = rows.sees[r][a];
      visit(a, r, Range{sees.begin - tile.at[a], sees.end - tile.at[a]});
    }
  }
}

// What both rows do not see of a tile of grid keys along some axes, by coordinate; see
// coordinate_mask.h. Nothing is said if there is no such axis.
__device__ __forceinline__ void find_hidden(const Parameters& parameters, const ThreadRows& rows,
                                            const KeyRecord& tile, uint32_t axes,
                                            uint32_t (&hidden)[2]) {
  if (axes == 0) return;
  hidden[0] = hidden[1] = 0;
  for_each_seen(rows, tile, axes, [&](int a, int r, Range keys) {
    hidden[r] |= hidden_coordinates(parameters.key_coordinates, a, keys);
  });
}

// The same as operands of the matrix unit: two steps of 16 columns.
__device__ __forceinline__ void hidden_operands(const uint32_t (&hidden)[2],
                                                uint32_t (&operands)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    operands[i] = two_columns(hidden[i % 2], i / 2 * 4 + threadIdx.x % 4, hidden_element);
}

// Writes which coordinates the keys of a tile have, in the layout of a tile of keys. 128 threads.
__device__ __forceinline__ void write_coordinates(const CoordinateBits& bits, uint8_t* to) {
  const int key = threadIdx.x % 128;
  const uint32_t has = coordinates_of(bits, key);
  for (int chunk = 0; chunk < 4; ++chunk) {
    uint32_t columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) columns[i] = two_columns(has, 4 * chunk + i, has_element);
    *reinterpret_cast<uint4*>(to + key * row_bytes + (chunk ^ key % 8) * 16) = {
        columns[0], columns[1], columns[2], columns[3]};
  }
}

// Visible columns of a tile of grid keys, 32 a word, for both rows.
__device__ __forceinline__ void grid_mask(const Parameters& parameters, const ThreadRows& rows,
                                          const KeyRecord& tile, uint32_t axes,
                                          MaskWords& words) {
  // The four lanes of a row work out one word each.
  uint32_t own[2] = {all_bits, all_bits};
  for_each_seen(rows, tile, axes, [&](int a, int r, Range keys) {
    own[r] &= word_bits(parameters.key_words[a], keys);
  });
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

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867).
//
// The offset of a row is that of the first scores that it sees, and is raised only when weights become
// very large; the result is the same, since the sum is relative to the same offset. So nothing stands
// between scores and weights but a product and an exponential: no largest score, and no reduction over
// the lanes of a row. Weights that are too large show in their sum, and tell their scores.

__device__ __forceinline__ void shift_scores(float (&scores)[64], const ThreadRows& rows,
                                             float scale_log2) {
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] = fmaf(scores[i], scale_log2, -rows.offset[i / 2 % 2]);
}

// Whether all rows of the warp have an offset.
__device__ __forceinline__ bool have_offsets(const ThreadRows& rows) {
  return __all_sync(full_warp, rows.has_offset[0] && rows.has_offset[1]);
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
    const bool first = !rows.has_offset[r];
    const bool raises = first ? largest[r] != -infinity : largest[r] >= limit;
    by[r] = raises ? largest[r] : 0.0f;
    rescale[r] = first ? 1.0f : exp2_approximate(-by[r]);
    rows.offset[r] += by[r];
    rows.has_offset[r] |= raises;
    rows.sum[r] *= rescale[r];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] -= by[i / 2 % 2];
}

// Turns shifted scores into weights, also as 16-bit operands of the matrix unit, in the scores' layout;
// `sum`: of this thread's, by row.
template <typename Element>
__device__ __forceinline__ void weigh(float (&scores)[64], uint32_t (&weights)[32],
                                      float (&sum)[2]) {
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
  for (int r = 0; r < 2; ++r) sum[r] = sums[r][0] + sums[r][1];
}

// Whether a row of the warp has weights for which its offset must be raised.
template <typename Element>
__device__ __forceinline__ bool is_too_large(const float (&sum)[2]) {
  return __any_sync(full_warp, fmaxf(sum[0], sum[1]) >= most_summed<Element>);
}

// What `weigh` made them of. A weight that is infinite stays so, and is found in the output.
__device__ __forceinline__ void unweigh(float (&scores)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] = log2_approximate(scores[i]);
}

// Multiplies the rows of an accumulator.
template <int n>
__device__ __forceinline__ void scale_rows(float (&accumulator)[n], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < n; ++i) accumulator[i] *= by[(i / 2) % 2];
}

}  // namespace gna::sm90
