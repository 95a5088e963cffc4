// The main loop: a producer warpgroup loads key tiles, two consumer warpgroups compute on them.
//
// A query tile has 128 rows, 64 for each consumer; a key tile has 128 keys. Boxes of the raster grid
// arrive in shared memory as the swizzled rows that the tensor core reads, through rank-5 tensor maps, so
// tokens are never permuted. As in FlashAttention-3 (arXiv 2407.08608), a consumer issues the MMAs of the
// scores S of a key tile beside those of the output O of the tile before it, and the two consumers take
// turns, so that the softmax of one runs beside the MMAs of the other:
//
//   warp 0       next query tile --work--> (all)                     tile scheduler
//   warp 1       Q, K0   K1   K2   K3 ...                            classifies key tiles; TMA
//   warp 2           V0   V1   V2 ...                                TMA
//                     |    |    |
//                     k, v pipelines: 2 or 4 stages each
//                     |    |    |
//   consumer     S0 | S1 O0 | S2 O1 | S3 O2 | ... |  On |            MMA, P is the left operand of O
//                   |       |       |       |     |     |
//                   P0      P1      P2      P3    ...  epilogue      softmax: S -> P
//
//                prologue   loop: S of tile i, O of tile i - 1   tail
//
//   consumer 0   [S1 O0] softmax  [S2 O1] softmax  [S3 O2]           [ ]: its turn at the tensor core
//   consumer 1   softmax [S1 O0]  softmax [S2 O1]  softmax
//
// A tile that this consumer skips ends the loop: its tail brings the output up to date, and the next tile
// that it does not skip begins with a prologue. So does a tile that needs a bitmask.
#pragma once

#include "../cuda/tma.cuh"
#include "epilogue.cuh"
#include "mask.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace gna::sm90 {

template <typename Element, int head_dim>
struct Mainloop {
  using Storage = SharedStorage<head_dim>;
  static constexpr int boxes = Storage::boxes;
  static constexpr int tile_bytes = Storage::tile_bytes;
  using KeyState = PipelineState<Storage::stages>;
  using QueryState = PipelineState<1>;
  using WorkState = PipelineState<Storage::work_stages>;

  const Params& params;
  const Problem& problem;
  uint8_t* const shared;  // the block's Storage
  KeyTileInfo* const key_tiles;
  WorkTileInfo* const work_tiles;
  NonFinite<head_dim>& non_finite;
  const Pipeline<Storage::stages> k, v;
  const Pipeline<1> q;
  const Pipeline<Storage::work_stages> work_pipeline;

  // Members of Storage are reached by their offsets: typed accesses would change the address arithmetic
  // of a main loop that has been measured.
  __device__ __forceinline__ Mainloop(const Params& params, uint8_t* shared)
      : params(params),
        problem(params.problem),
        shared(shared),
        key_tiles(reinterpret_cast<KeyTileInfo*>(shared + offsetof(Storage, key_tiles))),
        work_tiles(reinterpret_cast<WorkTileInfo*>(shared + offsetof(Storage, work_tiles))),
        non_finite(*reinterpret_cast<NonFinite<head_dim>*>(shared + offsetof(Storage, non_finite))),
        k(shared + offsetof(Storage, k)),
        v(shared + offsetof(Storage, v)),
        q(shared + offsetof(Storage, q)),
        work_pipeline(shared + offsetof(Storage, work)) {}

  __device__ __forceinline__ void init_barriers() const {
    k.init(1, consumer_warps);
    v.init(1, consumer_warps);
    q.init(1, consumer_warps);
    work_pipeline.init(1, consumer_warps + 2);
    fence_mbarrier_init();
  }

  // Producer --------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_query(const WorkTileInfo& work) const {
    int at[max_axes];
    coordinates_of_rows(problem, work, 0, at);
    mbarrier_arrive_and_expect_tx(q.full, tile_bytes);
    load_tile<boxes, tile_bytes>(params.query.of_part[work.tile.part],
                                 plane_of(params.query, work.batch, work.head), q.full,
                                 shared + offsetof(Storage, query), at[2], at[1], at[0]);
  }

  // One warp; its first lane issues the copies.
  __device__ __forceinline__ void load_queries_and_keys() const {
    const int lane = threadIdx.x % 32;
    const bool is_leader = lane == 0;
    uint32_t need_bitmask = globals_masked;
    if (params.key_coordinates.steps == 0) need_bitmask |= axes_masked | axes_masked << half_bits;
    const int axis = smaller(lane % 4, max_axes - 1);
    const int log2_extent = problem.axes[axis].log2_key;
    KeyState key;
    QueryState query;
    for (WorkState state;; state.advance()) {
      work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = work_tiles[state.index()];
      if (work.is_end) break;
      q.producer_acquire(query);
      if (is_leader) load_query(work);
      query.advance();
      const RowsAxis rows = work.halves[lane / 4 % 2][axis];
      for (KeyWalk walk(work.tile); !walk.done; key.advance()) {
        const KeyTile tile = walk.tile;
        uint32_t flags = classify_key_tile(params, work, rows, log2_extent, tile);
        walk.next(problem, work.tile);
        if (flags & need_bitmask) flags |= needs_bitmask;
        if (walk.done) flags |= last_tile;
        k.producer_acquire(key);
        if (is_leader) {
          key_tiles[key.index()] = {{tile.at[0], tile.at[1], tile.at[2]}, flags};
          load_keys<boxes>(params, params.key, work, tile, k.full + key.index(),
                           shared + offsetof(Storage, keys) + key.index() * tile_bytes);
        }
      }
      __syncwarp();
      work_pipeline.consumer_release(state);
    }
  }

  // One warp.
  __device__ __forceinline__ void load_values() const {
    const bool is_leader = threadIdx.x % 32 == 0;
    KeyState value;
    for (WorkState state;; state.advance()) {
      work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = work_tiles[state.index()];
      if (work.is_end) break;
      for (KeyWalk walk(work.tile); !walk.done; walk.next(problem, work.tile), value.advance()) {
        v.producer_acquire(value);
        if (is_leader)
          load_keys<boxes>(params, params.value, work, walk.tile, v.full + value.index(),
                           shared + offsetof(Storage, values) + value.index() * tile_bytes);
      }
      __syncwarp();
      work_pipeline.consumer_release(state);
    }
  }

  __device__ __forceinline__ void produce() const {
    switch (uniform(threadIdx.x / 32)) {
      case 0:
        schedule_work_tiles(params, work_tiles, work_pipeline);
        break;
      case 1:
        load_queries_and_keys();
        break;
      case 2:
        load_values();
        break;
    }
  }

  // Consumers -------------------------------------------------------------------------------------

  // Ping-pong: the consumers take turns at issuing MMAs, one turn for each key tile that neither of them
  // skips. With a head_dim of 64, MMAs are short and exponentials many: there, a turn within the loop ends
  // only when its MMAs are done, so that the exponentials of one consumer meet the MMAs of the other.
  static constexpr bool turn_ends_late = head_dim == 64;

  __device__ __forceinline__ static void warp_scheduler_barrier_sync(int half) {
    named_barrier_sync<2 * consumer_threads>(warp_scheduler_barrier + half);
  }

  __device__ __forceinline__ static void warp_scheduler_barrier_arrive(int half) {
    named_barrier_arrive<2 * consumer_threads>(warp_scheduler_barrier + 1 - half);
  }

  __device__ __forceinline__ KeyTileInfo wait_for_keys(const KeyState& key) const {
    k.consumer_wait(key);
    const int4 raw = *reinterpret_cast<const int4*>(key_tiles + key.index());
    return {{raw.x, raw.y, raw.z}, static_cast<uint32_t>(raw.w)};
  }

  // Issues S = Q K^T, plus the mask if `is_masked`: its left operand is `mask`.
  __device__ __forceinline__ void issue_qk(float (&scores)[64], int half, int stage, bool is_masked,
                                           uint32_t (&mask)[8]) const {
    const uint32_t query = smem_descriptor(
        shared_address(shared + offsetof(Storage, query)) + half * half_rows * row_bytes, 16);
    const uint32_t keys =
        smem_descriptor(shared_address(shared + offsetof(Storage, keys)) + stage * tile_bytes, 16);
    warpgroup_fence_operand(scores);
    warpgroup_fence_operand(mask);
    // Each branch has a fence of its own: else the assembler adds one, or serializes all MMAs.
    if (is_masked) {
      wgmma_fence();
      const uint32_t coordinates =
          smem_descriptor(shared_address(shared + offsetof(Storage, key_coordinates)), 16);
      wgmma_rs_bf16(scores, mask, coordinates, 0);
      if (params.key_coordinates.steps == 2) {
        wgmma_fence();
        wgmma_rs_bf16(scores, mask + 4, coordinates + 2, 1);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < head_dim / 16; ++i) {
      const uint32_t step = (i / 4 * box_bytes + i % 4 * 32) >> 4;
      wgmma_ss<Element>(scores, query + step, keys + step, i > 0 || is_masked);
    }
    wgmma_commit();
    warpgroup_fence_operand(scores);
  }

  // Issues O += P V.
  __device__ __forceinline__ void issue_pv(float (&output)[head_dim / 2], uint32_t (&probs)[32],
                                           int stage) const {
    const uint32_t values = smem_descriptor(
        shared_address(shared + offsetof(Storage, values)) + stage * tile_bytes, box_bytes);
    warpgroup_fence_operand(output);
    warpgroup_fence_operand(probs);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < tile_n / 16; ++i)
      wgmma_rs<Element>(output, probs + 4 * i, values + i * (16 * row_bytes >> 4));
    wgmma_commit();
    warpgroup_fence_operand(output);
  }

  __device__ __forceinline__ void consume(int half) const {
    const int thread = threadIdx.x % consumer_threads;
    const int row = half * half_rows + thread / 32 * 16 + thread % 32 / 4;
    const int shift = half * half_bits;
    const uint32_t skipped_here = skipped << shift, skipped_there = skipped << (half_bits - shift);
    const float scale = params.scale_log2;
    KeyState key;
    QueryState query;
    WorkState state;
    if (half == 1) warp_scheduler_barrier_arrive(half);
    while (true) {
      work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = work_tiles[state.index()];
      if (uniform(static_cast<int>(work.is_end))) break;
      const int batch = work.batch;
      AttendedKeys attended;
      find_attended_keys(params, work, row, params.key_coordinates.steps == 0, attended);
      Softmax softmax;
      float scores[64], output[head_dim / 2], sum[2];
      uint32_t probs[32], masked[2] = {}, mask[8] = {};
#pragma unroll
      for (float& x : output) x = 0.0f;

      q.consumer_wait(query);
      KeyTileInfo tile = wait_for_keys(key), next;
      bool is_last = false;
      while (true) {
        // Skipped tiles: this consumer still releases their stages.
        while (tile.flags & skipped_here) {
          __syncwarp();  // all have read the tile's info
          k.consumer_release(key);
          v.consumer_wait(key);
          v.consumer_release(key);
          key.advance();
          is_last = tile.flags & last_tile;
          if (is_last) break;
          tile = wait_for_keys(key);
        }
        if (is_last) {
          q.consumer_release(query);
          break;
        }

        // Prologue: S and P of a tile, which may need a bitmask.
        bool is_masked = is_masked_by_mma(tile, half);
        bool takes_turn = !(tile.flags & skipped_there);
        find_masked_coordinates(params, attended, tile, masked_axes(tile.flags, half), masked);
        make_mask_operand(masked, mask);
        if (takes_turn) warp_scheduler_barrier_sync(half);
        issue_qk(scores, half, key.index(), is_masked, mask);
        if (takes_turn) warp_scheduler_barrier_arrive(half);
        is_last = tile.flags & last_tile;
        if (!is_last) {
          next = wait_for_keys(key.next());
          find_masked_coordinates(params, attended, next, masked_axes(next.flags, half), masked);
        }
        wgmma_wait<0>();
        warpgroup_fence_operand(scores);
        k.consumer_release(key);
        if (is_last) q.consumer_release(query);
        if (tile.flags & needs_bitmask) {
          Bitmask bitmask;
          if (find_bitmask(params, attended, batch, tile, half, bitmask))
            apply_bitmask(scores, bitmask);
        }
        scale_subtract_row_max(scores, softmax, scale);
        update_row_max_and_exp2<Element>(scores, softmax, output, probs, sum);
        for (int r = 0; r < 2; ++r) softmax.row_sum[r] += sum[r];
        bool has_row_max = all_have_row_max(softmax);
        KeyState value = key;
        key.advance();

        // Loop: S of a tile, O of the tile before it. Tiles that need a bitmask are left to the prologue,
        // for the instruction cache's sake.
        while (!is_last) {
          tile = next;
          if (tile.flags & (skipped_here | needs_bitmask)) break;
          is_masked = is_masked_by_mma(tile, half);
          takes_turn = !(tile.flags & skipped_there);
          if (is_masked) make_mask_operand(masked, mask);
          if (takes_turn) warp_scheduler_barrier_sync(half);
          issue_qk(scores, half, key.index(), is_masked, mask);
          v.consumer_wait(value);
          issue_pv(output, probs, value.index());
          if (takes_turn && !turn_ends_late) warp_scheduler_barrier_arrive(half);
          is_last = tile.flags & last_tile;
          if (!is_last) {
            next = wait_for_keys(key.next());
            find_masked_coordinates(params, attended, next, masked_axes(next.flags, half), masked);
          }

          // S is done.
          wgmma_wait<1>();
          warpgroup_fence_operand(scores);
          k.consumer_release(key);
          if (is_last) q.consumer_release(query);
          scale_subtract_row_max(scores, softmax, scale);

          // O is done, and P may be overwritten.
          wgmma_wait<0>();
          warpgroup_fence_operand(output);
          warpgroup_fence_operand(probs);
          if (takes_turn && turn_ends_late) warp_scheduler_barrier_arrive(half);
          v.consumer_release(value);
          bool updates = !has_row_max;
          if (has_row_max) {
            exp2_scores<Element>(scores, probs, sum);
            updates = exceeds_threshold<Element>(sum);
            if (updates) recover_scores(scores);
          }
          if (updates) {
            update_row_max_and_exp2<Element>(scores, softmax, output, probs, sum);
            has_row_max = all_have_row_max(softmax);
          }
          for (int r = 0; r < 2; ++r) softmax.row_sum[r] += sum[r];
          value = key;
          key.advance();
        }

        // Tail: O of the last tile.
        v.consumer_wait(value);
        issue_pv(output, probs, value.index());
        wgmma_wait<0>();
        warpgroup_fence_operand(output);
        v.consumer_release(value);
        if (is_last) break;
      }
      query.advance();
      if (uniform(static_cast<int>(work.has_rows[half])))
        epilogue<Element, head_dim>(params, shared + offsetof(Storage, output), output, softmax, work,
                                    half, row);
      __syncwarp();
      work_pipeline.consumer_release(state);
      state.advance();
    }
    if (thread == 0) tma_store_wait_read();
  }
};

}  // namespace gna::sm90
