// What the kernels share: the records that a block's warps hand on to one another, the warp that works
// them out, and the way to the tensors.
//
// A query tile has 2^log2_rows rows in two halves. One warp works out the next query tile (geometry,
// and what each row sees); one walks its key tiles and judges them for both halves of the rows; who
// computes finds all decisions in shared memory.
#pragma once

#include "params.h"
#include "pipeline.cuh"
#include "ptx.cuh"

namespace gna::cuda {

// What those who compute need to know of a key tile. Bits of `flags`, for half h of the rows:
// 4 h + a says that axis a needs a mask, 4 h + 3 that no row sees any key.
struct KeyRecord {
  int32_t at[max_axes];
  uint32_t flags;
};

constexpr uint32_t half_bits = 4;
constexpr uint32_t axes_masked = 7;
constexpr uint32_t skipped = 8;
constexpr uint32_t part_shift = 8;  // two bits: the tile's part
constexpr uint32_t globals_masked = 1 << 10;
constexpr uint32_t last_tile = 1 << 11;  // bits from 12 on are for the kernels' own use

// A query tile, worked out ahead of those who load for it and compute it.
template <int log2_rows>
struct WorkRecord {
  QueryTile tile;
  RowsAxis halves[2][max_axes];
  bool has_rows[2];  // by half
  int32_t batch, head;
  bool done;  // no more work
  // By coordinate in the box, axis after axis: the keys that a query sees. The extents' product is
  // 2^log2_rows, so they add up to at most two more.
  Range sees[(1 << log2_rows) + 2];
};

// Planning ----------------------------------------------------------------------------------------

// One warp; false if the tile is empty.
template <int log2_rows>
__device__ __forceinline__ bool plan_tile(const Parameters& parameters, WorkRecord<log2_rows>& work,
                                          int head, int index) {
  const Problem& problem = parameters.problem;
  const int lane = threadIdx.x % 32;
  QueryTile& tile = work.tile;
  const int globals = global_query_tiles(problem);
  const int in_prefix = tiles_of(problem.prefix, log2_rows);
  const bool of_grid = index >= globals;
  if (lane == 0) {
    work.batch = head / parameters.heads;
    work.head = head % parameters.heads;
    work.done = false;
    tile.part = of_grid ? grid_part : index < in_prefix ? prefix_part : suffix_part;
    tile.first = (index < in_prefix ? index : index - in_prefix) << log2_rows;
  }
  // One axis a lane.
  bool empty = false;
  if (lane < max_axes) {
    tile.axes[lane] = of_grid ? query_axis(problem, lane, place_along(problem, lane, index - globals))
                              : whole_axis(problem, lane);
    empty = tile.axes[lane].queries.begin >= tile.axes[lane].queries.end;
  }
  __syncwarp();
  if (__any_sync(full_warp, empty)) return false;
  // One axis of one half a lane.
  bool sees_any = true;
  if (lane < 2 * max_axes) {
    const int half = lane / max_axes, a = lane % max_axes;
    const RowsAxis rows = rows_axis(problem, tile, a, half << (log2_rows - 1), log2_rows - 1);
    work.halves[half][a] = rows;
    sees_any = rows.sees.begin < rows.sees.end;
  }
  const uint32_t blind = ~__ballot_sync(full_warp, sees_any);
  if (lane < 2) work.has_rows[lane] = (blind >> (max_axes * lane) & 7) == 0;
  int start = 0;
#pragma unroll 1
  for (int a = 0; a < max_axes; ++a) {
    const int extent = 1 << problem.axes[a].log2_query;
    const QueryAxis& axis = tile.axes[a];
#pragma unroll 1
    for (int at = lane; at < extent; at += 32) {
      // A row outside the grid is computed like the last one inside, and not stored.
      const int query = smaller(axis.queries.begin + at, axis.axis.length - 1);
      work.sees[start + at] = of_grid ? keys_of(axis.axis, query) : axis.keys;
    }
    start += extent;
  }
  __syncwarp();
  return true;
}

// One warp: all query tiles of this block. Those of global tokens, which are the longest, of all heads
// come first; then it goes head by head, so that keys stay in the cache.
template <int slots, int log2_rows>
__device__ __forceinline__ void plan(const Parameters& parameters, WorkRecord<log2_rows>* records,
                                     const Pipeline& works) {
  const int globals = global_query_tiles(parameters.problem);
  const int grids = grid_query_tiles(parameters.problem);
  const int heads = parameters.batch * parameters.heads;
  PipelineState<slots> slot;
  for (int index = blockIdx.x; index < (globals + grids) * heads; index += gridDim.x) {
    const bool global = index < globals * heads;
    const int place = global ? index : index - globals * heads;
    const int head = place / (global ? globals : grids);
    const int tile = place - head * (global ? globals : grids) + (global ? 0 : globals);
    wait(works.empty + slot.stage(), slot.phase() ^ 1);
    if (!plan_tile(parameters, records[slot.stage()], head, tile)) continue;
    if (threadIdx.x % 32 == 0) arrive(works.full + slot.stage());
    slot.advance();
  }
  wait(works.empty + slot.stage(), slot.phase() ^ 1);
  if (threadIdx.x % 32 == 0) {
    records[slot.stage()].done = true;
    arrive(works.full + slot.stage());
  }
}

// The flags of a key tile but for last_tile and the kernels' own. One warp, whose lane 4 h + a has axis a of half h of the
// rows.
template <int log2_rows>
__device__ __forceinline__ uint32_t judge(const Parameters& parameters,
                                          const WorkRecord<log2_rows>& work, const RowsAxis& rows,
                                          int log2_extent, const KeyTile& tile) {
  if (tile.part != grid_part) {
    const bool masked = parameters.key_mask != nullptr ||
                        tile.at[2] + key_rows > part_tokens(parameters.problem, tile.part);
    return (masked ? globals_masked : 0) | (work.has_rows[0] ? 0 : skipped) |
           (work.has_rows[1] ? 0 : skipped << half_bits) |
           static_cast<uint32_t>(tile.part) << part_shift;
  }
  const int axis = threadIdx.x % 4;
  const int at = axis == 0 ? tile.at[0] : axis == 1 ? tile.at[1] : tile.at[2];
  const uint32_t missed = ~__ballot_sync(full_warp, meets(rows, at, log2_extent));
  const uint32_t masked = ~__ballot_sync(full_warp, is_interior(rows, at, log2_extent));
  return (masked & (axes_masked | axes_masked << half_bits)) | (missed & axes_masked ? skipped : 0) |
         (missed >> half_bits & axes_masked ? skipped << half_bits : 0);
}

// The coordinate in the grid of a position in the dilation group.
__device__ __forceinline__ int token_of(const QueryAxis& axis, int position) {
  return axis.group + axis.step * position;
}

}  // namespace gna::cuda
