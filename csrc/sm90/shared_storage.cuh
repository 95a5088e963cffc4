// The Hopper kernel's tile shapes, roles, barriers and shared memory.
#pragma once

#include <cstddef>

#include "../cuda/nonfinite.cuh"
#include "../cuda/tile_scheduler.cuh"

namespace gna::sm90 {

using namespace gna::cuda;

constexpr int log2_tile_m = 7;  // of the rows of a query tile
constexpr int tile_m = 1 << log2_tile_m;
constexpr int log2_half = 6;  // of the rows of one consumer warpgroup
constexpr int half_rows = 1 << log2_half;
constexpr int box_bytes = tile_m * row_bytes;
static_assert(box_bytes == key_box_bytes);

// Warpgroup 0 produces; 1 and 2 consume, each a half of the rows.
constexpr int producer_threads = 128;
constexpr int consumer_threads = 128;  // of one consumer
constexpr int consumer_warps = 8;      // of both
constexpr int threads = producer_threads + 2 * consumer_threads;

// Registers of a thread, which setmaxnreg moves from the producer to the consumers.
constexpr int producer_registers = 40;
constexpr int consumer_registers = 232;
static_assert(producer_threads * producer_registers + 2 * consumer_threads * consumer_registers <=
              65536);

// Named barriers; 0 is that of __syncthreads.
enum NamedBarrier : int {
  warp_scheduler_barrier = 1,  // and 2: a consumer's turn to issue MMAs
  epilogue_barrier = 3,        // and 4: within a consumer
  fallback_barrier = 5,        // of both consumers
};

// A flag of KeyTileInfo: a half needs a bitmask, for global keys or because the box of keys has too many
// coordinates for a mask by MMA.
constexpr uint32_t needs_bitmask = 1 << 12;

using WorkTileInfo = gna::cuda::WorkTileInfo<log2_tile_m>;

template <int head_dim>
struct SharedStorage {
  static constexpr int boxes = head_dim / box_columns;
  static constexpr int tile_bytes = boxes * box_bytes;
  static constexpr int stages = head_dim == 128 ? 2 : 4;  // of keys, and of values
  static constexpr int work_stages = 2;

  uint8_t query[tile_bytes];
  uint8_t keys[stages][tile_bytes];
  uint8_t values[stages][tile_bytes];
  uint8_t output[2][boxes][half_rows * row_bytes];  // by consumer
  uint8_t key_coordinates[box_bytes];               // of a key tile, see coordinate_mask.h

  KeyTileInfo key_tiles[stages];

  // Producers: TMA for the first three, the scheduler's warp for the last. Consumers: a warp of each
  // consumer warpgroup; of `work`, also the two warps that load.
  PipelineBarriers<stages> k, v;
  PipelineBarriers<1> q;
  PipelineBarriers<work_stages> work;

  WorkTileInfo work_tiles[work_stages];
  NonFinite<head_dim> non_finite;
};

// 1024 more, to align the rest.
template <int head_dim>
constexpr int shared_bytes = sizeof(SharedStorage<head_dim>) + 1024;
static_assert(shared_bytes<64> <= 227 * 1024 && shared_bytes<128> <= 227 * 1024);

}  // namespace gna::sm90
