// The shapes of the Hopper kernel.
#pragma once

#include "../cuda/nonfinite.cuh"
#include "../cuda/tile_scheduler.cuh"

namespace gna::sm90 {

using namespace gna::cuda;

constexpr int log2_tile = 7;  // rows of a query tile
constexpr int tile_rows = 1 << log2_tile;
constexpr int log2_half = 6;  // query rows of one consumer warpgroup
constexpr int half_rows = 1 << log2_half;
constexpr int box_bytes = tile_rows * row_bytes;

static_assert(box_bytes == key_box_bytes);

// Of a KeyRecord: a half needs a mask by words, of global keys or because the box has too many coordinates.
constexpr uint32_t words_masked = 1 << 12;

using WorkRecord = gna::cuda::WorkRecord<log2_tile>;

// Stages of keys and of values, and the shared memory of a block.
template <int head_dim>
struct Layout {
  static constexpr int boxes = head_dim / box_columns;
  static constexpr int tile_bytes = boxes * box_bytes;
  static constexpr int stages = head_dim == 128 ? 2 : 4;
  static constexpr int work_slots = 2;
  static constexpr int query = 0;
  static constexpr int key = query + tile_bytes;
  static constexpr int value = key + stages * tile_bytes;
  static constexpr int output = value + stages * tile_bytes;
  static constexpr int coordinates = output + tile_bytes;  // of the keys of a tile
  static constexpr int key_records = coordinates + box_bytes;
  static constexpr int barriers = key_records + stages * static_cast<int>(sizeof(KeyRecord));
  static constexpr int work_records = barriers + (4 * stages + 2 + 2 * work_slots) * 8;
  static constexpr int non_finite = work_records + work_slots * static_cast<int>(sizeof(WorkRecord));
  // 1024 more to align the rest.
  static constexpr int bytes = non_finite + static_cast<int>(sizeof(NonFinite<head_dim>)) + 1024;
  static_assert(bytes <= 227 * 1024);
};

}  // namespace gna::sm90
