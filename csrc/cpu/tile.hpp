// What the passes over one tile share: chunks of the stream, masks, weights as the products read them.
#pragma once

#include "kernel.hpp"
#include "panels.hpp"

namespace gna::GNA_ISA {

constexpr float log2_e = 0x1.715476p0f;
constexpr float ln_2 = 0x1.62e43p-1f;
constexpr float infinity = __builtin_inff();

// Hands out parts of the scratch memory.
struct Scratch {
  float* next;
  GNA_INLINE float* take(int64_t cells) {
    float* const part = next;
    next += (cells + padding - 1) / padding * padding;
    return part;
  }
  template <class Math>
  GNA_INLINE typename Math::Cell* panel(int64_t cells) {
    return reinterpret_cast<typename Math::Cell*>(take(cells));
  }
};

// Calls visit(tokens, masks, count) for each chunk; masks is null where all lanes see all tokens.
template <class Visit>
GNA_INLINE void for_chunks(const TileTokens& tile, Visit visit) {
  for (int at = 0; at < tile.interiors; at += chunk) {
    const int left = tile.interiors - at;
    visit(tile.interior + at, static_cast<const uint64_t*>(nullptr), left < chunk ? left : chunk);
  }
  for (int at = 0; at < tile.boundaries; at += chunk) {
    const int left = tile.boundaries - at;
    visit(tile.boundary + at, tile.masks + at, left < chunk ? left : chunk);
  }
}

// The lanes of vector v in a mask.
GNA_INLINE uint32_t lane_bits(uint64_t mask, int v) {
  return static_cast<uint32_t>(mask >> (v * width)) & ((1u << width) - 1u);
}

// Weights [rows][lanes] in the cells that `accumulate` reads, [rows / per_cell][lanes].
// `some`: the vectors of per_cell consecutive rows.
template <class Math>
GNA_INLINE void store_weights(float* weights, int row, int lanes, int v,
                              const Vec (&some)[Math::per_cell]) {
  float* const to = weights + row / Math::per_cell * lanes + v * width;
  if constexpr (Math::per_cell == 1) {
    store(to, some[0]);
  } else {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh(some[1], some[0]);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    store(to, _mm512_permutexvar_epi16(order, bits_of<__m512i>(both)));
#endif
  }
}

template <class Math>
GNA_INLINE Vec load_weight(const float* weights, int row, int lanes, int v) {
  const float* const from = weights + row / Math::per_cell * lanes + v * width;
  if constexpr (Math::per_cell == 1) return load<Vec>(from);
  const Words both = load<Words>(from);
  return bits_of<Vec>(row % 2 ? both & 0xffff0000u : both << 16);
}

// `accumulate` for streamed tokens with inf or NaN among them: hidden pairs, whose weight is 0, stay
// out even so.
template <class In, class Math>
void accumulate_visible(const Rows& rows, const int32_t* tokens, const uint64_t* masks, int count,
                        int head_dim, const float* weights, int lanes, float* sum,
                        const float* factor, float* room) {
  if (factor)
    for (int d = 0; d < head_dim; ++d)
      for (int lane = 0; lane < lanes; lane += width)
        store(sum + d * lanes + lane, load<Vec>(sum + d * lanes + lane) * load<Vec>(factor + lane));
  Watch ignored;
  for (int row = 0; row < count; ++row) {
    read_row<In>(rows, tokens[row], head_dim, room, ignored);
    for (int v = 0; v < lanes / width; ++v) {
      const Vec weight = load_weight<Math>(weights, row, lanes, v);
      const uint32_t bits = lane_bits(masks[row], v);
      for (int d = 0; d < head_dim; ++d) {
        float* const to = sum + d * lanes + v * width;
        store(to, load<Vec>(to) + select(bits, weight * room[d], Vec{}));
      }
    }
  }
}

// sum = sum * factor + weights times the streamed tokens that `panel` holds.
template <class In, class Math>
GNA_INLINE void add_weighted(const Rows& rows, const int32_t* tokens, const uint64_t* masks,
                             int count, int head_dim, const typename Math::Cell* panel,
                             bool finite, const float* weights, int lanes, float* sum,
                             const float* factor, float* room) {
  if (masks && !finite)
    accumulate_visible<In, Math>(rows, tokens, masks, count, head_dim, weights, lanes, sum, factor,
                                 room);
  else
    accumulate<Math>(panel, padded(head_dim), head_dim, weights,
                     (count + Math::per_cell - 1) / Math::per_cell, lanes, sum, factor);
}

}  // namespace gna::GNA_ISA
