// One compiled kernel: what the host needs to launch it. Each instantiation has a source file of its
// own, to be compiled alone.
#pragma once

#include <cuda_runtime.h>

#include "nonfinite.cuh"
#include "params.h"

namespace gna::cuda {

struct CompiledKernel {
  // log2 of the tokens of a query tile, of a box of queries that is loaded at once, and of a box of
  // output that is stored at once.
  int32_t log2_query_tile, log2_query_box, log2_output_box;
  cudaError_t (*prepare)();  // on the current device
  cudaError_t (*launch)(const Params& params, int blocks, cudaStream_t stream);
};

// By type and head size. Smaller head sizes too: TMA fills the missing columns with zeros
// and does not write them.
extern const CompiledKernel bf16_64, bf16_128, fp16_64, fp16_128;

#if defined(__CUDACC__)

template <template <typename, int, bool> class Kernel, typename Element, int head_dim>
__global__ void __launch_bounds__(Kernel<Element, head_dim, false>::threads, 1)
    forward(const __grid_constant__ Params params) {
  Kernel<Element, head_dim, false>::run(params);
}

// Follows each launch of `forward`, and ends at once unless that has requested it.
template <template <typename, int, bool> class Kernel, typename Element, int head_dim>
__global__ void __launch_bounds__(Kernel<Element, head_dim, true>::threads, 1)
    forward_fallback(const __grid_constant__ Params params) {
  if (!fallback_is_requested(params)) return;
  Kernel<Element, head_dim, true>::run(params);
  end_fallback(params);
}

template <template <typename, int, bool> class Kernel, typename Element, int head_dim>
cudaError_t prepare() {
  constexpr int bytes = Kernel<Element, head_dim, false>::shared_bytes;
  for (const auto& kernel :
       {forward<Kernel, Element, head_dim>, forward_fallback<Kernel, Element, head_dim>})
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
      return error;
  return cudaSuccess;
}

template <template <typename, int, bool> class Kernel, typename Element, int head_dim>
cudaError_t launch(const Params& params, int blocks, cudaStream_t stream) {
  using Shape = Kernel<Element, head_dim, false>;
  forward<Kernel, Element, head_dim><<<blocks, Shape::threads, Shape::shared_bytes, stream>>>(params);
  forward_fallback<Kernel, Element, head_dim>
      <<<blocks, Shape::threads, Shape::shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

// Kernel: an architecture's class template over (Element, head_dim, whether it is the fallback).
template <template <typename, int, bool> class Kernel, typename Element, int head_dim>
constexpr CompiledKernel compiled() {
  using Shape = Kernel<Element, head_dim, false>;
  return {Shape::log2_query_tile, Shape::log2_query_box, Shape::log2_output_box,
          prepare<Kernel, Element, head_dim>, launch<Kernel, Element, head_dim>};
}

#endif

}  // namespace gna::cuda

#define GNA_KERNEL(name, Kernel, Element, head_dim) \
  const gna::cuda::CompiledKernel gna::cuda::name = gna::cuda::compiled<Kernel, Element, head_dim>();
