// The static persistent tile scheduler: which query tiles a block works on, and what its warps must know
// of a query tile and of each of its key tiles.
//
// A query tile has 2^log2_tile_m rows in two halves. The scheduler's warp prepares the next query tile:
// its geometry, and which keys each row attends to. A producer warp walks the key tiles and classifies
// them for both halves (full, partial or skipped). The consumers find all decisions in shared memory.
#pragma once

#include "params.h"
#include "pipeline.cuh"

namespace gna::cuda {

// What consumers need to know of a key tile. Bits of `flags`, for half h of the rows: 4 h + a says that
// the tile is partial along axis a and needs a mask there, 4 h + 3 that no row attends to any key.
struct KeyTileInfo {
  int32_t at[max_axes];
  uint32_t flags;
};

constexpr uint32_t half_bits = 4;
constexpr uint32_t axes_masked = 7;
constexpr uint32_t skipped = 8;
constexpr uint32_t part_shift = 8;  // two bits: the tile's part
constexpr uint32_t globals_masked = 1 << 10;
constexpr uint32_t last_tile = 1 << 11;  // bits from 12 on belong to the architectures

// The axes along which a half needs a mask of a tile.
__device__ __forceinline__ uint32_t masked_axes(uint32_t flags, int half) {
  return flags >> (half * half_bits) & axes_masked;
}

__device__ __forceinline__ uint32_t part_of(const KeyTileInfo& tile) {
  return tile.flags >> part_shift & 3;
}

// A query tile of a batch entry and a head.
template <int log2_tile_m>
struct WorkTileInfo {
  QueryTile tile;
  RowsAxis halves[2][max_axes];
  bool has_rows[2];  // by half
  int32_t batch, head;
  bool is_end;  // there is no more work
  // By coordinate in the box, axis after axis: the keys that a query attends to. The extents' product is
  // 2^log2_tile_m, so they add up to at most two more.
  Range attended[(1 << log2_tile_m) + 2];
};

// One warp. False if the tile is empty.
template <int log2_tile_m>
__device__ __forceinline__ bool make_work_tile(const Params& params, WorkTileInfo<log2_tile_m>& work,
                                               int head, int index) {
  const Problem& problem = params.problem;
  const int lane = threadIdx.x % 32;
  QueryTile& tile = work.tile;
  const QueryTileIndex decoded(problem, index, log2_tile_m);
  if (lane == 0) {
    work.batch = head / params.heads;
    work.head = head % params.heads;
    work.is_end = false;
    tile.part = decoded.part();
    tile.first = decoded.first();
  }
  // One axis a lane.
  bool empty = false;
  if (lane < max_axes) {
    tile.axes[lane] = decoded.axis(problem, lane);
    empty = is_empty(tile.axes[lane]);
  }
  __syncwarp();
  if (__any_sync(full_warp, empty)) return false;
  // One axis of one half a lane.
  bool has_keys = true;
  if (lane < 2 * max_axes) {
    const int half = lane / max_axes, a = lane % max_axes;
    const RowsAxis rows = rows_axis(problem, tile, a, half << (log2_tile_m - 1), log2_tile_m - 1);
    work.halves[half][a] = rows;
    has_keys = rows.any.begin < rows.any.end;
  }
  const uint32_t without_keys = ~__ballot_sync(full_warp, has_keys);
  if (lane < 2) work.has_rows[lane] = (without_keys >> (max_axes * lane) & 7) == 0;
  int start = 0;
#pragma unroll 1
  for (int a = 0; a < max_axes; ++a) {
    const int extent = 1 << problem.axes[a].log2_query;
    const QueryAxis& axis = tile.axes[a];
#pragma unroll 1
    for (int at = lane; at < extent; at += 32) {
      // A row outside the grid is computed like the last one inside, and not stored.
      const int query = smaller(axis.queries.begin + at, axis.axis.length - 1);
      work.attended[start + at] = decoded.is_of_grid() ? keys_of(axis.axis, query) : axis.keys;
    }
    start += extent;
  }
  __syncwarp();
  return true;
}

// One warp: produces all query tiles of this block. Those of global tokens of all heads, which are the
// longest, come first: as many as `params.global_tiles` says. The grid's follow head by head, so that keys
// stay in the L2 cache.
template <int stages, int log2_tile_m>
__device__ __forceinline__ void schedule_work_tiles(const Params& params,
                                                    WorkTileInfo<log2_tile_m>* work_tiles,
                                                    const Pipeline<stages>& pipeline) {
  const int globals = params.global_tiles.end - params.global_tiles.begin;
  const int first_of_grid = global_query_tiles(params.problem);
  const int grids = grid_query_tiles(params.problem);
  const int heads = params.batch * params.heads;
  PipelineState<stages> state;
  for (int index = blockIdx.x; index < (globals + grids) * heads; index += gridDim.x) {
    const bool global = index < globals * heads;
    const int place = global ? index : index - globals * heads;
    const int head = place / (global ? globals : grids);
    const int tile = place - head * (global ? globals : grids) +
                     (global ? params.global_tiles.begin : first_of_grid);
    pipeline.producer_acquire(state);
    if (!make_work_tile(params, work_tiles[state.index()], head, tile)) continue;
    if (threadIdx.x % 32 == 0) pipeline.producer_commit(state);
    state.advance();
  }
  pipeline.producer_acquire(state);
  if (threadIdx.x % 32 == 0) {
    work_tiles[state.index()].is_end = true;
    pipeline.producer_commit(state);
  }
}

// The flags of a key tile, but for last_tile and the architecture's own. One warp: lane 4 h + a
// classifies axis a for half h of the rows, of which `rows` tells.
template <int log2_tile_m>
__device__ __forceinline__ uint32_t classify_key_tile(const Params& params,
                                                      const WorkTileInfo<log2_tile_m>& work,
                                                      const RowsAxis& rows, int log2_extent,
                                                      const KeyTile& tile) {
  if (tile.part != grid_part) {
    const bool masked =
        params.key_mask != nullptr || tile.at[2] + tile_n > part_tokens(params.problem, tile.part);
    return (masked ? globals_masked : 0) | (work.has_rows[0] ? 0 : skipped) |
           (work.has_rows[1] ? 0 : skipped << half_bits) |
           static_cast<uint32_t>(tile.part) << part_shift;
  }
  const int axis = threadIdx.x % 4;
  const int at = axis == 0 ? tile.at[0] : axis == 1 ? tile.at[1] : tile.at[2];
  const uint32_t missed = ~__ballot_sync(full_warp, overlaps(rows, at, log2_extent));
  const uint32_t masked = ~__ballot_sync(full_warp, is_full(rows, at, log2_extent));
  return (masked & (axes_masked | axes_masked << half_bits)) | (missed & axes_masked ? skipped : 0) |
         (missed >> half_bits & axes_masked ? skipped << half_bits : 0);
}

// The coordinate in the grid of a position in the dilation group.
__device__ __forceinline__ int token_of(const QueryAxis& axis, int position) {
  return axis.group + axis.step * position;
}

}  // namespace gna::cuda
