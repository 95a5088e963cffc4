// What the host passes to the kernels, and what both agree on.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gna/box_mask.h"
#include "gna/coordinate_mask.h"
#include "gna/tile_walk.h"

namespace gna::cuda {

constexpr int log2_tile_n = 7;  // of the keys of a key tile
constexpr int tile_n = 1 << log2_tile_n;  // CUTLASS's kBlockN
constexpr int box_columns = 64;  // 128 bytes, the width of the swizzle
constexpr int row_bytes = 128;
constexpr int key_box_bytes = tile_n * row_bytes;

// Where a head lies in a tensor map, whose coordinates are (column, w, h, t, plane).
struct Planes {
  int32_t per_head, per_batch;
};

// Maps of one tensor. A map ends where its part ends, so that what lies outside is zero.
struct Maps {
  CUtensorMap of_part[3];
  CUtensorMap undilated;  // the grid in plain boxes, for global queries, if there are any
  Planes planes;
};

struct Params {
  Maps query, key, value, output;
  Problem problem;
  AxisWords key_words[max_axes];   // for masks by bits, see box_mask.h
  CoordinateBits key_coordinates;  // for masks by MMA, see coordinate_mask.h
  int32_t batch, heads;
  int32_t heads_per_kv_head;
  float scale_log2;  // the scale of scores, times log2(e)
  float* logsumexp;
  const uint8_t* key_mask;  // [batch, prefix + suffix], or null
  int64_t key_mask_batch_stride, key_mask_token_stride;
  uint32_t launch;     // its number, not 0
  int32_t minor;       // of the device's compute capability
  Range global_tiles;  // the query tiles of global tokens that are computed
};

}  // namespace gna::cuda
