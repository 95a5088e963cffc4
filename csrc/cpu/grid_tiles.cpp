#include "grid_tiles.hpp"

#include <cstddef>

#include "bits.h"

namespace gna {

namespace {

constexpr gna_axis single_token = {1, 0, 1, 0, 1, 1, 1, 0};

// An axis of a segment, counted among three.
const gna_axis& axis_of(const gna_segment& segment, int32_t axis) {
  const int32_t added = most_axes - segment.axis_count;
  return axis < added ? single_token : segment.axes[axis - added];
}

Range at_hand(const gna_axis& axis) { return {axis.begin, axis.end}; }

uint64_t lane_mask(Range range, int32_t log2_inner, int32_t log2_extent) {
  const uint64_t low = axis_bits(range, log2_inner, log2_extent, 0);
  const uint64_t high = axis_bits(range, log2_inner, log2_extent, 1);
  return high << 32 | low;
}

}  // namespace

std::vector<AxisSight> sights_along(const Sides& sides, int32_t segment, int32_t axis) {
  const gna_axis& own = axis_of(sides.lanes[segment], axis);
  std::vector<AxisSight> sights;
  for (const int32_t linked : sides.linked(segment, GNA_WINDOW)) {
    const gna_axis& other = axis_of(sides.streamed[linked], axis);
    const gna_axis& window = sides.role == Role::queries ? own : other;
    sights.emplace_back(window, at_hand(other), own.length == other.length, sides.role);
  }
  return sights;
}

GridTokens::GridTokens(const Sequence& sequence, int32_t segment)
    : first(sequence.range(segment).begin) {
  for (int32_t a = 0; a < most_axes; ++a) {
    const gna_axis& axis = axis_of(sequence[segment], a);
    begin[a] = axis.begin;
    extent[a] = axis.end - axis.begin;
  }
}

GridTiles::GridTiles(const Sides& sides, int32_t segment)
    : sides_(sides), grid_(sides.lanes, segment), linked_(sides.linked(segment, GNA_FULL)) {
  for (const int32_t other : sides.linked(segment, GNA_WINDOW))
    grids_.push_back({GridTokens(sides.streamed, other), {}, {}});
  for (int32_t a = 0; a < most_axes; ++a) {
    const gna_axis& axis = axis_of(sides.lanes[segment], a);
    const std::vector<AxisSight> sights = sights_along(sides, segment, a);
    axes_.emplace_back(at_hand(axis), lane_step(sights, at_hand(axis)), axis.log2_box);
    const AxisTiles& tiles = axes_.back();
    for (std::size_t n = 0; n < grids_.size(); ++n) {
      grids_[n].sights[a] = sights[n];
      for (int32_t index = 0; index < tiles.count(); ++index)
        grids_[n].streams[a].push_back(sights[n].stream(tiles, tiles[index]));
    }
  }
  for (const int32_t other : linked_) linked_tokens_ += sides.streamed.size(other);
}

int64_t GridTiles::count() const {
  return int64_t{axes_[0].count()} * axes_[1].count() * axes_[2].count();
}

int32_t GridTiles::lanes() const {
  return 1 << (axes_[0].log2_box() + axes_[1].log2_box() + axes_[2].log2_box());
}

GridTiles::Place GridTiles::place(int64_t index) const {
  Place result;
  for (int32_t a = most_axes - 1; a >= 0; --a) {
    result[a] = static_cast<int32_t>(index % axes_[a].count());
    index /= axes_[a].count();
  }
  return result;
}

int64_t GridTiles::streamed(int64_t index) const {
  const Place at = place(index);
  int64_t sum = linked_tokens_;
  for (const Streamed& other : grids_) {
    int64_t product = 1;
    for (int32_t a = 0; a < most_axes; ++a) product *= size(other.streams[a][at[a]].all);
    sum += product;
  }
  return sum;
}

void GridTiles::make(int64_t index, int32_t batch, Lists& lists) const {
  const Place at = place(index);
  lists.clear();
  const uint64_t used = set_lanes(at, lists.tile);
  for (const Streamed& other : grids_) stream(other, at, used, lists);
  for (const int32_t other : linked_) sides_.streamed.append(other, batch, true, lists.interior);
  lists.finish();
}

// The box in raster order; where it sticks out of the grid there is nothing. Returns the lanes used.
uint64_t GridTiles::set_lanes(const Place& place, TileTokens& tile) const {
  uint64_t used = 0;
  tile.lanes = lanes();
  for (int32_t lane = 0; lane < tile.lanes; ++lane) {
    Coordinates at;
    bool inside = true;
    for (int32_t a = most_axes - 1, rest = lane; a >= 0; --a) {
      const AxisTile& box = axes_[a][place[a]];
      const int32_t along = rest & ((1 << axes_[a].log2_box()) - 1);
      rest >>= axes_[a].log2_box();
      inside = inside && along < box.lanes;
      at[a] = axes_[a].token(box, inside ? along : 0);
    }
    tile.lane_tokens[lane] = inside ? grid_.token(at) : -1;
    used |= static_cast<uint64_t>(inside) << lane;
  }
  return used;
}

void GridTiles::stream(const Streamed& other, const Place& place, uint64_t used,
                       Lists& lists) const {
  const int32_t log2[most_axes] = {axes_[0].log2_box(), axes_[1].log2_box(), axes_[2].log2_box()};
  const int32_t inner[most_axes] = {log2[1] + log2[2], log2[2], 0};
  const uint64_t full = lanes() == 64 ? ~uint64_t{0} : (uint64_t{1} << lanes()) - 1;
  const auto stream_of = [&](int32_t a) { return other.streams[a][place[a]]; };
  const auto mask = [&](int32_t a, int32_t position) {
    const Range interior = stream_of(a).interior;
    if (position >= interior.begin && position < interior.end) return full;
    const Range lanes =
        other.sights[a].lanes_that_see(axes_[a], axes_[a][place[a]], stream_of(a), position);
    return lane_mask(lanes, inner[a], log2[a]);
  };
  const AxisStream slow = stream_of(0), middle = stream_of(1), fast = stream_of(2);
  // The innermost axis's masks are needed again and again.
  const Range row = fast.all;
  std::vector<uint64_t>& row_masks = lists.row_masks;
  row_masks.clear();
  for (int32_t w = row.begin; w < row.end; ++w) row_masks.push_back(mask(2, w));
  const int32_t step = other.sights[2].dilation();
  for (int32_t t = slow.all.begin; t < slow.all.end; ++t) {
    const uint64_t t_mask = mask(0, t);
    for (int32_t h = middle.all.begin; h < middle.all.end; ++h) {
      const uint64_t h_mask = t_mask & mask(1, h);
      int32_t token =
          other.grid.token({other.sights[0].token(slow, t), other.sights[1].token(middle, h),
                            other.sights[2].token(fast, row.begin)});
      for (int32_t w = 0; w < row.end - row.begin; ++w, token += step) {
        // Empty lanes see everything, so that they never make a mask necessary.
        const uint64_t seen = h_mask & row_masks[w] & used;
        const uint64_t bits = (seen | ~used) & full;
        if (bits == full) {
          lists.interior.push_back(token);
        } else if (seen) {
          lists.boundary.push_back(token);
          lists.masks.push_back(bits);
        }
      }
    }
  }
}

}  // namespace gna
