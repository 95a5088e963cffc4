// What a kernel of one instruction set is given: one tile at a time, as plain pointers and numbers.
//
// This file is seen by code of every instruction set, so it holds no code of its own.
#pragma once

#include <cstdint>

namespace gna {

constexpr int most_lanes = 64;  // of a tile; a tile has 16, 32 or 64
constexpr int chunk = 96;       // streamed tokens that are worked on at once; even

enum class Type : int32_t { fp32 = 0, bf16 = 1, fp16 = 2 };
constexpr int type_count = 3;

// One head of one tensor [tokens, head_dim]; steps in elements.
struct Rows {
  void* data;
  int64_t token_step;
  int64_t dim_step;
};

// The tokens of a tile: some in lanes, the others streamed past them.
struct TileTokens {
  int lanes;
  int32_t lane_tokens[most_lanes];  // -1: nothing in this lane
  // Streamed tokens that are visible from every lane, then those with a mask: bit l is lane l.
  const int32_t* interior;
  int32_t interiors;
  const int32_t* boundary;
  const uint64_t* masks;
  int32_t boundaries;
};

// Queries in lanes, keys streamed.
struct ForwardTile {
  const TileTokens* tokens;
  int head_dim;
  float scale;
  Rows query, key, value, output;
  float* logsumexp;  // [query tokens]
  float* scratch;
};

// Queries in lanes, keys streamed; writes delta = sum(grad_output * output) - grad_logsumexp too.
struct QueryGradientTile {
  const TileTokens* tokens;
  int head_dim;
  float scale;
  Rows query, key, value, output, grad_output, grad_query;
  const float* logsumexp;       // [query tokens]
  const float* grad_logsumexp;  // [query tokens] at grad_logsumexp_step, or null
  int64_t grad_logsumexp_step;
  float* delta;  // [query tokens]
  float* scratch;
};

// Keys in lanes, queries of all the heads that share the key streamed.
struct KeyGradientTile {
  const TileTokens* tokens;
  int head_dim;
  float scale;
  int heads;
  Rows query, grad_output;  // of the first head
  int64_t query_head_step, grad_output_head_step;
  const float* logsumexp;  // [heads, query tokens]
  const float* delta;      // [heads, query tokens]
  int64_t queries_per_head;
  Rows key, value, grad_key, grad_value;
  float* scratch;
};

struct Kernel {
  const char* isa;
  void (*forward[type_count])(const ForwardTile&);
  void (*query_gradient[type_count])(const QueryGradientTile&);
  void (*key_gradient[type_count])(const KeyGradientTile&);
};

// Floats of scratch that any tile needs, 64-byte aligned.
constexpr int64_t forward_scratch(int64_t padded_dim) {
  return 3 * padded_dim * most_lanes + 2 * chunk * padded_dim + 2 * chunk * most_lanes +
         4 * most_lanes;
}
constexpr int64_t backward_scratch(int64_t padded_dim) {
  return 5 * padded_dim * most_lanes + 4 * chunk * padded_dim + 4 * chunk * most_lanes +
         4 * most_lanes;
}

}  // namespace gna
