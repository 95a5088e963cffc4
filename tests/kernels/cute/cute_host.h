// CuTe's headers for the host, and its names of our element types.
#pragma once

#include <cstddef>
#include <cstdint>

// CuTe's host code takes an address in shared memory for what device_on_host.h takes it for.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline size_t __cvta_generic_to_shared(const void* pointer);

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// clang-format off: the first one is needed by the others
#include <cute/tensor.hpp>
#include <cute/atom/copy_traits_sm100.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm100.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
// clang-format on

namespace gna {

template <typename Element>
struct CuteElement;
template <>
struct CuteElement<__half> {
  using type = cute::half_t;
};
template <>
struct CuteElement<__nv_bfloat16> {
  using type = cute::bfloat16_t;
};
template <typename Element>
using CuteElementOf = typename CuteElement<Element>::type;

// A tile in shared memory as both kernels have it: boxes of 64 columns, 128 bytes wide, one after the other.
template <typename Element, int rows, int columns>
auto k_major_tile(uint8_t* base) {
  using namespace cute;
  using T = CuteElementOf<Element>;
  return make_tensor(
      make_smem_ptr(reinterpret_cast<T*>(base)),
      tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<rows>, Int<columns>>{}));
}

// The same tile with its columns as rows: the right operand of O = P V.
template <typename Element, int rows, int columns>
auto mn_major_tile(uint8_t* base) {
  using namespace cute;
  using T = CuteElementOf<Element>;
  return make_tensor(make_smem_ptr(reinterpret_cast<T*>(base)),
                     tile_to_shape(GMMA::Layout_MN_SW128_Atom<T>{},
                                   Shape<Int<columns>, Int<rows>>{}, Step<_2, _1>{}));
}

// Where an element of such a tile lies.
template <typename Tensor>
uint8_t* address_of(const Tensor& tile, int row, int column) {
  return reinterpret_cast<uint8_t*>(&tile(row, column));
}

}  // namespace gna
