// Which tokens meet in which tile: boxes of the grid in lanes, what they see streamed past them.
#pragma once

#include <cstdint>
#include <vector>

#include "gna/axis.h"
#include "gna_cpu.h"
#include "kernel.hpp"

namespace gna {

// What a tile has in its lanes; the other side is streamed.
enum class Role { queries, keys };

// A box on one axis, in positions of one dilation group.
struct AxisTile {
  int32_t group;
  Range lanes;
  Range stream;    // visible from any lane
  Range interior;  // visible from all lanes; may be empty
};

// One axis cut into boxes of 2^log2_box, all dilation groups one after another.
class AxisTiles {
 public:
  AxisTiles(const gna_axis& axis, int32_t log2_box, Role role);

  int32_t count() const { return static_cast<int32_t>(tiles_.size()); }
  const AxisTile& operator[](int32_t index) const { return tiles_[index]; }
  int32_t log2_box() const { return log2_box_; }

  // The lanes, counted from the box's first, that see (or are seen by) a streamed position.
  Range lanes_that_see(const AxisTile& tile, int32_t streamed) const;

  // A group's position as a token of the axis.
  int32_t token(const AxisTile& tile, int32_t position) const {
    return tile.group + dilation_ * position;
  }

 private:
  Axis group_axis(int32_t group) const;

  gna_axis axis_;
  int32_t log2_box_, dilation_;
  Role role_;
  std::vector<AxisTile> tiles_;
};

// The global tokens of one batch element: those whose keys are visible, and the others.
struct GlobalTokens {
  std::vector<int32_t> all, visible, hidden;
  GlobalTokens(const gna_problem& problem, int32_t batch);
};

// A grid cut into tiles, longest first.
class Tiling {
 public:
  Tiling(const gna_problem& problem, Role role);

  int64_t count() const { return static_cast<int64_t>(order_.size()); }
  int32_t tokens() const { return tokens_; }  // prefix, grid and suffix
  int64_t pairs() const { return pairs_; }    // (lane, streamed token) pairs of all grid tiles

  // A tile of the grid. The lists stay valid until the next call with the same `lists`.
  struct Lists {
    TileTokens tile;
    std::vector<int32_t> interior, boundary;
    std::vector<uint64_t> masks, row_masks;
  };
  void grid_tile(int64_t index, const GlobalTokens& globals, Lists& lists) const;

  // The global tokens some[begin, end) in lanes, at most most_lanes of them, and all that they see
  // (of keys) or that sees them (of queries).
  void global_tile(const std::vector<int32_t>& some, int64_t begin, const GlobalTokens& globals,
                   Lists& lists) const;

 private:
  struct Place {
    AxisTile axis[3];
  };
  Place place(int64_t index) const;
  int64_t streamed(const Place& place) const;

  Role role_;
  int32_t prefix_, tokens_, lanes_;
  int32_t lengths_[3];
  std::vector<AxisTiles> axes_;  // always three
  std::vector<int32_t> order_;
  int64_t pairs_ = 0;
};

// Fewest lanes, of 16, 32 and 64, that hold `count` tokens if 64 do.
int32_t lanes_for(int64_t count);

}  // namespace gna
