// Computing carefully.
//
// A weight of zero does not hide a value that is not finite, and weights beyond 1 may take a huge one
// over the top. Where that shows in the output, a second kernel does all work again: the warps that
// finish take values that are not finite out of each tile first, those that soften add them to the rows
// that see them, and no weight exceeds 1.
#pragma once

#include "layout.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

namespace gna::sm100 {

// Adds what was taken out of the tile to the output of the warp's rows that see it. There is no output
// yet if it is `fresh`.
template <int head_dim>
__device__ __forceinline__ void add_non_finite(uint32_t output, bool fresh,
                                               const NonFinite<head_dim>& non_finite,
                                               const MaskWords& words) {
#pragma unroll 1
  for (int column = 0; column < head_dim; column += 32) {
    float part[32];
    if (!fresh) {
      load_columns(part, output + column);
      wait_loads(part);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      uint32_t nan = 0, plus = 0, minus = 0;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        nan |= non_finite.nan[word][column + i] & words.word[word];
        plus |= non_finite.plus[word][column + i] & words.word[word];
        minus |= non_finite.minus[word][column + i] & words.word[word];
      }
      float x = fresh ? 0.0f : part[i];
      if (plus) x += infinity;
      if (minus) x -= infinity;
      if (nan) x = nanf("");
      part[i] = x;
    }
    store_columns(output + column, part);
  }
  wait_stores();
}

}  // namespace gna::sm100
