// A ring of buffers in shared memory between a producer and its consumers.
#pragma once

#include "ptx.cuh"

namespace gna::cuda {

// The next stage of a pipeline that a producer fills or a consumer reads.
template <int stages>
struct PipelineState {
  uint32_t count = 0;  // of stages used so far

  __device__ __forceinline__ int index() const { return static_cast<int>(count % stages); }
  __device__ __forceinline__ uint32_t phase() const { return count / stages & 1; }
  __device__ __forceinline__ void advance(int by = 1) { count += by; }
  __device__ __forceinline__ PipelineState next() const { return {count + 1}; }
};

// Two barriers for each stage: `full` when it is filled, `empty` when all consumers have released it.
template <int stages>
struct PipelineBarriers {
  uint64_t full[stages], empty[stages];
};

template <int stages>
struct Pipeline {
  using State = PipelineState<stages>;

  uint64_t *full, *empty;

  __device__ __forceinline__ Pipeline(PipelineBarriers<stages>& barriers)
      : full(barriers.full), empty(barriers.empty) {}

  // `barriers`: the bytes of PipelineBarriers.
  __device__ __forceinline__ explicit Pipeline(uint8_t* barriers)
      : full(reinterpret_cast<uint64_t*>(barriers)), empty(full + stages) {}

  // The number of arrivals that complete a phase. One thread.
  __device__ __forceinline__ void init(int producers, int consumers) const {
    for (int stage = 0; stage < stages; ++stage) mbarrier_init(full + stage, producers);
    for (int stage = 0; stage < stages; ++stage) mbarrier_init(empty + stage, consumers);
  }

  // Waits until the stage may be filled again.
  __device__ __forceinline__ void producer_acquire(const State& state) const {
    mbarrier_wait(empty + state.index(), state.phase() ^ 1);
  }

  // The stage has been filled. One thread; a copy by TMA arrives at the barrier itself.
  __device__ __forceinline__ void producer_commit(const State& state) const {
    mbarrier_arrive(full + state.index());
  }

  // Waits until the stage is filled.
  __device__ __forceinline__ void consumer_wait(const State& state) const {
    mbarrier_wait(full + state.index(), state.phase());
  }

  // This warp no longer reads the stage.
  __device__ __forceinline__ void consumer_release(const State& state) const {
    arrive_by_warp(empty + state.index());
  }
};

}  // namespace gna::cuda
