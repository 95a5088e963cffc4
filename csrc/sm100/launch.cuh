// Launches one instantiation of the kernel; each has a source file of its own, to be compiled alone.
#pragma once

#include "forward.cuh"

namespace gna::sm100 {

// Sets the kernel up on the current device.
template <typename Element, int head_dim>
cudaError_t prepare() {
  for (const auto& kernel : {forward<Element, head_dim>, forward_carefully<Element, head_dim>})
    if (const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<head_dim>))
      return error;
  return cudaSuccess;
}

template <typename Element, int head_dim>
cudaError_t launch(const Parameters& parameters, int blocks, cudaStream_t stream) {
  constexpr int bytes = shared_bytes<head_dim>;
  forward<Element, head_dim><<<blocks, threads, bytes, stream>>>(parameters);
  forward_carefully<Element, head_dim><<<blocks, threads, bytes, stream>>>(parameters);
  return cudaGetLastError();
}

}  // namespace gna::sm100

#define GNA_SM100_KERNEL(name, Element, head_dim)                                     \
  namespace gna::sm100 {                                                              \
  cudaError_t prepare_##name() { return prepare<Element, head_dim>(); }              \
  cudaError_t launch_##name(const Parameters& parameters, int blocks,                \
                            cudaStream_t stream) {                                   \
    return launch<Element, head_dim>(parameters, blocks, stream);                    \
  }                                                                                  \
  }
