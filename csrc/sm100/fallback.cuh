// What the fallback kernel, which is safe for values that are not finite, does besides the main loop.
//
// In the fast kernel, a masked key with a value that is not finite makes the output NaN, and a probability
// above 1 may make a huge value overflow. In the fallback, the epilogue warps take values that are not
// finite out of each tile first, the softmax warps add them to the rows that attend to them, and no
// probability exceeds 1.
#pragma once

#include "mask.cuh"
#include "tcgen05.cuh"

namespace gna::sm100 {

// Adds what was taken out of a tile to the output of the warp's rows that attend to it. `fresh`: there is
// no output yet.
template <int head_dim>
__device__ __forceinline__ void put_back_non_finite(uint32_t output, bool fresh,
                                                    const NonFinite<head_dim>& non_finite,
                                                    const Bitmask& bitmask) {
#pragma unroll 1
  for (int column = 0; column < head_dim; column += 32) {
    float part[32];
    if (!fresh) {
      tmem_load(part, output + column);
      tmem_wait_load(part);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      uint32_t nan = 0, plus = 0, minus = 0;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        nan |= non_finite.nan[word][column + i] & bitmask.word[word];
        plus |= non_finite.plus[word][column + i] & bitmask.word[word];
        minus |= non_finite.minus[word][column + i] & bitmask.word[word];
      }
      float x = fresh ? 0.0f : part[i];
      if (plus) x += infinity;
      if (minus) x -= infinity;
      if (nan) x = nanf("");
      part[i] = x;
    }
    tmem_store(output + column, part);
  }
  tmem_wait_store();
}

}  // namespace gna::sm100
