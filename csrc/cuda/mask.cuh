// What both kernels need for masks.
#pragma once

#include "tile_scheduler.cuh"

namespace gna::cuda {

// The visible ones of 32 global keys from `first` of a part on, as bits. One warp.
__device__ __forceinline__ uint32_t global_word(const Parameters& parameters, int batch, int part,
                                                int first) {
  const Problem& problem = parameters.problem;
  const int token = first + static_cast<int>(threadIdx.x % 32);
  const int before = part == suffix_part ? problem.prefix : 0;
  bool visible = token < part_tokens(problem, part);
  if (visible && parameters.key_mask != nullptr)
    visible = parameters.key_mask[batch * parameters.key_mask_batch_stride +
                                  (before + token) * parameters.key_mask_token_stride] != 0;
  return __ballot_sync(full_warp, visible);
}

}  // namespace gna::cuda
