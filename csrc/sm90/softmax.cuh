// The online softmax of a 64x128 tile of scores, whose accumulators a warpgroup holds in its registers;
// mask.cuh has their layout.
//
// The row_max of a row is the largest of the first scores that are not masked, and is updated only when a
// probability becomes very large. So between scores and probabilities there is only a fused multiply-add
// and an exponential: no maximum, and no reduction over the lanes of a row. A probability that is too
// large shows in its sum; the scores are then recovered from the probabilities.
#pragma once

#include "../cuda/softmax.cuh"
#include "shared_storage.cuh"

namespace gna::sm90 {

// If 32 probabilities add up to this, one of them is at least 2^rescale_threshold. If their sum is below
// it, their type can hold them all.
template <typename Element>
constexpr float sum_threshold = std::is_same_v<Element, __half> ? 0x1p15f : 0x1p35f;

// The softmax of the two rows of a thread.
struct Softmax {
  float row_max[2];     // a reference, see ../cuda/softmax.cuh
  bool has_row_max[2];  // false until a row has a score that is not masked
  float row_sum[2];     // of the probabilities in this thread's columns

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = row_sum[r] = 0.0f;
      has_row_max[r] = false;
    }
  }
};

// Combines both rows' values over the four lanes of a row.
template <typename Combine>
__device__ __forceinline__ void row_reduce(float (&x)[2], Combine combine) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = combine(x[r], __shfl_xor_sync(full_warp, x[r], distance));
}

// Multiplies the rows of an accumulator.
template <int n>
__device__ __forceinline__ void rescale_rows(float (&accumulator)[n], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < n; ++i) accumulator[i] *= by[(i / 2) % 2];
}

__device__ __forceinline__ void scale_subtract_row_max(float (&scores)[64], const Softmax& softmax,
                                                       float scale_log2) {
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] = fmaf(scores[i], scale_log2, -softmax.row_max[i / 2 % 2]);
}

__device__ __forceinline__ bool all_have_row_max(const Softmax& softmax) {
  return __all_sync(full_warp, softmax.has_row_max[0] && softmax.has_row_max[1]);
}

// Updates row_max to the row's largest score where that lies at least `threshold` above it, and subtracts
// the difference from the scores. Earlier probabilities are to be multiplied by `rescale`.
__device__ __forceinline__ void update_row_max(float (&scores)[64], Softmax& softmax, float threshold,
                                               float (&rescale)[2]) {
  float largest[2] = {-infinity, -infinity};
#pragma unroll
  for (int i = 0; i < 64; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
  row_reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  float by[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // A row whose scores are all masked keeps waiting for its first one.
    const bool first = !softmax.has_row_max[r];
    const bool updates = first ? largest[r] != -infinity : largest[r] >= threshold;
    by[r] = updates ? largest[r] : 0.0f;
    rescale[r] = first ? 1.0f : exp2_approximate(-by[r]);
    softmax.row_max[r] += by[r];
    softmax.has_row_max[r] |= updates;
    softmax.row_sum[r] *= rescale[r];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] -= by[i / 2 % 2];
}

// Turns scores, less their row_max, into probabilities: in place, and as 16-bit operands of an MMA in the
// same layout. `sum`: of this thread's, by row.
template <typename Element>
__device__ __forceinline__ void exp2_scores(float (&scores)[64], uint32_t (&probs)[32],
                                            float (&sum)[2]) {
  constexpr int part = 8;
  float sums[2][2] = {};
  // What follows from the exponentials of one part comes after those of the next.
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
        probs[i / 2] = pack<Element>(scores[i], scores[i + 1]);
      }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] = sums[r][0] + sums[r][1];
}

// Whether a row of the warp has probabilities for which its row_max must be updated.
template <typename Element>
__device__ __forceinline__ bool exceeds_threshold(const float (&sum)[2]) {
  return __any_sync(full_warp, fmaxf(sum[0], sum[1]) >= sum_threshold<Element>);
}

// Undoes exp2_scores. A probability that is infinite stays so, and shows in the output.
__device__ __forceinline__ void recover_scores(float (&scores)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) scores[i] = log2_approximate(scores[i]);
}

// exp2_scores after update_row_max, which rescales `output` too.
template <typename Element, int n>
__device__ __forceinline__ void update_row_max_and_exp2(float (&scores)[64], Softmax& softmax,
                                                        float (&output)[n], uint32_t (&probs)[32],
                                                        float (&sum)[2]) {
  float rescale[2];
  update_row_max(scores, softmax, rescale_threshold<Element>, rescale);
  rescale_rows(output, rescale);
  exp2_scores<Element>(scores, probs, sum);
}

}  // namespace gna::sm90
