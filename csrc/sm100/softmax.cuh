// The online softmax of a row of a tile of scores, which one thread holds in its registers.
#pragma once

#include "../cuda/softmax.cuh"
#include "shared_storage.cuh"
#include "tcgen05.cuh"

namespace gna::sm100 {

struct Softmax {
  float row_max = 0.0f;     // a reference, see ../cuda/softmax.cuh
  float limit = -infinity;  // row_max must be updated for a scaled score above this
  float row_sum = 0.0f;     // of the probabilities
};

__device__ __forceinline__ float max_of(const float (&scores)[128]) {
  float largest[4] = {-infinity, -infinity, -infinity, -infinity};
#pragma unroll
  for (int i = 0; i < 128; i += 2)
    largest[i / 2 % 4] = max3(largest[i / 2 % 4], scores[i], scores[i + 1]);
  return max3(largest[0], largest[1], max3(largest[2], largest[3], largest[3]));
}

// Updates row_max to the row's largest scaled score if that is above the limit. Returns what earlier
// probabilities are to be multiplied by.
__device__ __forceinline__ float update_row_max(Softmax& softmax, float scaled, float threshold) {
  if (!(scaled > softmax.limit)) return 1.0f;
  const float rescale = softmax.limit == -infinity ? 1.0f : exp2_approximate(softmax.row_max - scaled);
  softmax.row_max = scaled;
  softmax.limit = scaled + threshold;
  softmax.row_sum *= rescale;
  return rescale;
}

// 2^x for two numbers up to 127, on the FMA pipe in place of the MUFU, as in FlashAttention-4. The whole
// part of x becomes the exponent. A polynomial gives 2 to the rest, which is in -1/2 .. 1/2, within a
// relative error of 1.1e-4, less than half a unit of a 16-bit probability. Below -127 the result is 0. The
// coefficients are those of the least largest relative error with 1 at 0.
__device__ __forceinline__ Float2 exp2_emulated(Float2 x) {
  constexpr float to_whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  x = {fmaxf(x.low, -127.0f), fmaxf(x.high, -127.0f)};
  const Float2 moved = add2(x, Float2{to_whole, to_whole});
  const Float2 whole = add2(moved, Float2{-to_whole, -to_whole});
  const Float2 rest = fma2(whole, Float2{-1.0f, -1.0f}, x);
  Float2 power = fma2(rest, Float2{0.055008933f, 0.055008933f}, Float2{0.24221097f, 0.24221097f});
  power = fma2(rest, power, Float2{0.6932829f, 0.6932829f});
  power = fma2(rest, power, Float2{1.0f, 1.0f});
  return {__uint_as_float(__float_as_uint(power.low) + (__float_as_uint(moved.low) << 23)),
          __uint_as_float(__float_as_uint(power.high) + (__float_as_uint(moved.high) << 23))};
}

// Turns 32 scores into probabilities, as pairs of 16-bit elements. `emulated`: how many exponentials of 16
// do without the MUFU.
template <typename Element, int emulated>
__device__ __forceinline__ void exp2_scores(const float* scores, float scale, Softmax& softmax,
                                            uint32_t (&probs)[16]) {
  Float2 sums[2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const Float2 shifted = fma2(Float2{scores[2 * i], scores[2 * i + 1]}, Float2{scale, scale},
                                Float2{-softmax.row_max, -softmax.row_max});
    const Float2 prob = i * emulated % 16 < emulated
                            ? exp2_emulated(shifted)
                            : Float2{exp2_approximate(shifted.low), exp2_approximate(shifted.high)};
    sums[i % 2] = add2(sums[i % 2], prob);
    probs[i] = pack<Element>(prob.low, prob.high);
  }
  const Float2 sum = add2(sums[0], sums[1]);
  softmax.row_sum += sum.low + sum.high;
}

}  // namespace gna::sm100
