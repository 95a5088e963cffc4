// The shapes of the Blackwell kernel, its shared memory, its barriers and its tensor memory.
#pragma once

#include "../cuda/nonfinite.cuh"
#include "../cuda/tile_scheduler.cuh"

namespace gna::sm100 {

using namespace gna::cuda;

constexpr int log2_tile = 8;  // rows of a query tile
constexpr int log2_half = 7;
constexpr int half_rows = 1 << log2_half;

// Warps by role: four for the softmax of each half, four for the output, then one each.
constexpr int output_warp = 8;
constexpr int multiply_warp = 12;
constexpr int load_warp = 13;
constexpr int plan_warp = 14;

using WorkRecord = gna::cuda::WorkRecord<log2_tile>;

constexpr uint32_t no_more_work = 1 << 12;  // in the flags of a key record

// Tensor memory, in columns: scores of both halves, outputs of both halves. The weights, two in a
// column, take the place of their scores.
constexpr int tensor_columns = 512;
GNA_HD constexpr uint32_t scores_column(int half) { return 128 * half; }
GNA_HD constexpr uint32_t output_column(int half) { return 256 + 128 * half; }

// What the softmax of a row ends with: the weights are 2^(scaled score - offset), and add up to `sum`.
struct Statistics {
  float offset, sum;
};

// Barriers and small things of a block in shared memory. docs/blackwell.md has a table of who arrives
// at which barrier and who waits.
template <int head_dim>
struct alignas(1024) Shared {
  static constexpr int boxes = head_dim / box_columns;
  static constexpr int tile_bytes = boxes * key_box_bytes;
  static constexpr int stages = head_dim == 128 ? 4 : 8;  // keys and values by turns
  static constexpr int records = 4;
  static constexpr int work_slots = 2;
  static constexpr int staged_boxes = head_dim == 128 ? 1 : 2;  // of output, on their way out

  // Of a thread by role, 65536 in all: who softens, who finishes, the others.
  static constexpr int soften_registers = head_dim == 64 ? 208 : 200;
  static constexpr int finish_registers = head_dim == 64 ? 56 : 64;
  static constexpr int other_registers = head_dim == 64 ? 40 : 48;
  static_assert(128 * (2 * soften_registers + finish_registers + other_registers) <= 65536);

  uint8_t query[2][tile_bytes];
  uint8_t tiles[stages][tile_bytes];
  uint8_t output[staged_boxes][half_rows * row_bytes];

  uint64_t query_full, query_empty;
  uint64_t tiles_full[stages], tiles_empty[stages];
  uint64_t records_full[records], records_empty[records];
  uint64_t works_full[work_slots], works_empty[work_slots];
  // By half.
  uint64_t scores_full[2];
  uint64_t weights_full[2], last_weights_full[2];  // three quarters of them, the rest
  uint64_t output_full[2], output_empty[2];
  uint64_t statistics_full[2], statistics_empty[2];
  // Only for computing carefully. Who multiplies passes on that values are there, and so is never more
  // than a tile behind who cleans them.
  uint64_t values_full;
  uint64_t clean_full, clean_empty;

  alignas(16) KeyRecord key_records[records];
  WorkRecord work_records[work_slots];
  Statistics statistics[2][half_rows];
  NonFinite<head_dim> non_finite;
  uint32_t tensor_memory;
};

template <int head_dim>
constexpr int shared_bytes = sizeof(Shared<head_dim>);
static_assert(shared_bytes<64> <= 227 * 1024 && shared_bytes<128> <= 227 * 1024);
static_assert(output_column(1) + 128 <= tensor_columns && tensor_columns <= 512);

}  // namespace gna::sm100
