// The consumers of the fallback kernel, which is safe for values that are not finite.
//
// In the fast kernel, a masked key with a value that is not finite makes the output NaN, as does a masked
// score that is NaN or infinite; a probability above 1 may make a huge value overflow; and a score that
// exceeds the first ones of its row by 128 has an infinite probability. The fallback takes values that are
// not finite out of each tile and adds them to the rows that attend to them, masks by bits, and lets no
// probability exceed 1. It takes one step after the other, both consumers together, and some four times as
// long.
#pragma once

#include "mainloop.cuh"

namespace gna::sm90 {

template <typename Element, int head_dim>
struct Fallback : Mainloop<Element, head_dim> {
  using Base = Mainloop<Element, head_dim>;
  using Storage = typename Base::Storage;
  using Base::Base, Base::params, Base::shared, Base::non_finite, Base::k, Base::v, Base::q;
  using Base::work_pipeline, Base::work_tiles;

  // By both consumers.
  __device__ __forceinline__ bool take_out_non_finite(int stage) const {
    return gna::cuda::take_out_non_finite<Element, head_dim, 2 * consumer_threads>(
        shared + offsetof(Storage, values) + stage * Base::tile_bytes, threadIdx.x % 256 ^ 128,
        non_finite);
  }

  // Adds what was taken out to the rows that attend to it.
  __device__ __forceinline__ void put_back_non_finite(float (&output)[head_dim / 2],
                                                      const Bitmask& bitmask) const {
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + threadIdx.x % 4 * 2 + e;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t nan = 0, plus = 0, minus = 0;
          for (int word = 0; word < 4; ++word) {
            nan |= non_finite.nan[word][column] & bitmask.row[r][word];
            plus |= non_finite.plus[word][column] & bitmask.row[r][word];
            minus |= non_finite.minus[word][column] & bitmask.row[r][word];
          }
          float& x = output[4 * n + 2 * r + e];
          if (plus) x += infinity;
          if (minus) x -= infinity;
          if (nan) x = nanf("");
        }
      }
  }

  __device__ __forceinline__ void consume(int half) const {
    const int thread = threadIdx.x % consumer_threads;
    const int row = half * half_rows + thread / 32 * 16 + thread % 32 / 4;
    typename Base::KeyState key;
    typename Base::QueryState query;
    for (typename Base::WorkState state;; state.advance()) {
      work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = work_tiles[state.index()];
      if (uniform(static_cast<int>(work.is_end))) break;
      AttendedKeys attended;
      find_attended_keys(params, work, row, true, attended);
      Softmax softmax;
      float scores[64], output[head_dim / 2], rescale[2];
      uint32_t probs[32], mask[8] = {};
#pragma unroll
      for (float& x : output) x = 0.0f;
      q.consumer_wait(query);
      for (bool is_last = false; !is_last; key.advance()) {
        const KeyTileInfo tile = this->wait_for_keys(key);
        is_last = tile.flags & last_tile;
        this->issue_qk(scores, half, key.index(), false, mask);
        wgmma_wait<0>();
        warpgroup_fence_operand(scores);
        k.consumer_release(key);
        if (is_last) q.consumer_release(query);
        Bitmask bitmask;
        if (!find_bitmask(params, attended, work.batch, tile, half, bitmask))
          for (auto& of_row : bitmask.row)
            for (uint32_t& word : of_row) word = all_bits;
        apply_bitmask(scores, bitmask);
        scale_subtract_row_max(scores, softmax, params.scale_log2);
        update_row_max(scores, softmax, 0.0f, rescale);
        for (float& by : rescale) by = fmaxf(by, 0x1p-149f);  // 0 would make NaN of inf
        rescale_rows(output, rescale);
        float sum[2];
        exp2_scores<Element>(scores, probs, sum);
        for (int r = 0; r < 2; ++r) softmax.row_sum[r] += sum[r];

        v.consumer_wait(key);
        const bool found =
            named_barrier_any<2 * consumer_threads>(fallback_barrier, take_out_non_finite(key.index()));
        this->issue_pv(output, probs, key.index());
        wgmma_wait<0>();
        warpgroup_fence_operand(output);
        v.consumer_release(key);
        if (found) put_back_non_finite(output, bitmask);
        named_barrier_sync<2 * consumer_threads>(fallback_barrier);
      }
      query.advance();
      if (uniform(static_cast<int>(work.has_rows[half])))
        epilogue<Element, head_dim>(params, shared + offsetof(Storage, output), output, softmax, work,
                                    half, row);
      __syncwarp();
      work_pipeline.consumer_release(state);
    }
    if (thread == 0) tma_store_wait_read();
  }
};

}  // namespace gna::sm90
