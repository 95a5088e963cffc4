// The matrix blocks that all passes are made of, lanes along vectors.
//
// A tile keeps `lanes` tokens (16, 32 or 64) side by side in vectors and streams the other tokens
// past them, a chunk at a time. Two products do all the work:
//
//   dots:        c[row][lane]   = scale * sum over k of a[row][k] * x[k][lane]    rows are tokens
//   accumulate:  sum[d][lane]   = sum[d][lane] * factor[lane]
//                               + sum over row of a[row][d]     * w[row][lane]
//
// `a` is a row-major panel of the streamed tokens, read by broadcast; x, w, c and sum are
// [.][lanes]. Nothing is reduced across a vector.
#pragma once

#include "simd.hpp"

namespace gna::GNA_ISA {

// Products in fp32: one element a step.
struct Single {
  using Cell = float;
  static constexpr int per_cell = 1;
  static GNA_INLINE Vec multiply_add(const Cell* a, Vec x, Vec sum) { return splat(*a) * x + sum; }
};

#if defined(__AVX512BF16__)
// Products of bf16 pairs, summed in fp32: a cell holds two consecutive elements of the sum.
struct Pairs {
  using Cell = uint32_t;
  static constexpr int per_cell = 2;
  static GNA_INLINE Vec multiply_add(const Cell* a, Vec x, Vec sum) {
    return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(splat(*a)), bits_of<__m512bh>(x));
  }
};
#endif

// How many vectors of lanes one block of registers spans, and how many rows.
#if defined(__AVX512F__)
constexpr int most_vectors = 4;
constexpr int most_rows(int vectors) { return vectors == 4 ? 6 : vectors == 2 ? 12 : 14; }
#else
constexpr int most_vectors = 2;
constexpr int most_rows(int) { return 6; }
#endif

// One block: `rows` x `vectors` sums in registers.
template <class Math, int rows, int vectors, bool rows_are_tokens>
void block(const typename Math::Cell* a, int64_t pitch, const float* x, int depth, int lanes,
           float* c, float scale, const float* factor) {
  Vec sum[rows][vectors] = {};
  const int64_t row_step = rows_are_tokens ? pitch : 1;
  const int64_t depth_step = rows_are_tokens ? 1 : pitch;
#pragma GCC unroll 2
  for (int k = 0; k < depth; ++k) {
    Vec across[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) across[v] = load<Vec>(x + v * width);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = Math::multiply_add(a + r * row_step, across[v], sum[r][v]);
    a += depth_step;
    x += lanes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* to = c + r * lanes + v * width;
      if constexpr (rows_are_tokens)
        store(to, sum[r][v] * scale);
      else
        store(to, load<Vec>(to) * (factor ? load<Vec>(factor + v * width) : splat(1.f)) + sum[r][v]);
    }
}

// The block for a number of rows known only at run time.
template <class Math, int rows, int vectors, bool rows_are_tokens, class... Arguments>
GNA_INLINE void block_of(int wanted, Arguments... arguments) {
  if constexpr (rows > 0) {
    if (wanted == rows)
      block<Math, rows, vectors, rows_are_tokens>(arguments...);
    else
      block_of<Math, rows - 1, vectors, rows_are_tokens>(wanted, arguments...);
  }
}

// All blocks of a product; rows are split into nearly equal blocks.
template <class Math, int vectors, bool rows_are_tokens>
void blocks(const typename Math::Cell* a, int64_t pitch, int rows, const float* x, int depth,
            int lanes, float* c, float scale, const float* factor) {
  constexpr int most = most_rows(vectors);
  const int count = (rows + most - 1) / most;
  for (int lane = 0; lane < lanes; lane += vectors * width) {
    for (int index = 0, row = 0; index < count; ++index) {
      const int here = (rows - row) / (count - index);
      block_of<Math, most, vectors, rows_are_tokens>(
          here, a + row * (rows_are_tokens ? pitch : 1), pitch, x + lane, depth, lanes,
          c + row * lanes + lane, scale, factor ? factor + lane : nullptr);
      row += here;
    }
  }
}

template <class Math, bool rows_are_tokens>
GNA_INLINE void product(const typename Math::Cell* a, int64_t pitch, int rows, const float* x,
                        int depth, int lanes, float* c, float scale, const float* factor) {
  if (most_vectors >= 4 && lanes >= 4 * width)
    blocks<Math, most_vectors, rows_are_tokens>(a, pitch, rows, x, depth, lanes, c, scale, factor);
  else if (lanes >= 2 * width)
    blocks<Math, 2, rows_are_tokens>(a, pitch, rows, x, depth, lanes, c, scale, factor);
  else
    blocks<Math, 1, rows_are_tokens>(a, pitch, rows, x, depth, lanes, c, scale, factor);
}

// c [rows][lanes] = scale * a [rows][depth] * x [depth][lanes]; pitch: cells from row to row of a.
template <class Math>
void dots(const typename Math::Cell* a, int64_t pitch, int rows, const float* x, int depth,
          int lanes, float* c, float scale) {
  product<Math, true>(a, pitch, rows, x, depth, lanes, c, scale, nullptr);
}

// sum [size][lanes] = sum * factor + (a [depth][size])^T * w [depth][lanes]; factor may be null.
template <class Math>
void accumulate(const typename Math::Cell* a, int64_t pitch, int size, const float* w, int depth,
                int lanes, float* sum, const float* factor) {
  product<Math, false>(a, pitch, size, w, depth, lanes, sum, 1.f, factor);
}

}  // namespace gna::GNA_ISA
