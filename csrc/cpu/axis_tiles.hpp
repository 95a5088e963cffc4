// One axis of the grid in lanes, cut into boxes, and what they see along the same axis of another grid.
//
// Tokens of an axis are those of the whole grid, whatever box of it is at hand.
#pragma once

#include <cstdint>
#include <vector>

#include "gna/axis.h"
#include "sides.hpp"

namespace gna {

inline int64_t size(Range range) { return range.end > range.begin ? range.end - range.begin : 0; }

// A box on one axis: the tokens first, first + step, ...
struct AxisTile {
  int32_t first, lanes;
};

// What is at hand of an axis, cut into boxes of 2^log2_box tokens.
class AxisTiles {
 public:
  AxisTiles(Range at_hand, int32_t step, int32_t log2_box);

  int32_t count() const { return static_cast<int32_t>(tiles_.size()); }
  const AxisTile& operator[](int32_t index) const { return tiles_[index]; }
  int32_t log2_box() const { return log2_box_; }
  int32_t step() const { return step_; }
  int32_t token(const AxisTile& tile, int32_t lane) const { return tile.first + step_ * lane; }

 private:
  int32_t step_, log2_box_;
  std::vector<AxisTile> tiles_;
};

// What is streamed past a box along an axis: positions of one dilation group.
struct AxisStream {
  int32_t group;
  Range all;       // visible from any lane
  Range interior;  // visible from all lanes; may be empty
};

// An axis of the grid in lanes against the same axis of a grid that is streamed.
class AxisSight {
 public:
  AxisSight() = default;
  // at_hand: of the streamed grid. limited: whether a window hides anything of it.
  AxisSight(const gna_axis& window, Range at_hand, bool limited, Role role)
      : window_(window),
        at_hand_(at_hand),
        dilation_(limited ? window.dilation : 1),
        limited_(limited),
        role_(role) {}

  int32_t dilation() const { return dilation_; }
  int32_t token(const AxisStream& stream, int32_t position) const {
    return stream.group + dilation_ * position;
  }

  AxisStream stream(const AxisTiles& tiles, const AxisTile& tile) const;

  // The lanes, counted from the box's first, that see (or are seen by) a streamed position.
  Range lanes_that_see(const AxisTiles& tiles, const AxisTile& tile, const AxisStream& stream,
                       int32_t position) const;

 private:
  Axis group_axis(int32_t group) const;

  gna_axis window_{};
  Range at_hand_{};
  int32_t dilation_ = 1;
  bool limited_ = false;
  Role role_ = Role::queries;
};

// The step between the lanes of a box, so that they lie in one dilation group of every sight.
int32_t lane_step(const std::vector<AxisSight>& sights, Range at_hand);

}  // namespace gna
