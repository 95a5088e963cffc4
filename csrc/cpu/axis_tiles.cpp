#include "axis_tiles.hpp"

#include <algorithm>
#include <numeric>

namespace gna {

namespace {

// a / b upward, for any a and b >= 1.
int32_t ceil_div(int32_t a, int32_t b) { return a > 0 ? (a - 1) / b + 1 : -(-a / b); }

Range intersection(Range a, Range b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

}  // namespace

AxisTiles::AxisTiles(Range at_hand, int32_t step, int32_t log2_box)
    : step_(step), log2_box_(log2_box) {
  const int32_t extent = 1 << log2_box;
  for (int32_t first = at_hand.begin; first < std::min(at_hand.begin + step, at_hand.end);
       ++first) {
    const int32_t lanes = (at_hand.end - first - 1) / step + 1;
    for (int32_t lane = 0; lane < lanes; lane += extent)
      tiles_.push_back({first + step * lane, std::min(extent, lanes - lane)});
  }
}

Axis AxisSight::group_axis(int32_t group) const {
  return {group_length(window_.length, dilation_, group), window_.window, window_.stride,
          window_.causal != 0};
}

AxisStream AxisSight::stream(const AxisTiles& tiles, const AxisTile& tile) const {
  if (!limited_) return {0, at_hand_, at_hand_};
  const int32_t group = tile.first % dilation_;
  const Axis axis = group_axis(group);
  const Range lanes = {tile.first / dilation_, tiles.token(tile, tile.lanes - 1) / dilation_ + 1};
  const Range at_hand = {ceil_div(at_hand_.begin - group, dilation_),
                         ceil_div(at_hand_.end - group, dilation_)};
  if (role_ == Role::queries)
    return {group, intersection(union_of(axis, lanes), at_hand),
            intersection(intersection_of(axis, lanes), at_hand)};
  return {group, intersection(seen_by(axis, lanes), at_hand),
          intersection(all_seen_by(axis, lanes), at_hand)};
}

Range AxisSight::lanes_that_see(const AxisTiles& tiles, const AxisTile& tile,
                                const AxisStream& stream, int32_t position) const {
  if (!limited_) return {0, tile.lanes};
  const Axis axis = group_axis(stream.group);
  const Range all =
      role_ == Role::queries ? seen_by(axis, {position, position + 1}) : keys_of(axis, position);
  // Between two lanes lie this many positions of the group. A box of one lane may have any step.
  const int32_t stretch = std::max(tiles.step() / dilation_, 1);
  const int32_t first = tile.first / dilation_;
  return {ceil_div(all.begin - first, stretch), ceil_div(all.end - first, stretch)};
}

int32_t lane_step(const std::vector<AxisSight>& sights, Range at_hand) {
  // From as many as there are tokens on, each is alone in its box.
  const int64_t most = at_hand.end - at_hand.begin;
  int64_t step = 1;
  for (const AxisSight& sight : sights)
    step = std::min(std::lcm(step, int64_t{sight.dilation()}), most);
  return static_cast<int32_t>(step);
}

}  // namespace gna
