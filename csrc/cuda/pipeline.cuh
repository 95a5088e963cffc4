// A ring of buffers in shared memory between producers and consumers.
#pragma once

#include "ptx.cuh"

namespace gna::cuda {

// Barriers of a ring of buffers: `full` when filled, `empty` when all its readers have released it.
struct Pipeline {
  uint64_t* full;
  uint64_t* empty;
};

// A count of buffers used so far of a ring of `stages`.
template <int stages>
struct PipelineState {
  uint32_t count = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(count % stages); }
  __device__ __forceinline__ uint32_t phase() const { return count / stages & 1; }
  __device__ __forceinline__ void advance(int by = 1) { count += by; }
  __device__ __forceinline__ PipelineState next() const { return {count + 1}; }
};

// This warp is done with a buffer.
__device__ __forceinline__ void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) arrive(empty);
}

}  // namespace gna::cuda
