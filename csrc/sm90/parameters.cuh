// What the host hands to the kernel, and the shapes that both agree on.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gna/box_mask.h"
#include "gna/walk.h"

namespace gna::sm90 {

constexpr int log2_tile = 7;  // tokens of a query tile and of a key tile
constexpr int tile_rows = 1 << log2_tile;
constexpr int log2_half = 6;  // query rows of one consumer warpgroup
constexpr int half_rows = 1 << log2_half;
constexpr int box_columns = 64;  // 128 bytes, the width of the swizzle
constexpr int row_bytes = 128;
constexpr int box_bytes = tile_rows * row_bytes;
constexpr int threads = 384;

// Where a head is in a tensor map, whose coordinates are (column, w, h, t, plane).
struct Planes {
  int32_t per_head, per_batch;
};

// Maps of one tensor. A map ends where its part ends, so that what lies outside is zero.
struct Maps {
  CUtensorMap of_part[3];
  CUtensorMap undilated;  // the grid in plain boxes, for queries that see all of it
  Planes planes;
};

struct Parameters {
  Maps query, key, value, output;
  Problem problem;
  AxisWords key_words[max_axes];  // of a key tile's box
  int32_t batch, heads;
  int32_t heads_per_kv_head;
  float scale_log2;  // of the logits, in units of log2
  float* logsumexp;
  const uint8_t* key_mask;  // [batch, prefix + suffix], or null
  int64_t key_mask_batch_stride, key_mask_token_stride;
  uint32_t launch;  // its number, not 0
};

// What the computing warpgroups need to know of a key tile. Bits of `flags`, for half h of the rows:
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
constexpr uint32_t last_tile = 1 << 11;

// A query tile, worked out ahead of those who load for it and compute it.
struct WorkRecord {
  QueryTile tile;
  RowsAxis halves[2][max_axes];
  bool has_rows[2];  // by half
  int32_t batch, head;
  bool done;  // no more work
  // By coordinate in the box, axis after axis: the keys that a query sees. The extents' product is
  // 128, so they add up to at most 130.
  Range sees[tile_rows + 2];
};

// Where a tile of values has what is not finite: by column, the keys, 32 a word.
template <int head_dim>
struct NonFinite {
  uint32_t nan[4][head_dim], plus[4][head_dim], minus[4][head_dim];
};

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
  static constexpr int key_records = output + tile_bytes;
  static constexpr int barriers = key_records + stages * static_cast<int>(sizeof(KeyRecord));
  static constexpr int work_records = barriers + (4 * stages + 2 + 2 * work_slots) * 8;
  static constexpr int non_finite = work_records + work_slots * static_cast<int>(sizeof(WorkRecord));
  // 1024 more to align the rest.
  static constexpr int bytes = non_finite + static_cast<int>(sizeof(NonFinite<head_dim>)) + 1024;
  static_assert(bytes <= 227 * 1024);
};

}  // namespace gna::sm90
