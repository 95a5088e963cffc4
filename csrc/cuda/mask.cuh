// What both architectures need for masks.
#pragma once

#include "tile_scheduler.cuh"

namespace gna::cuda {

// Which of 32 global keys from `first` of a part on are not masked, as bits. One warp.
__device__ __forceinline__ uint32_t global_bitmask_word(const Params& params, int batch, int part,
                                                        int first) {
  const Problem& problem = params.problem;
  const int token = first + static_cast<int>(threadIdx.x % 32);
  const int before = part == suffix_part ? problem.prefix : 0;
  bool visible = token < part_tokens(problem, part);
  if (visible && params.key_mask != nullptr)
    visible = params.key_mask[batch * params.key_mask_batch_stride +
                              (before + token) * params.key_mask_token_stride] != 0;
  return __ballot_sync(full_warp, visible);
}

}  // namespace gna::cuda
