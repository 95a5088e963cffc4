// The forward pass over one tile: online softmax, queries in lanes, keys streamed.
#pragma once

#include "tile.hpp"

namespace gna::GNA_ISA {

// One chunk's softmax: scores [count][lanes] (in log2 units) become weights 2^(score - top).
//
// top, total: running maximum and sum of each lane, updated. factor: what the lane's sums so far
// must be multiplied with. `vectors` of lanes are worked on together, for independent chains.
template <class Math, int vectors>
void weigh(float* scores, const uint64_t* masks, int count, int lanes, float* top, float* total,
           float* factor, float* weights) {
  for (int first = 0; first < lanes / width; first += vectors) {
    Vec shift[vectors], sum[vectors] = {};
    for (int v = 0; v < vectors; ++v) shift[v] = load<Vec>(top + (first + v) * width);
    for (int row = 0; row < count; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* const at = scores + row * lanes + (first + v) * width;
        Vec score = load<Vec>(at);
        if (masks) {
          score = select(lane_bits(masks[row], first + v), score, splat(-infinity));
          store(at, score);
        }
        shift[v] = highest(score, shift[v]);
      }
    for (int v = 0; v < vectors; ++v) {
      const int lane = (first + v) * width;
      const Vec before = load<Vec>(top + lane);
      store(top + lane, shift[v]);
      // A lane that saw nothing but -inf so far keeps weights of 0.
      shift[v] = shift[v] == -infinity ? Vec{} : shift[v];
      store(factor + lane, exp2(before - shift[v]));
    }
    for (int row = 0; row < count; row += Math::per_cell)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        Vec weight[Math::per_cell] = {};
        for (int r = 0; r < Math::per_cell && row + r < count; ++r) {
          weight[r] = exp2(load<Vec>(scores + (row + r) * lanes + (first + v) * width) - shift[v]);
          sum[v] += weight[r];
        }
        store_weights<Math>(weights, row, lanes, first + v, weight);
      }
    for (int v = 0; v < vectors; ++v) {
      const int lane = (first + v) * width;
      store(total + lane, load<Vec>(total + lane) * load<Vec>(factor + lane) + sum[v]);
    }
  }
}

template <class In, class Math>
void forward_tile(const ForwardTile& tile) {
  const TileTokens& tokens = *tile.tokens;
  const int lanes = tokens.lanes, head_dim = tile.head_dim, pitch = padded(head_dim);
  Scratch scratch{tile.scratch};
  float* const query = scratch.take(pitch * lanes);
  float* const room = scratch.take(pitch * lanes);
  float* const sum = scratch.take(pitch * lanes);
  auto* const keys = scratch.panel<Math>(chunk * pitch);
  auto* const values = scratch.panel<Math>(chunk * pitch);
  float* const scores = scratch.take(chunk * lanes);
  float* const weights = scratch.take(chunk * lanes);
  float* const top = scratch.take(lanes);
  float* const total = scratch.take(lanes);
  float* const factor = scratch.take(lanes);

  read_lanes<In, Math>(tile.query, tokens, head_dim, query, room);
  memset(sum, 0, sizeof(float) * pitch * lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    top[lane] = -infinity;
    total[lane] = 0;
  }
  for_chunks(tokens, [&](const int32_t* some, const uint64_t* masks, int count) {
    read_for_dots<In, Math>(tile.key, some, count, head_dim, keys);
    const bool finite = !read_for_sums<In, Math>(tile.value, some, count, head_dim, values);
    dots<Math>(keys, dots_pitch<Math>(head_dim), count, query, dots_depth<Math>(head_dim), lanes,
               scores, tile.scale * log2_e);
    if (lanes >= 4 * width)
      weigh<Math, 4>(scores, masks, count, lanes, top, total, factor, weights);
    else
      weigh<Math, 1>(scores, masks, count, lanes, top, total, factor, weights);
    add_weighted<In, Math>(tile.value, some, masks, count, head_dim, values, finite, weights, lanes,
                           sum, factor, room);
  });

  for (int lane = 0; lane < lanes; ++lane) {
    factor[lane] = total[lane] == 0 ? 0 : 1 / total[lane];
    if (tokens.lane_tokens[lane] >= 0)
      tile.logsumexp[tokens.lane_tokens[lane]] =
          top[lane] == -infinity ? -infinity
                                 : top[lane] * ln_2 + __builtin_logf(total[lane]);
  }
  write_lanes<In>(sum, factor, tokens, head_dim, tile.output, room);
}

}  // namespace gna::GNA_ISA
