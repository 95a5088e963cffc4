// The epilogue of a query tile: divides the output by the row sums and stores it, with the logsumexp. Four
// warps; in the fallback they also clean values.
#pragma once

#include "../cuda/logsumexp.cuh"
#include "mainloop.cuh"

namespace gna::sm100 {

template <typename Element, int head_dim, bool fallback>
struct Epilogue {
  using Storage = SharedStorage<head_dim>;
  using OutputState = PipelineState<Storage::output_stages>;

  const Mainloop<Element, head_dim, fallback>& mainloop;
  const Params& params;
  Storage& shared;

  __device__ __forceinline__ explicit Epilogue(const Mainloop<Element, head_dim, fallback>& mainloop)
      : mainloop(mainloop), params(mainloop.params), shared(mainloop.shared) {}

  __device__ __forceinline__ void run(uint32_t tmem) const {
    const uint32_t lanes = tmem + (threadIdx.x % 128 / 32 * 32 << 16);
    PipelineState<Storage::work_stages> state;
    OutputState output_state;
    uint32_t tiles = 0;
    for (;; state.advance()) {
      mainloop.work_pipeline.consumer_wait(state);
      const WorkTileInfo& work = shared.work_tiles[state.index()];
      if (uniform(static_cast<int>(work.is_end))) break;
      if constexpr (fallback) clean_values(tiles);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) store_half(work, half, lanes, state.count & 1, output_state);
      __syncwarp();
      mainloop.work_pipeline.consumer_release(state);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read();
  }

  __device__ __forceinline__ void store_half(const WorkTileInfo& work, int half, uint32_t lanes,
                                             uint32_t phase, OutputState& output_state) const {
    const int row = threadIdx.x % 128;
    const bool has_rows = uniform(static_cast<int>(work.has_rows[half]));
    mbarrier_wait(shared.row_stats_full + half, phase);
    const RowStats row_stats = shared.row_stats[half][row];
    __syncwarp();
    arrive_by_warp(shared.row_stats_empty + half);
    mbarrier_wait(shared.output_full + half, phase);
    tcgen05_after_thread_sync();
    const float inverse = row_stats.sum == 0.0f ? 0.0f : __fdividef(1.0f, row_stats.sum);
    float zero = 0.0f;
    if (has_rows) {
#pragma unroll 1
      for (int box = 0; box < Storage::boxes; ++box, output_state.advance()) {
        // Tensor memory to shared memory, once the previous box has left its stage.
        uint8_t* const to = shared.output[output_state.index()];
        if (row == 0) tma_store_wait_read<Storage::output_stages - 1>();
        named_barrier_sync<epilogue_threads>(epilogue_barrier);
#pragma unroll
        for (int column = 0; column < box_columns; column += 32) {
          float part[32];
          tmem_load(part, lanes + output_column(half) + box * box_columns + column);
          tmem_wait_load(part);
#pragma unroll
          for (float& x : part) {
            zero += 0.0f * x;
            x *= inverse;
          }
#pragma unroll
          for (int i = 0; i < 32; i += 8) {
            const int chunk = (column + i) / 8 ^ row % 8;
            *reinterpret_cast<uint4*>(to + row * row_bytes + chunk * 16) = {
                pack<Element>(part[i], part[i + 1]), pack<Element>(part[i + 2], part[i + 3]),
                pack<Element>(part[i + 4], part[i + 5]), pack<Element>(part[i + 6], part[i + 7])};
          }
        }
        fence_proxy_async();
        named_barrier_sync<epilogue_threads>(epilogue_barrier);

        // Shared memory to global memory: TMA leaves out rows outside the grid.
        if (row == 0) {
          int at[max_axes];
          coordinates_of_rows(params.problem, work, half * half_rows, at);
          tma_store(params.output.of_part[work.tile.part], to, box * box_columns, at[2], at[1], at[0],
                    plane_of(params.output, work.batch, work.head));
          tma_store_commit();
        }
      }
    }
    tcgen05_before_thread_sync();
    __syncwarp();
    arrive_by_warp(shared.output_empty + half);
    if (!has_rows) return;
    // A sum that is NaN comes from scores, and is right.
    if (!fallback && zero != 0.0f && row_stats.sum == row_stats.sum) request_fallback(params);
    store_logsumexp(params, work, half * half_rows + row, row_stats.max, row_stats.sum);
  }

  // Cleans all values of a query tile, as they come. `tiles`: key tiles of all query tiles so far.
  __device__ __forceinline__ void clean_values(uint32_t& tiles) const {
    for (bool is_last = false; !is_last; ++tiles) {
      PipelineState<Storage::key_tile_stages> key_tile{tiles};
      const PipelineState<Storage::stages> values{2 * tiles + 1};
      is_last = mainloop.take_key_tile(key_tile).flags & last_tile;
      mbarrier_wait(&shared.v_full, tiles & 1);
      mbarrier_wait(&shared.v_clean_empty, ~tiles & 1);
      take_out_non_finite<Element, head_dim, epilogue_threads>(shared.tiles[values.index()],
                                                               threadIdx.x % 128, shared.non_finite);
      __syncwarp();
      arrive_by_warp(&shared.v_clean_full);
    }
  }
};

}  // namespace gna::sm100
