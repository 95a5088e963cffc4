// What both kernels need to compute carefully.
//
// A weight of zero does not hide a value that is not finite. Where such values show in the output, a
// second launch does all work again: it takes them out of each tile of values, and adds them to the rows
// that see them.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace gna::cuda {

constexpr float infinity = __builtin_huge_valf();

// Where a tile of values has what is not finite: by column, the keys, 32 a word.
template <int head_dim>
struct NonFinite {
  uint32_t nan[4][head_dim], plus[4][head_dim], minus[4][head_dim];
};

// Zeroes what is not finite in a tile of values and notes where it was; whether there was any. `thread`:
// of `threads`.
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
      auto* const value =
          reinterpret_cast<uint16_t*>(box + key * row_bytes + chunk * 16) + column % 8;
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
  fence_shared_for_copies();
  return found;
}

// Doing it again ----------------------------------------------------------------------------------
//
// Launches whose output is in doubt, and how many blocks have done it again. A slot is shared by every
// 4096th launch, which do not run at the same time.
constexpr uint32_t redo_slots = 4096;
static __device__ uint32_t must_redo[redo_slots];
static __device__ uint32_t blocks_done[redo_slots];

__device__ __forceinline__ void demand_redo(const Parameters& parameters) {
  must_redo[parameters.launch % redo_slots] = parameters.launch;
}

__device__ __forceinline__ bool redo_is_demanded(const Parameters& parameters) {
  const volatile uint32_t& redo = must_redo[parameters.launch % redo_slots];
  return redo == parameters.launch;
}

// The last block leaves the slot as it was, for a launch that a CUDA graph repeats.
__device__ __forceinline__ void end_redo(const Parameters& parameters) {
  __syncthreads();
  const uint32_t slot = parameters.launch % redo_slots;
  if (threadIdx.x == 0 && atomicAdd(&blocks_done[slot], 1u) + 1 == gridDim.x) {
    blocks_done[slot] = 0;
    const_cast<volatile uint32_t&>(must_redo[slot]) = 0;
  }
}

}  // namespace gna::cuda
