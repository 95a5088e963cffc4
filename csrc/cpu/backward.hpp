// The backward pass over one tile, from the saved logsumexp: twice the same walk.
//
// With weight = exp(score - logsumexp), delta = sum(grad_output * output) - grad_logsumexp and
// grad_score = weight * (grad_output . value - delta):
//   grad_query = scale * sum over keys of grad_score * key        queries in lanes, keys streamed
//   grad_key   = scale * sum over queries of grad_score * query   keys in lanes, queries streamed
//   grad_value = sum over queries of weight * grad_output
// Every gradient is summed in one place, in one order.
#pragma once

#include "tile.hpp"

namespace gna::GNA_ISA {

// exp(score - logsumexp) = 2^(log2 score - shift). Rows of nothing but -inf have weights of 0.
GNA_INLINE float shift_of(float logsumexp) {
  return logsumexp == -infinity ? 0 : logsumexp * log2_e;
}

template <class In, class Math>
void query_gradient_tile(const QueryGradientTile& tile) {
  const TileTokens& tokens = *tile.tokens;
  const int lanes = tokens.lanes, head_dim = tile.head_dim, pitch = padded(head_dim);
  Scratch scratch{tile.scratch};
  float* const query = scratch.take(pitch * lanes);
  float* const grad_output = scratch.take(pitch * lanes);
  float* const room = scratch.take(pitch * lanes);
  float* const sum = scratch.take(pitch * lanes);
  auto* const keys = scratch.panel<Math>(chunk * pitch);
  auto* const values = scratch.panel<Math>(chunk * pitch);
  auto* const keys_to_sum = scratch.panel<Math>(chunk * pitch);
  float* const scores = scratch.take(chunk * lanes);
  float* const grads = scratch.take(chunk * lanes);
  float* const weights = scratch.take(chunk * lanes);
  float* const shift = scratch.take(lanes);
  float* const delta = scratch.take(lanes);

  Watch ignored;
  for (int lane = 0; lane < lanes; ++lane) {
    const int32_t token = tokens.lane_tokens[lane];
    shift[lane] = delta[lane] = 0;
    if (token < 0) continue;
    shift[lane] = shift_of(tile.logsumexp[token]);
    read_row<In>(tile.output, token, head_dim, room, ignored);
    read_row<In>(tile.grad_output, token, head_dim, room + pitch, ignored);
    Vec products{};
    for (int d = 0; d < head_dim; d += width)
      products += load<Vec>(room + d) * load<Vec>(room + pitch + d);
    for (int i = 0; i < width; ++i) delta[lane] += products[i];
    if (tile.grad_logsumexp) delta[lane] -= tile.grad_logsumexp[token * tile.grad_logsumexp_step];
    tile.delta[token] = delta[lane];
  }
  read_lanes<In, Math>(tile.query, tokens, head_dim, query, room);
  read_lanes<In, Math>(tile.grad_output, tokens, head_dim, grad_output, room);
  memset(sum, 0, sizeof(float) * pitch * lanes);

  const int depth = dots_depth<Math>(head_dim), dots_step = dots_pitch<Math>(head_dim);
  for_chunks(tokens, [&](const int32_t* some, const uint64_t* masks, int count) {
    const bool finite = !read_for_sums<In, Math>(tile.key, some, count, head_dim, keys_to_sum);
    auto* keys_to_dot = keys_to_sum;
    if constexpr (Math::per_cell > 1) {
      keys_to_dot = keys;
      read_for_dots<In, Math>(tile.key, some, count, head_dim, keys);
    }
    read_for_dots<In, Math>(tile.value, some, count, head_dim, values);
    dots<Math>(keys_to_dot, dots_step, count, query, depth, lanes, scores, tile.scale * log2_e);
    dots<Math>(values, dots_step, count, grad_output, depth, lanes, grads, 1.f);
    for (int row = 0; row < count; row += Math::per_cell)
      for (int v = 0; v < lanes / width; ++v) {
        Vec grad[Math::per_cell] = {};
        for (int r = 0; r < Math::per_cell && row + r < count; ++r) {
          const int at = (row + r) * lanes + v * width;
          const Vec weight = exp2(load<Vec>(scores + at) - load<Vec>(shift + v * width));
          grad[r] = weight * (load<Vec>(grads + at) - load<Vec>(delta + v * width));
          if (masks) grad[r] = select(lane_bits(masks[row + r], v), grad[r], Vec{});
        }
        store_weights<Math>(weights, row, lanes, v, grad);
      }
    add_weighted<In, Math>(tile.key, some, masks, count, head_dim, keys_to_sum, finite, weights,
                           lanes, sum, nullptr, room);
  });

  for (int lane = 0; lane < lanes; ++lane) shift[lane] = tile.scale;
  write_lanes<In>(sum, shift, tokens, head_dim, tile.grad_query, room);
}

template <class In, class Math>
void key_gradient_tile(const KeyGradientTile& tile) {
  const TileTokens& tokens = *tile.tokens;
  const int lanes = tokens.lanes, head_dim = tile.head_dim, pitch = padded(head_dim);
  Scratch scratch{tile.scratch};
  float* const key = scratch.take(pitch * lanes);
  float* const value = scratch.take(pitch * lanes);
  float* const room = scratch.take(pitch * lanes);
  float* const key_sum = scratch.take(pitch * lanes);
  float* const value_sum = scratch.take(pitch * lanes);
  auto* const queries = scratch.panel<Math>(chunk * pitch);
  auto* const outputs = scratch.panel<Math>(chunk * pitch);
  auto* const queries_to_sum = scratch.panel<Math>(chunk * pitch);
  auto* const outputs_to_sum = scratch.panel<Math>(chunk * pitch);
  float* const scores = scratch.take(chunk * lanes);
  float* const grads = scratch.take(chunk * lanes);
  float* const weights = scratch.take(chunk * lanes);
  float* const grad_weights = scratch.take(chunk * lanes);
  float* const factor = scratch.take(lanes);

  read_lanes<In, Math>(tile.key, tokens, head_dim, key, room);
  read_lanes<In, Math>(tile.value, tokens, head_dim, value, room);
  memset(key_sum, 0, sizeof(float) * pitch * lanes);
  memset(value_sum, 0, sizeof(float) * pitch * lanes);

  const int depth = dots_depth<Math>(head_dim), dots_step = dots_pitch<Math>(head_dim);
  for (int head = 0; head < tile.heads; ++head) {
    using Element = typename In::Element;
    Rows query = tile.query, grad_output = tile.grad_output;
    query.data = static_cast<Element*>(query.data) + head * tile.query_head_step;
    grad_output.data =
        static_cast<Element*>(grad_output.data) + head * tile.grad_output_head_step;
    const float* const logsumexp = tile.logsumexp + head * tile.queries_per_head;
    const float* const delta = tile.delta + head * tile.queries_per_head;

    for_chunks(tokens, [&](const int32_t* some, const uint64_t* masks, int count) {
      const bool finite_queries =
          !read_for_sums<In, Math>(query, some, count, head_dim, queries_to_sum);
      const bool finite_outputs =
          !read_for_sums<In, Math>(grad_output, some, count, head_dim, outputs_to_sum);
      auto *queries_to_dot = queries_to_sum, *outputs_to_dot = outputs_to_sum;
      if constexpr (Math::per_cell > 1) {
        queries_to_dot = queries;
        outputs_to_dot = outputs;
        read_for_dots<In, Math>(query, some, count, head_dim, queries);
        read_for_dots<In, Math>(grad_output, some, count, head_dim, outputs);
      }
      dots<Math>(queries_to_dot, dots_step, count, key, depth, lanes, scores,
                 tile.scale * log2_e);
      dots<Math>(outputs_to_dot, dots_step, count, value, depth, lanes, grads, 1.f);
      for (int row = 0; row < count; row += Math::per_cell)
        for (int v = 0; v < lanes / width; ++v) {
          Vec weight[Math::per_cell] = {}, grad[Math::per_cell] = {};
          for (int r = 0; r < Math::per_cell && row + r < count; ++r) {
            const int at = (row + r) * lanes + v * width;
            weight[r] = exp2(load<Vec>(scores + at) - shift_of(logsumexp[some[row + r]]));
            grad[r] = weight[r] * (load<Vec>(grads + at) - delta[some[row + r]]);
            if (masks) {
              const uint32_t bits = lane_bits(masks[row + r], v);
              weight[r] = select(bits, weight[r], Vec{});
              grad[r] = select(bits, grad[r], Vec{});
            }
          }
          store_weights<Math>(weights, row, lanes, v, weight);
          store_weights<Math>(grad_weights, row, lanes, v, grad);
        }
      add_weighted<In, Math>(grad_output, some, masks, count, head_dim, outputs_to_sum,
                             finite_outputs, weights, lanes, value_sum, nullptr, room);
      add_weighted<In, Math>(query, some, masks, count, head_dim, queries_to_sum, finite_queries,
                             grad_weights, lanes, key_sum, nullptr, room);
    });
  }

  for (int lane = 0; lane < lanes; ++lane) factor[lane] = tile.scale;
  write_lanes<In>(key_sum, factor, tokens, head_dim, tile.grad_key, room);
  for (int lane = 0; lane < lanes; ++lane) factor[lane] = 1;
  write_lanes<In>(value_sum, factor, tokens, head_dim, tile.grad_value, room);
}

}  // namespace gna::GNA_ISA
