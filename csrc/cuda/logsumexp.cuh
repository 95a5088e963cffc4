// The logarithm of the sum of exponentials, an output of both kernels.
#pragma once

#include "tile_scheduler.cuh"

namespace gna::cuda {

// The row's probabilities are 2^(scaled score - row_max), and add up to `sum`.
template <int log2_tile_m>
__device__ __forceinline__ void store_logsumexp(const Params& params,
                                                const WorkTileInfo<log2_tile_m>& work, int row,
                                                float row_max, float sum) {
  const Problem& problem = params.problem;
  const QueryTile& tile = work.tile;
  const int grid_tokens = problem.axes[0].length * problem.axes[1].length * problem.axes[2].length;
  bool inside = true;
  int token = 0;
  if (tile.part == grid_part) {
#pragma unroll
    for (int a = 0; a < max_axes; ++a) {
      const QueryAxis& axis = tile.axes[a];
      const int position = axis.queries.begin + row_coordinate(problem, row, a);
      inside &= position < axis.axis.length;
      token = token * problem.axes[a].length + token_of(axis, position);
    }
    token += problem.prefix;
  } else {
    token = tile.first + row;
    inside = token < part_tokens(problem, tile.part);
    token += tile.part == suffix_part ? problem.prefix + grid_tokens : 0;
  }
  if (!inside) return;
  constexpr float log_2 = 0.6931471805599453f;
  const int64_t tokens = static_cast<int64_t>(problem.prefix) + grid_tokens + problem.suffix;
  const int64_t head = static_cast<int64_t>(work.batch) * params.heads + work.head;
  params.logsumexp[head * tokens + token] =
      sum == 0.0f ? -__builtin_huge_valf() : (row_max + __log2f(sum)) * log_2;
}

}  // namespace gna::cuda
