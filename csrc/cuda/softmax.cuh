// What both architectures' online softmax (Milakov and Gimelshein, arXiv 1805.02867) agrees on.
//
// Rescaling is conditional, as in FlashAttention-4. A row's probabilities are 2^(scaled score - row_max),
// where row_max is a reference: it need not be the largest score so far, only near enough that no
// probability overflows. The output does not depend on it, since the row's sum is relative to the same
// reference. Hence the reference is updated, and the output rescaled, only when a score is far larger.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

namespace gna::cuda {

constexpr float infinity = __builtin_huge_valf();

// How far above its row_max, in powers of two, a score may lie. The type of the probabilities must hold
// 2 to that, and sums of it. The higher, the less often outputs are rescaled.
template <typename Element>
constexpr float rescale_threshold = std::is_same_v<Element, __half> ? 10.0f : 30.0f;

}  // namespace gna::cuda
