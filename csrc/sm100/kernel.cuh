// The Blackwell kernel: persistent blocks of 16 warps, each with one role.
#pragma once

#include "epilogue.cuh"
#include "mainloop.cuh"

namespace gna::sm100 {

template <typename Element, int head_dim, bool fallback>
struct Kernel {
  // Queries are loaded and output is stored by halves.
  static constexpr int log2_query_tile = log2_tile_m;
  static constexpr int log2_query_box = log2_half;
  static constexpr int log2_output_box = log2_half;
  static constexpr int threads = sm100::threads;
  static constexpr int shared_bytes = sm100::shared_bytes<head_dim>;

  __device__ __forceinline__ static void run(const Params& params) {
    using Storage = SharedStorage<head_dim>;
    extern __shared__ __align__(1024) uint8_t raw[];
    auto& shared = *reinterpret_cast<Storage*>(raw);
    const Mainloop<Element, head_dim, fallback> mainloop(params, shared);
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    if (threadIdx.x == 0) mainloop.init_barriers();
    if (warp == mma_warp) tmem_allocate<tmem_columns>(&shared.tmem);
    tcgen05_before_thread_sync();
    __syncthreads();
    tcgen05_after_thread_sync();
    const uint32_t tmem = shared.tmem;
    if (warp < epilogue_warp) {
      reg_alloc<Storage::softmax_registers>();
      mainloop.softmax(warp / 4, tmem);
    } else if (warp < mma_warp) {
      reg_dealloc<Storage::epilogue_registers>();
      Epilogue<Element, head_dim, fallback>(mainloop).run(tmem);
    } else {
      reg_dealloc<Storage::other_registers>();
      if (warp == mma_warp) {
        if (elect_one_sync()) mainloop.mma(tmem);
        __syncwarp();
        tmem_free<tmem_columns>(tmem);
      } else if (warp == load_warp) {
        mainloop.load();
      } else if (warp == scheduler_warp) {
        schedule_work_tiles(params, shared.work_tiles, mainloop.work_pipeline);
      }
    }
  }
};

}  // namespace gna::sm100
