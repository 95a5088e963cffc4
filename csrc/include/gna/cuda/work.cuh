// What the kernels share: the records that a block's warps hand on to one another, the warp that works
// them out, and the way to the tensors.
//
// A query tile has 2^log2_rows rows in two halves. One warp works out the next query tile (geometry,
// and what each row sees); one walks its key tiles and judges them for both halves of the rows; who
// computes finds all decisions in shared memory.
#pragma once

#include "gna/cuda/parameters.h"
#include "gna/cuda/ptx.cuh"

namespace gna::cuda {

// Barriers of a ring of buffers: `full` when filled, `empty` when all its readers have released it.
struct Ring {
  uint64_t* full;
  uint64_t* empty;
};

// A count of buffers used so far of a ring of `stages`.
template <int stages>
struct Place {
  uint32_t count = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(count % stages); }
  __device__ __forceinline__ uint32_t parity() const { return count / stages & 1; }
  __device__ __forceinline__ void advance(int by = 1) { count += by; }
  __device__ __forceinline__ Place next() const { return {count + 1}; }
};

// This warp is done with a buffer.
__device__ __forceinline__ void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) arrive(empty);
}

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
                                     const Ring& works) {
  const int globals = global_query_tiles(parameters.problem);
  const int grids = grid_query_tiles(parameters.problem);
  const int heads = parameters.batch * parameters.heads;
  Place<slots> slot;
  for (int index = blockIdx.x; index < (globals + grids) * heads; index += gridDim.x) {
    const bool global = index < globals * heads;
    const int place = global ? index : index - globals * heads;
    const int head = place / (global ? globals : grids);
    const int tile = place - head * (global ? globals : grids) + (global ? 0 : globals);
    wait(works.empty + slot.stage(), slot.parity() ^ 1);
    if (!plan_tile(parameters, records[slot.stage()], head, tile)) continue;
    if (threadIdx.x % 32 == 0) arrive(works.full + slot.stage());
    slot.advance();
  }
  wait(works.empty + slot.stage(), slot.parity() ^ 1);
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

// Tensors -----------------------------------------------------------------------------------------

__device__ __forceinline__ int plane_of(const Maps& maps, int batch, int head) {
  return maps.planes.per_batch * batch + maps.planes.per_head * head;
}

// The coordinate in the grid of a position in the dilation group.
__device__ __forceinline__ int token_of(const QueryAxis& axis, int position) {
  return axis.group + axis.step * position;
}

// Where the rows of a query tile from `row` on begin in the map of its part.
template <int log2_rows>
__device__ __forceinline__ void place_of_rows(const Problem& problem,
                                              const WorkRecord<log2_rows>& work, int row,
                                              int (&at)[max_axes]) {
  const QueryTile& tile = work.tile;
  at[0] = at[1] = 0;
  at[2] = tile.first + row;
  if (tile.part == grid_part)
    for (int a = 0; a < max_axes; ++a)
      at[a] = token_of(tile.axes[a], tile.axes[a].queries.begin + row_coordinate(problem, row, a));
}

// Has a tile of `boxes` times 64 columns loaded. One thread.
template <int boxes, int bytes>
__device__ __forceinline__ void load_tile(const CUtensorMap& map, int plane, uint64_t* full,
                                          uint8_t* to, int w, int h, int t) {
#pragma unroll
  for (int box = 0; box < boxes; ++box)
    load_box(map, full, to + box * (bytes / boxes), box * box_columns, w, h, t, plane);
}

// Has a tile of keys or values loaded. One thread.
template <int boxes, int log2_rows>
__device__ __forceinline__ void load_keys(const Parameters& parameters, const Maps& maps,
                                          const WorkRecord<log2_rows>& work, const KeyTile& tile,
                                          uint64_t* full, uint8_t* to) {
  constexpr int bytes = boxes * key_box_bytes;
  const int plane = plane_of(maps, work.batch, work.head / parameters.heads_per_kv_head);
  arrive_expecting(full, bytes);
  if (tile.part != grid_part) {
    load_tile<boxes, bytes>(maps.of_part[tile.part], plane, full, to, tile.at[2], 0, 0);
    return;
  }
  const QueryTile& query = work.tile;
  load_tile<boxes, bytes>(query.part == grid_part ? maps.of_part[grid_part] : maps.undilated, plane,
                          full, to, token_of(query.axes[2], tile.at[2]),
                          token_of(query.axes[1], tile.at[1]), token_of(query.axes[0], tile.at[0]));
}

// offset, sum: the weights are 2^(scaled score - offset), and add up to this.
template <int log2_rows>
__device__ __forceinline__ void store_logsumexp(const Parameters& parameters,
                                                const WorkRecord<log2_rows>& work, int row,
                                                float offset, float sum) {
  const Problem& problem = parameters.problem;
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
  const int64_t head = static_cast<int64_t>(work.batch) * parameters.heads + work.head;
  parameters.logsumexp[head * tokens + token] =
      sum == 0.0f ? -__builtin_huge_valf() : (offset + __log2f(sum)) * log_2;
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
