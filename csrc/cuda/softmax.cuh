// What both kernels' softmax agrees on.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

namespace gna::cuda {

// The largest shifted score that needs no new offset: 2 to it, and sums of it, must be far below what
// the type of the weights can hold. The higher, the seldomer offsets change.
template <typename Element>
constexpr float most_shifted = std::is_same_v<Element, __half> ? 10.0f : 30.0f;

}  // namespace gna::cuda
