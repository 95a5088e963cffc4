// The fallback kernel, which is safe for values that are not finite.
//
// A masked key has probability zero, but zero times a value that is not finite is NaN. Where the output of
// the fast kernel shows that, it requests the fallback: a second launch, which otherwise ends at once,
// does all work again. The fallback takes what is not finite out of each tile of values, and adds it to
// the rows that attend to it.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace gna::cuda {

// Where a tile of values is not finite: a bitmask of keys for each column, 32 keys a word.
template <int head_dim>
struct NonFinite {
  uint32_t nan[4][head_dim], plus[4][head_dim], minus[4][head_dim];
};

// Zeroes what is not finite in a tile of values and notes where it was. Returns whether there was any.
// `thread`: of `threads`.
template <typename Element, int head_dim, int threads>
__device__ __forceinline__ bool take_out_non_finite(uint8_t* tile, int thread,
                                                    NonFinite<head_dim>& non_finite) {
  constexpr uint32_t exponent = std::is_same_v<Element, __half> ? 0x7c00 : 0x7f80;
  constexpr uint32_t sign = 0x8000;
  constexpr int words = 4 * head_dim / threads;  // of a thread
  const int column = thread % head_dim;
  uint8_t* const box = tile + column / box_columns * key_box_bytes;
  bool found = false;
  for (int word = thread / head_dim * words, end = word + words; word < end; ++word) {
    uint32_t nan = 0, plus = 0, minus = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const int key = 32 * word + bit;
      const int chunk = column % box_columns / 8 ^ key % 8;
      auto* const value = reinterpret_cast<uint16_t*>(box + key * row_bytes + chunk * 16) + column % 8;
      const uint32_t bits = *value;
      if ((bits & exponent) != exponent) continue;
      const bool is_nan = (bits & ~sign) != exponent;
      (is_nan ? nan : bits & sign ? minus : plus) |= 1u << bit;
      *value = 0;
      found = true;
    }
    non_finite.nan[word][column] = nan;
    non_finite.plus[word][column] = plus;
    non_finite.minus[word][column] = minus;
  }
  fence_proxy_async();
  return found;
}

// Requests for the fallback, by launch, and how many blocks of it have ended. Every 4096th launch shares a
// slot; such launches do not run at the same time.
constexpr uint32_t fallback_slots = 4096;
static __device__ uint32_t fallback_requests[fallback_slots];
static __device__ uint32_t blocks_done[fallback_slots];

__device__ __forceinline__ void request_fallback(const Params& params) {
  fallback_requests[params.launch % fallback_slots] = params.launch;
}

__device__ __forceinline__ bool fallback_is_requested(const Params& params) {
  const volatile uint32_t& request = fallback_requests[params.launch % fallback_slots];
  return request == params.launch;
}

// The last block leaves the slot as it was, for a launch that a CUDA graph repeats.
__device__ __forceinline__ void end_fallback(const Params& params) {
  __syncthreads();
  const uint32_t slot = params.launch % fallback_slots;
  if (threadIdx.x == 0 && atomicAdd(&blocks_done[slot], 1u) + 1 == gridDim.x) {
    blocks_done[slot] = 0;
    const_cast<volatile uint32_t&>(fallback_requests[slot]) = 0;
  }
}

}  // namespace gna::cuda
