// Tiles of a grid that is linked by a window: boxes in lanes, what they see of other grids streamed.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "axis_tiles.hpp"
#include "lists.hpp"
#include "sides.hpp"

namespace gna {

constexpr int most_axes = 3;  // grids with fewer axes get axes of one token before their own

using Coordinates = std::array<int32_t, most_axes>;

// Where the tokens at hand of a grid lie in their sequence.
struct GridTokens {
  GridTokens(const Sequence& sequence, int32_t segment);
  int32_t token(const Coordinates& at) const {
    return first + ((at[0] - begin[0]) * extent[1] + at[1] - begin[1]) * extent[2] + at[2] -
           begin[2];
  }
  int32_t first;
  Coordinates begin, extent;
};

class GridTiles {
 public:
  GridTiles(const Sides& sides, int32_t segment);

  int64_t count() const;
  int32_t lanes() const;
  // Tokens that a tile streams, those that turn out to be hidden from all of its lanes included.
  int64_t streamed(int64_t index) const;
  // Makes a tile of a batch element.
  void make(int64_t index, int32_t batch, Lists& lists) const;

 private:
  // A grid that is streamed. streams: of each box on an axis.
  struct Streamed {
    GridTokens grid;
    std::array<AxisSight, most_axes> sights;
    std::array<std::vector<AxisStream>, most_axes> streams;
  };
  using Place = std::array<int32_t, most_axes>;  // a box on each axis

  Place place(int64_t index) const;
  uint64_t set_lanes(const Place& place, TileTokens& tile) const;
  void stream(const Streamed& other, const Place& place, uint64_t used, Lists& lists) const;

  const Sides& sides_;
  GridTokens grid_;
  std::vector<AxisTiles> axes_;  // always three
  std::vector<Streamed> grids_;  // what the window reaches
  std::vector<int32_t> linked_;  // segments that all lanes see
  int64_t linked_tokens_ = 0;
};

// An axis of a segment that is linked by a window, against that of each segment at the other end.
std::vector<AxisSight> sights_along(const Sides& sides, int32_t segment, int32_t axis);

}  // namespace gna
