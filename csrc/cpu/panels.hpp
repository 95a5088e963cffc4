// Tokens from their tensors into the forms that the micro-kernel reads, and results back.
//
// A *panel* holds streamed tokens: for `dots` row-major cells along the head size, for `accumulate`
// row-major cells along the tokens (the same thing unless a cell is a pair). *Lanes* hold a tile's
// own tokens transposed, [head_dim][lanes].
#pragma once

#include <utility>

#include "kernel.hpp"
#include "microkernel.hpp"

namespace gna::GNA_ISA {

constexpr int padding = 16;  // panels' rows are padded to this many cells

GNA_INLINE int padded(int size) { return (size + padding - 1) / padding * padding; }

// `count` elements from `at` on, `step` apart; the rest of the vector is zero.
template <class In>
GNA_INLINE void gather(const typename In::Element* at, int64_t step, int count,
                       typename In::Element* to) {
  for (int i = 0; i < width; ++i) to[i] = i < count ? at[i * step] : 0;
}

// Calls visit(d, elements) for each vector of a token's row, zero beyond its end.
template <class In, class Visit>
GNA_INLINE void for_row(const Rows& rows, int64_t token, int head_dim, Visit visit) {
  const auto* row = static_cast<const typename In::Element*>(rows.data) + token * rows.token_step;
  int d = 0;
  if (rows.dim_step == 1)
    for (; d + width <= head_dim; d += width) visit(d, row + d);
  for (; d < head_dim; d += width) {
    typename In::Element some[width];
    gather<In>(row + d * rows.dim_step, rows.dim_step,
               head_dim - d < width ? head_dim - d : width, some);
    visit(d, static_cast<const typename In::Element*>(some));
  }
}

// Whether any element that went by was inf or NaN: 0 times such an element is NaN.
struct Watch {
  Vec zeros{};
  GNA_INLINE void operator()(Vec value) { zeros = value * 0.f + zeros; }
  GNA_INLINE bool any() const {
    bool all_zero = true;
    for (int i = 0; i < width; ++i) all_zero &= zeros[i] == 0;
    return !all_zero;
  }
};

// A token's row in fp32, padded with zeros to `padded(head_dim)`.
template <class In>
GNA_INLINE void read_row(const Rows& rows, int64_t token, int head_dim, float* to, Watch& watch) {
  for_row<In>(rows, token, head_dim, [&](int d, const auto* some) {
    const Vec value = In::load(some);
    watch(value);
    store(to + d, value);
  });
}

// The panel for `dots`; its pitch is dots_pitch.
template <class Math>
GNA_INLINE int dots_depth(int head_dim) {
  return (head_dim + Math::per_cell - 1) / Math::per_cell;
}
template <class Math>
GNA_INLINE int dots_pitch(int head_dim) {
  return padded(dots_depth<Math>(head_dim));
}

template <class In, class Math>
void read_for_dots(const Rows& rows, const int32_t* tokens, int count, int head_dim,
                   typename Math::Cell* panel) {
  Watch ignored;
  const int pitch = dots_pitch<Math>(head_dim);
  for (int row = 0; row < count; ++row) {
    auto* to = panel + int64_t{row} * pitch;
    if constexpr (Math::per_cell == 1) {
      read_row<In>(rows, tokens[row], head_dim, to, ignored);
    } else {
      for_row<In>(rows, tokens[row], head_dim, [&](int d, const auto* some) {
        store(to + d / 2, load<Halves>(some));
      });
    }
  }
}

// The panel for `accumulate`, pitch padded(head_dim); returns whether a value is inf or NaN.
template <class In, class Math>
bool read_for_sums(const Rows& rows, const int32_t* tokens, int count, int head_dim,
                   typename Math::Cell* panel) {
  Watch watch;
  const int pitch = padded(head_dim);
  if constexpr (Math::per_cell == 1) {
    for (int row = 0; row < count; ++row)
      read_row<In>(rows, tokens[row], head_dim, panel + int64_t{row} * pitch, watch);
  } else {
    for (int row = 0; row < count; row += 2) {
      auto* to = panel + int64_t{row / 2} * pitch;
      for_row<In>(rows, tokens[row], head_dim, [&](int d, const auto* some) {
        const Words low = widen(load<Halves>(some));
        watch(bits_of<Vec>(low << 16));
        store(to + d, low);
      });
      if (row + 1 == count) break;
      for_row<In>(rows, tokens[row + 1], head_dim, [&](int d, const auto* some) {
        const Words high = widen(load<Halves>(some)) << 16;
        watch(bits_of<Vec>(high));
        store(to + d, load<Words>(to + d) | high);
      });
    }
  }
  return watch.any();
}

// Transposing a square of vectors in registers, in log2(width) rounds of two-vector shuffles.

template <int... index>
GNA_INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, Ints{index...});
#endif
}

template <int half, int... lane>
GNA_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
  const Vec low = shuffle<(lane & half ? width + lane - half : lane)...>(a, b);
  const Vec high = shuffle<(lane & half ? width + lane : lane + half)...>(a, b);
  a = low;
  b = high;
}

template <int half>
GNA_INLINE void exchange_all(Vec (&square)[width]) {
  if constexpr (half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i)
      if (!(i & half))
        exchange<half>(square[i], square[i + half], std::make_integer_sequence<int, width>{});
    exchange_all<half / 2>(square);
  }
}

// to [columns][rows] = from [rows][columns], both multiples of the width.
inline void transpose(const float* from, int rows, int columns, float* to) {
  for (int row = 0; row < rows; row += width)
    for (int column = 0; column < columns; column += width) {
      Vec square[width];
      for (int i = 0; i < width; ++i)
        square[i] = load<Vec>(from + int64_t{row + i} * columns + column);
      exchange_all<width / 2>(square);
      for (int i = 0; i < width; ++i)
        store(to + int64_t{column + i} * rows + row, square[i]);
    }
}

// A tile's own tokens, transposed cells [dots_pitch][lanes]; empty lanes are zero.
template <class In, class Math>
void read_lanes(const Rows& rows, const TileTokens& tokens, int head_dim, float* to, float* room) {
  const int pitch = dots_pitch<Math>(head_dim);
  for (int lane = 0; lane < tokens.lanes; ++lane) {
    auto* row = reinterpret_cast<typename Math::Cell*>(room) + int64_t{lane} * pitch;
    if (tokens.lane_tokens[lane] < 0)
      memset(row, 0, sizeof(float) * pitch);
    else
      read_for_dots<In, Math>(rows, tokens.lane_tokens + lane, 1, head_dim, row);
  }
  transpose(room, tokens.lanes, pitch, to);
}

// Writes sums [padded(head_dim)][lanes] times factor[lane] to the tile's own tokens.
template <class In>
void write_lanes(const float* sums, const float* factor, const TileTokens& tokens, int head_dim,
                 const Rows& rows, float* room) {
  const int pitch = padded(head_dim);
  transpose(sums, pitch, tokens.lanes, room);
  for (int lane = 0; lane < tokens.lanes; ++lane) {
    if (tokens.lane_tokens[lane] < 0) continue;
    auto* row = static_cast<typename In::Element*>(rows.data) +
                tokens.lane_tokens[lane] * rows.token_step;
    for (int d = 0; d < head_dim; d += width) {
      const Vec value = load<Vec>(room + int64_t{lane} * pitch + d) * factor[lane];
      if (rows.dim_step == 1 && d + width <= head_dim) {
        In::store(row + d, value);
        continue;
      }
      typename In::Element some[width];
      In::store(some, value);
      for (int i = 0; i < width && d + i < head_dim; ++i) row[(d + i) * rows.dim_step] = some[i];
    }
  }
}

}  // namespace gna::GNA_ISA
