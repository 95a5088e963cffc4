// The Blackwell kernel's tile shapes, roles, barriers, shared memory and tensor memory.
#pragma once

#include "../cuda/nonfinite.cuh"
#include "../cuda/tile_scheduler.cuh"

namespace gna::sm100 {

using namespace gna::cuda;

constexpr int log2_tile_m = 8;  // of the rows of a query tile
constexpr int log2_half = 7;
constexpr int half_rows = 1 << log2_half;
constexpr int threads = 512;

// Warps by role: four for the softmax of each half, four for the epilogue, then one each.
constexpr int epilogue_warp = 8;
constexpr int mma_warp = 12;
constexpr int load_warp = 13;
constexpr int scheduler_warp = 14;

constexpr int softmax_warps = 8;  // of both halves
constexpr int epilogue_warps = 4;
constexpr int epilogue_threads = 32 * epilogue_warps;

// Named barriers; 0 is that of __syncthreads.
enum NamedBarrier : int { epilogue_barrier = 1 };

using WorkTileInfo = gna::cuda::WorkTileInfo<log2_tile_m>;

constexpr uint32_t no_more_tiles = 1 << 12;  // a flag of KeyTileInfo

// Tensor memory, in columns: S of both halves, O of both halves. P, two elements a column, takes the place
// of its S.
constexpr int tmem_columns = 512;
GNA_HD constexpr uint32_t scores_column(int half) { return 128 * half; }
GNA_HD constexpr uint32_t output_column(int half) { return 256 + 128 * half; }

// What the softmax of a row ends with: its probabilities are 2^(scaled score - max), and add up to `sum`.
struct RowStats {
  float max, sum;
};

// docs/blackwell.md has a table of who arrives at which barrier and who waits.
template <int head_dim>
struct alignas(1024) SharedStorage {
  static constexpr int boxes = head_dim / box_columns;
  static constexpr int tile_bytes = boxes * key_box_bytes;
  static constexpr int stages = head_dim == 128 ? 4 : 8;  // of keys and values, by turns
  static constexpr int key_tile_stages = 4;
  static constexpr int work_stages = 2;
  static constexpr int output_stages = head_dim == 128 ? 1 : 2;  // boxes of output on their way out

  // Registers of a thread by role, 65536 in all.
  static constexpr int softmax_registers = head_dim == 64 ? 208 : 200;
  static constexpr int epilogue_registers = head_dim == 64 ? 56 : 64;
  static constexpr int other_registers = head_dim == 64 ? 40 : 48;
  static_assert(128 * (2 * softmax_registers + epilogue_registers + other_registers) <= 65536);

  uint8_t query[2][tile_bytes];  // by half
  uint8_t tiles[stages][tile_bytes];
  uint8_t output[output_stages][half_rows * row_bytes];

  PipelineBarriers<1> q;
  PipelineBarriers<stages> kv;
  PipelineBarriers<key_tile_stages> key_tile_info;
  PipelineBarriers<work_stages> work;
  // By half.
  uint64_t scores_full[2];
  uint64_t probs_full[2], last_probs_full[2];  // three quarters of them, the rest
  uint64_t output_full[2], output_empty[2];
  uint64_t row_stats_full[2], row_stats_empty[2];
  // Only of the fallback. The MMA warp passes on that values are there, and so is never more than a tile
  // behind the warps that clean them.
  uint64_t v_full;
  uint64_t v_clean_full, v_clean_empty;

  alignas(16) KeyTileInfo key_tiles[key_tile_stages];
  WorkTileInfo work_tiles[work_stages];
  RowStats row_stats[2][half_rows];
  NonFinite<head_dim> non_finite;
  uint32_t tmem;  // its address
};

template <int head_dim>
constexpr int shared_bytes = sizeof(SharedStorage<head_dim>);
static_assert(shared_bytes<64> <= 227 * 1024 && shared_bytes<128> <= 227 * 1024);
static_assert(output_column(1) + 128 <= tmem_columns && tmem_columns <= 512);

}  // namespace gna::sm100
