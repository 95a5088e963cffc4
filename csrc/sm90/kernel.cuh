// The Hopper kernel: persistent blocks of three warpgroups, one producer and two consumers.
#pragma once

#include "fallback.cuh"
#include "mainloop.cuh"

namespace gna::sm90 {

template <typename Element, int head_dim, bool fallback>
struct Kernel {
  // Queries are loaded for both consumers at once; each stores its own output.
  static constexpr int log2_query_tile = log2_tile_m;
  static constexpr int log2_query_box = log2_tile_m;
  static constexpr int log2_output_box = log2_half;
  static constexpr int threads = sm90::threads;
  static constexpr int shared_bytes = sm90::shared_bytes<head_dim>;

  __device__ __forceinline__ static void run(const Params& params) {
    extern __shared__ uint8_t raw[];
    uint8_t* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
    const std::conditional_t<fallback, Fallback<Element, head_dim>, Mainloop<Element, head_dim>>
        mainloop(params, shared);
    if (threadIdx.x == 0) mainloop.init_barriers();
    if (!fallback && threadIdx.x < 128) {
      write_key_coordinates(params.key_coordinates,
                            shared + offsetof(SharedStorage<head_dim>, key_coordinates));
      fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x < producer_threads) {
      reg_dealloc<producer_registers>();
      mainloop.produce();
    } else {
      reg_alloc<consumer_registers>();
      mainloop.consume(uniform(static_cast<int>(threadIdx.x) / 128 - 1));
    }
  }
};

}  // namespace gna::sm90
