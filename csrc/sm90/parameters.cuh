// What the host hands to the kernel, and the shapes that both agree on.
#pragma once

#include <cuda.h>

#include <cstdint>

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
  int32_t batch, heads;
  int32_t heads_per_kv_head;
  float scale_log2;  // of the logits, in units of log2
  float* logsumexp;
  const uint8_t* key_mask;  // [batch, prefix + suffix], or null
  int64_t key_mask_batch_stride, key_mask_token_stride;
};

// Stages of keys and of values, and the shared memory of a block.
template <int head_dim>
struct Layout {
  static constexpr int boxes = head_dim / box_columns;
  static constexpr int tile_bytes = boxes * box_bytes;
  static constexpr int stages = head_dim == 128 ? 2 : 4;
  static constexpr int query = 0;
  static constexpr int key = query + tile_bytes;
  static constexpr int value = key + stages * tile_bytes;
  static constexpr int output = value + stages * tile_bytes;
  static constexpr int barriers = output + tile_bytes;
  // 1024 more to align the rest.
  static constexpr int bytes = barriers + (4 * stages + 2) * 8 + 1024;
  static_assert(bytes <= 227 * 1024);
};

}  // namespace gna::sm90
