// The main loop: warps that load key tiles, issue MMAs and compute the softmax.
//
// A query tile has 256 rows in two halves, boxes of 128 rows that share key tiles of 128 keys and skip
// those that only the other half needs. Boxes of the raster grid arrive in shared memory as the swizzled
// rows that the tensor core reads, through rank-5 tensor maps, so tokens are never permuted. MMAs
// accumulate in tensor memory: S goes from there to the registers of the softmax, one row a thread, and
// comes back as P, the left operand of O. The order of MMAs is that of public kernels (CUTLASS's example
// 77, FlashAttention-4): O of a half, then S of its next key tile.
//
//   scheduler warp    next query tile --work--> (load, softmax, epilogue)
//   load warp         Q, K0 V0 K1 V1 K2 V2 ...  --kv-->             classifies key tiles; TMA
//   MMA warp          S0.0 S0.1 | O0.0 S1.0 O0.1 S1.1 | O1.0 S2.0 O1.1 S2.1 | ...
//                       |    |     ^    |    ^    |      ^
//   softmax warps 0     +----|-P0--+    +----|----|-P1---+          S -> P, rescales O if row_max is updated
//   softmax warps 1          +------P0-------+    +-----P1---...
//   epilogue warps                                                  O / row sum, after the last tile
//
//   Sj.h, Oj.h: key tile j, half h. While the softmax of one half runs, the tensor core works for the other.
#pragma once

#include "../cuda/tma.cuh"
#include "fallback.cuh"
#include "mask.cuh"
#include "softmax.cuh"
#include "tcgen05.cuh"

namespace gna::sm100 {

template <typename Element, int head_dim, bool fallback>
struct Mainloop {
  using Storage = SharedStorage<head_dim>;
  static constexpr int boxes = Storage::boxes;
  static constexpr int stages = Storage::stages;
  static constexpr int tile_bytes = Storage::tile_bytes;
  using TileState = PipelineState<stages>;  // of keys and values
  using KeyTileState = PipelineState<Storage::key_tile_stages>;
  using WorkState = PipelineState<Storage::work_stages>;

  // How many exponentials of 16 are emulated. With a head_dim of 64, MMAs take half as long.
  static constexpr int emulated = head_dim == 64 ? 6 : 3;

  const Params& params;
  const Problem& problem;
  Storage& shared;
  const Pipeline<1> q;
  const Pipeline<stages> kv;
  const Pipeline<Storage::key_tile_stages> key_tile_info;
  const Pipeline<Storage::work_stages> work_pipeline;

  __device__ __forceinline__ Mainloop(const Params& params, Storage& shared)
      : params(params),
        problem(params.problem),
        shared(shared),
        q(shared.q),
        kv(shared.kv),
        key_tile_info(shared.key_tile_info),
        work_pipeline(shared.work) {}

  __device__ __forceinline__ void init_barriers() const {
    const auto init_halves = [](uint64_t* barriers, int arrivals) {
      for (int half = 0; half < 2; ++half) mbarrier_init(barriers + half, arrivals);
    };
    q.init(1, 1);
    kv.init(1, 1);
    key_tile_info.init(1, 1 + softmax_warps + (fallback ? epilogue_warps : 0));
    work_pipeline.init(1, 1 + softmax_warps + epilogue_warps);
    init_halves(shared.scores_full, 1);
    init_halves(shared.probs_full, softmax_warps / 2);
    init_halves(shared.last_probs_full, softmax_warps / 2);
    init_halves(shared.output_full, 1);
    init_halves(shared.output_empty, epilogue_warps);
    init_halves(shared.row_stats_full, softmax_warps / 2);
    init_halves(shared.row_stats_empty, epilogue_warps);
    mbarrier_init(&shared.v_full, 1);
    mbarrier_init(&shared.v_clean_full, epilogue_warps);
    mbarrier_init(&shared.v_clean_empty, softmax_warps);
    fence_mbarrier_init();
  }

  // Load ------------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_query(const WorkTileInfo& work) const {
    mbarrier_arrive_and_expect_tx(q.full, 2 * tile_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int at[max_axes];
      coordinates_of_rows(problem, work, half * half_rows, at);
      load_tile<boxes, tile_bytes>(params.query.of_part[work.tile.part],
                                   plane_of(params.query, work.batch, work.head), q.full,
                                   shared.query[half], at[2], at[1], at[0]);
    }
  }

  // One warp; its first lane issues the copies.
  __device__ __forceinline__ void load() const {
    const int lane = threadIdx.x % 32;
    const bool is_leader = lane == 0;
    const int axis = smaller(lane % 4, max_axes - 1);
    const int log2_extent = problem.axes[axis].log2_key;
    WorkState state;
    KeyTileState key_tile;
    TileState tile;
    PipelineState<1> query;
    const auto commit_key_tile = [&](const KeyTileInfo& info) {
      key_tile_info.producer_acquire(key_tile);
      if (is_leader) {
        shared.key_tiles[key_tile.index()] = info;
        key_tile_info.producer_commit(key_tile);
      }
      key_tile.advance();
    };
    const auto load_next = [&](const Maps& maps, const WorkTileInfo& work, const KeyTile& at) {
      kv.producer_acquire(tile);
      if (is_leader)
        load_keys<boxes>(params, maps, work, at, kv.full + tile.index(), shared.tiles[tile.index()]);
      tile.advance();
    };
    for (;; state.advance()) {
      work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = shared.work_tiles[state.index()];
      if (work.is_end) break;
      q.producer_acquire(query);
      if (is_leader) load_query(work);
      query.advance();
      const RowsAxis rows = work.halves[lane / 4 % 2][axis];
      for (KeyWalk walk(work.tile); !walk.done;) {
        const KeyTile at = walk.tile;
        uint32_t flags = classify_key_tile(params, work, rows, log2_extent, at);
        walk.next(problem, work.tile);
        if (walk.done) flags |= last_tile;
        commit_key_tile({{at.at[0], at.at[1], at.at[2]}, flags});
        load_next(params.key, work, at);
        load_next(params.value, work, at);
      }
      __syncwarp();
      work_pipeline.consumer_release(state);
    }
    commit_key_tile({{0, 0, 0}, no_more_tiles | skipped | skipped << half_bits});
    // The block's shared memory must last until all stages have been released.
    q.producer_acquire(query);
    for (int i = 0; i < stages; ++i, tile.advance()) kv.producer_acquire(tile);
  }

  // MMA -------------------------------------------------------------------------------------------

  struct Half {
    uint32_t scores, output;  // tensor memory
    uint32_t query;           // descriptor
    uint32_t steps = 0;       // key tiles done, of all query tiles
    bool fresh = true;        // there is no output yet
  };

  __device__ __forceinline__ static bool is_skipped(uint32_t flags, int half) {
    return flags >> (half * half_bits) & skipped;
  }

  // Issues S = Q K^T of a half.
  __device__ __forceinline__ void issue_qk(const Half& half, int stage) const {
    const uint32_t keys = smem_descriptor(shared_address(shared.tiles[stage]), 16);
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
      const uint32_t step = (k / 4 * key_box_bytes + k % 4 * 32) >> 4;
      mma_ss(half.scores, half.query + step, keys + step,
             instruction_descriptor<Element, tile_n, false>, k > 0);
    }
  }

  // Issues O += P V of a half. It starts before the last quarter of P is there.
  __device__ __forceinline__ void issue_pv(const Half& half, int index, int stage) const {
    const uint32_t values = smem_descriptor(shared_address(shared.tiles[stage]), key_box_bytes);
    mbarrier_wait(shared.probs_full + index, half.steps & 1);
    tcgen05_after_thread_sync();
#pragma unroll
    for (int k = 0; k < tile_n / 16; ++k) {
      if (k == tile_n / 16 * 3 / 4) {
        mbarrier_wait(shared.last_probs_full + index, half.steps & 1);
        tcgen05_after_thread_sync();
      }
      mma_ts(half.output, half.scores + 8 * k, values + k * (16 * row_bytes >> 4),
             instruction_descriptor<Element, head_dim, true>, fallback || k > 0 || !half.fresh);
    }
  }

  // One thread. Each round ends a key tile and starts the next one, half after half, also from one query
  // tile to the next.
  __device__ __forceinline__ void mma(uint32_t tmem) const {
    KeyTileState key_tile;
    TileState keys, values{1};
    PipelineState<1> query, work_tile, clean;
    Half halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      halves[half].scores = tmem + scores_column(half);
      halves[half].output = tmem + output_column(half);
      halves[half].query = smem_descriptor(shared_address(shared.query[half]), 16);
    }

    const auto end_tile = [&](uint32_t flags, int half) {
      Half& state = halves[half];
      if (state.fresh) mbarrier_wait(shared.output_empty + half, work_tile.phase() ^ 1);
      if (!is_skipped(flags, half)) {
        issue_pv(state, half, values.index());
        ++state.steps;
        state.fresh = false;
      }
      if (flags & last_tile) {
        tcgen05_commit(shared.output_full + half);
        state.fresh = true;
      }
    };
    const auto start_tile = [&](uint32_t flags, int half) {
      if (is_skipped(flags, half)) return;
      issue_qk(halves[half], keys.index());
      tcgen05_commit(shared.scores_full + half);
    };

    bool started = false;      // there is a tile to end
    bool is_new_query = true;  // the next tile is a query tile's first
    for (uint32_t flags = 0;;) {
      if (started) {
        kv.consumer_wait(values);
        if constexpr (fallback) {
          mbarrier_arrive(&shared.v_full);
          mbarrier_wait(&shared.v_clean_full, clean.phase());
          clean.advance();
        }
        end_tile(flags, 0);
      }
      key_tile_info.consumer_wait(key_tile);
      const uint32_t next = shared.key_tiles[key_tile.index()].flags;
      mbarrier_arrive(key_tile_info.empty + key_tile.index());
      key_tile.advance();
      const bool continues = !(next & no_more_tiles);
      if (continues) {
        if (is_new_query) {
          q.consumer_wait(query);
          query.advance();
        }
        kv.consumer_wait(keys);
        start_tile(next, 0);
      }
      if (started) {
        end_tile(flags, 1);
        tcgen05_commit(kv.empty + values.index());
        values.advance(2);
        if (flags & last_tile) work_tile.advance();
      }
      if (!continues) break;
      start_tile(next, 1);
      tcgen05_commit(kv.empty + keys.index());
      keys.advance(2);
      is_new_query = next & last_tile;
      if (is_new_query) tcgen05_commit(q.empty);
      flags = next;
      started = true;
    }
    // Until the last output has been read.
    for (int half = 0; half < 2; ++half)
      mbarrier_wait(shared.output_empty + half, work_tile.phase() ^ 1);
    tcgen05_after_thread_sync();
  }

  // Softmax ---------------------------------------------------------------------------------------

  // The next key tile of a warp that reads them all.
  __device__ __forceinline__ KeyTileInfo take_key_tile(KeyTileState& key_tile) const {
    key_tile_info.consumer_wait(key_tile);
    const int4 raw = *reinterpret_cast<const int4*>(shared.key_tiles + key_tile.index());
    __syncwarp();
    key_tile_info.consumer_release(key_tile);
    key_tile.advance();
    return {{raw.x, raw.y, raw.z}, static_cast<uint32_t>(uniform(raw.w))};
  }

  // Multiplies the output of the warp's rows, 32 columns at a time.
  __device__ __forceinline__ static void rescale_output(uint32_t output, float by) {
    if constexpr (fallback) by = fmaxf(by, 0x1p-149f);  // 0 would make NaN of inf
#pragma unroll 1
    for (int column = 0; column < head_dim; column += 32) {
      float part[32];
      tmem_load(part, output + column);
      tmem_wait_load(part);
#pragma unroll
      for (float& x : part) x *= by;
      tmem_store(output + column, part);
    }
  }

  // Puts P into the place of S, and arrives when three quarters of it are there and when all are.
  template <int emulated_of_16>
  __device__ __forceinline__ void exp2_and_store(const float (&scores)[128], Softmax& softmax,
                                                 uint32_t in_scores, int half) const {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      uint32_t probs[16];
      exp2_scores<Element, emulated_of_16>(scores + 32 * part, params.scale_log2, softmax, probs);
      tmem_store(in_scores + 16 * part, probs);
      if (part < 2) continue;
      tmem_wait_store();
      tcgen05_before_thread_sync();
      __syncwarp();
      arrive_by_warp((part == 2 ? shared.probs_full : shared.last_probs_full) + half);
    }
  }

  // The four warps of a half.
  __device__ __forceinline__ void softmax(int half, uint32_t tmem) const {
    const int row = threadIdx.x % 128;
    const uint32_t lanes = tmem + (row / 32 * 32 << 16);
    const uint32_t in_scores = lanes + scores_column(half);
    const uint32_t in_output = lanes + output_column(half);
    const float scale = params.scale_log2;
    WorkState state;
    KeyTileState key_tile;
    PipelineState<1> step, clean;
    for (;; state.advance()) {
      const PipelineState<1> work_tile{state.count};
      work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = shared.work_tiles[state.index()];
      if (uniform(static_cast<int>(work.is_end))) break;
      Softmax softmax;
      bool fresh = true;  // there is no output yet
      for (bool is_last = false; !is_last;) {
        const KeyTileInfo tile = take_key_tile(key_tile);
        is_last = tile.flags & last_tile;
        if (is_skipped(tile.flags, half)) {
          if constexpr (fallback) {
            mbarrier_wait(&shared.v_clean_full, clean.phase());
            arrive_by_warp(&shared.v_clean_empty);
            clean.advance();
          }
          continue;
        }
        Bitmask bitmask;
        if constexpr (fallback)
          for (uint32_t& word : bitmask.word) word = all_bits;
        const bool masked = find_bitmask(params, work, tile, half, row, bitmask);
        mbarrier_wait(shared.scores_full + half, step.phase());
        step.advance();
        tcgen05_after_thread_sync();
        if constexpr (fallback) {
          mbarrier_wait(&shared.v_clean_full, clean.phase());
          clean.advance();
          if (fresh) mbarrier_wait(shared.output_empty + half, work_tile.phase() ^ 1);
          tcgen05_after_thread_sync();
          put_back_non_finite<head_dim>(in_output, fresh, shared.non_finite, bitmask);
          __syncwarp();
          arrive_by_warp(&shared.v_clean_empty);
        }
        float scores[128];
        const auto load_scores = [&] {
#pragma unroll
          for (int column = 0; column < 128; column += 32)
            tmem_load(scores + column, in_scores + column);
          tmem_wait_load(scores);
          if (masked) apply_bitmask(scores, bitmask);
        };
        load_scores();
        const float scaled = max_of(scores) * scale;
        if (__any_sync(full_warp, scaled > softmax.limit)) {
          // The MMAs before these scores are done, so the output is there to be rescaled. No registers hold
          // the scores meanwhile.
          const float by =
              update_row_max(softmax, scaled, fallback ? 0.0f : rescale_threshold<Element>);
          if (!fresh) rescale_output(in_output, by);
          load_scores();
        }
        // As in dense attention, and whatever the probabilities are.
        if (!(scaled < infinity)) softmax.row_sum = nanf("");
        fresh = false;
        // Compute capability 10.0 has half as many exponentials a clock as 10.3.
        if (params.minor == 0)
          exp2_and_store<emulated>(scores, softmax, in_scores, half);
        else
          exp2_and_store<0>(scores, softmax, in_scores, half);
      }
      mbarrier_wait(shared.row_stats_empty + half, work_tile.phase() ^ 1);
      shared.row_stats[half][row] = {softmax.row_max, softmax.row_sum};
      __syncwarp();
      arrive_by_warp(shared.row_stats_full + half);
      work_pipeline.consumer_release(state);
    }
  }
};

}  // namespace gna::sm100
