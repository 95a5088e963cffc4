// The Tensor Memory Accelerator (TMA): boxes of tensors to and from shared memory.
//
// PTX ISA, section "cp.async.bulk.tensor".
#pragma once

#include "tile_scheduler.cuh"

namespace gna::cuda {

// Instructions ------------------------------------------------------------------------------------

// Copies one box to shared memory; tokens outside the tensor arrive as zeros.
__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t* barrier, void* to, int c0,
                                         int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Copies one box to global memory; tokens outside the tensor are left out.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const void* from, int c0, int c1,
                                          int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
          &map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all stores but the last `pending` committed groups of them have read shared memory.
template <int pending = 0>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Tiles -------------------------------------------------------------------------------------------

__device__ __forceinline__ int plane_of(const Maps& maps, int batch, int head) {
  return maps.planes.per_batch * batch + maps.planes.per_head * head;
}

// Where the rows of a query tile from `row` on begin in the tensor map of its part.
template <int log2_tile_m>
__device__ __forceinline__ void coordinates_of_rows(const Problem& problem,
                                                    const WorkTileInfo<log2_tile_m>& work, int row,
                                                    int (&at)[max_axes]) {
  const QueryTile& tile = work.tile;
  at[0] = at[1] = 0;
  at[2] = tile.first + row;
  if (tile.part == grid_part)
    for (int a = 0; a < max_axes; ++a)
      at[a] = token_of(tile.axes[a], tile.axes[a].queries.begin + row_coordinate(problem, row, a));
}

// Loads a tile of `boxes` times 64 columns. One thread.
template <int boxes, int bytes>
__device__ __forceinline__ void load_tile(const CUtensorMap& map, int plane, uint64_t* full,
                                          uint8_t* to, int w, int h, int t) {
#pragma unroll
  for (int box = 0; box < boxes; ++box)
    tma_load(map, full, to + box * (bytes / boxes), box * box_columns, w, h, t, plane);
}

// Loads a tile of keys or values; `full` gets the bytes. One thread.
template <int boxes, int log2_tile_m>
__device__ __forceinline__ void load_keys(const Params& params, const Maps& maps,
                                          const WorkTileInfo<log2_tile_m>& work, const KeyTile& tile,
                                          uint64_t* full, uint8_t* to) {
  constexpr int bytes = boxes * key_box_bytes;
  const int plane = plane_of(maps, work.batch, work.head / params.heads_per_kv_head);
  mbarrier_arrive_and_expect_tx(full, bytes);
  if (tile.part != grid_part) {
    load_tile<boxes, bytes>(maps.of_part[tile.part], plane, full, to, tile.at[2], 0, 0);
    return;
  }
  const QueryTile& query = work.tile;
  load_tile<boxes, bytes>(query.part == grid_part ? maps.of_part[grid_part] : maps.undilated, plane,
                          full, to, token_of(query.axes[2], tile.at[2]),
                          token_of(query.axes[1], tile.at[1]), token_of(query.axes[0], tile.at[0]));
}

}  // namespace gna::cuda
