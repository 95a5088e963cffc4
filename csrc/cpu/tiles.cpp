#include "tiles.hpp"

#include <algorithm>
#include <numeric>

#include "bits.h"

namespace gna {

namespace {

constexpr gna_axis single_token = {1, 1, 1, 1, 0};

void finish(Tiling::Lists& lists) {
  lists.tile.interior = lists.interior.data();
  lists.tile.interiors = static_cast<int32_t>(lists.interior.size());
  lists.tile.boundary = lists.boundary.data();
  lists.tile.masks = lists.masks.data();
  lists.tile.boundaries = static_cast<int32_t>(lists.boundary.size());
}

void clear(Tiling::Lists& lists) {
  lists.interior.clear();
  lists.boundary.clear();
  lists.masks.clear();
}

uint64_t lane_mask(Range range, int32_t log2_inner, int32_t log2_extent) {
  const uint64_t low = axis_bits(range, log2_inner, log2_extent, 0);
  const uint64_t high = axis_bits(range, log2_inner, log2_extent, 1);
  return high << 32 | low;
}

}  // namespace

int32_t lanes_for(int64_t count) { return count <= 16 ? 16 : count <= 32 ? 32 : 64; }

AxisTiles::AxisTiles(const gna_axis& axis, int32_t log2_box, Role role)
    : axis_(axis), log2_box_(log2_box), dilation_(axis.dilation), role_(role) {
  const int32_t extent = 1 << log2_box;
  for (int32_t group = 0; group < dilation_; ++group) {
    const Axis here = group_axis(group);
    for (int32_t start = 0; start < here.length; start += extent) {
      const Range lanes = {start, std::min(start + extent, here.length)};
      if (role == Role::queries)
        tiles_.push_back({group, lanes, union_of(here, lanes), intersection_of(here, lanes)});
      else
        tiles_.push_back({group, lanes, seen_by(here, lanes), all_seen_by(here, lanes)});
    }
  }
}

Axis AxisTiles::group_axis(int32_t group) const {
  return {group_length(axis_.length, dilation_, group), axis_.window, axis_.stride,
          axis_.causal != 0};
}

Range AxisTiles::lanes_that_see(const AxisTile& tile, int32_t streamed) const {
  const Axis axis = group_axis(tile.group);
  const Range all = role_ == Role::queries ? seen_by(axis, {streamed, streamed + 1})
                                           : keys_of(axis, streamed);
  return {all.begin - tile.lanes.begin, all.end - tile.lanes.begin};
}

GlobalTokens::GlobalTokens(const gna_problem& problem, int32_t batch) {
  int32_t grid = 1;
  for (int32_t a = 0; a < problem.axis_count; ++a) grid *= problem.axes[a].length;
  for (int32_t index = 0; index < problem.prefix + problem.suffix; ++index) {
    const int32_t token = index < problem.prefix ? index : index + grid;
    const bool seen =
        !problem.key_mask || problem.key_mask[batch * problem.key_mask_batch_stride +
                                              index * problem.key_mask_token_stride];
    all.push_back(token);
    (seen ? visible : hidden).push_back(token);
  }
}

Tiling::Tiling(const gna_problem& problem, Role role) : role_(role), prefix_(problem.prefix) {
  const int32_t* const boxes =
      role == Role::queries ? problem.log2_query_box : problem.log2_key_box;
  const int32_t added = 3 - problem.axis_count;
  int32_t log2_lanes = 0;
  int64_t count = 1;
  tokens_ = 1;
  for (int32_t a = 0; a < 3; ++a) {
    const gna_axis& axis = a < added ? single_token : problem.axes[a - added];
    const int32_t log2_box = a < added ? 0 : boxes[a - added];
    axes_.emplace_back(axis, log2_box, role);
    lengths_[a] = axis.length;
    tokens_ *= axis.length;
    log2_lanes += log2_box;
    count *= axes_.back().count();
  }
  tokens_ += problem.prefix + problem.suffix;
  lanes_ = 1 << log2_lanes;

  std::vector<int64_t> lengths(count);
  for (int64_t index = 0; index < count; ++index) lengths[index] = streamed(place(index));
  pairs_ = lanes_ * std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  order_.resize(count);
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
}

Tiling::Place Tiling::place(int64_t index) const {
  Place result;
  for (int a = 2; a >= 0; --a) {
    result.axis[a] = axes_[a][static_cast<int32_t>(index % axes_[a].count())];
    index /= axes_[a].count();
  }
  return result;
}

int64_t Tiling::streamed(const Place& place) const {
  int64_t product = 1;
  for (const AxisTile& axis : place.axis) product *= axis.stream.end - axis.stream.begin;
  return product;
}

void Tiling::grid_tile(int64_t index, const GlobalTokens& globals, Lists& lists) const {
  const Place at = place(order_[index]);
  clear(lists);
  lists.interior = role_ == Role::queries ? globals.visible : globals.all;

  // Lanes: the box in raster order; where it sticks out of the grid there is nothing.
  TileTokens& tile = lists.tile;
  tile.lanes = lanes_;
  const int32_t log2[3] = {axes_[0].log2_box(), axes_[1].log2_box(), axes_[2].log2_box()};
  const int32_t inner[3] = {log2[1] + log2[2], log2[2], 0};
  const auto token_of = [&](const int32_t (&position)[3]) {
    int32_t token = 0;
    for (int a = 0; a < 3; ++a)
      token = token * lengths_[a] + axes_[a].token(at.axis[a], position[a]);
    return prefix_ + token;
  };
  uint64_t used = 0;
  for (int32_t lane = 0; lane < lanes_; ++lane) {
    int32_t position[3];
    bool inside = true;
    for (int a = 0; a < 3; ++a) {
      position[a] = at.axis[a].lanes.begin + (lane >> inner[a] & ((1 << log2[a]) - 1));
      inside = inside && position[a] < at.axis[a].lanes.end;
    }
    tile.lane_tokens[lane] = inside ? token_of(position) : -1;
    used |= static_cast<uint64_t>(inside) << lane;
  }

  const uint64_t full = lanes_ == 64 ? ~uint64_t{0} : (uint64_t{1} << lanes_) - 1;
  const auto mask = [&](int a, int32_t position) {
    const Range interior = at.axis[a].interior;
    if (position >= interior.begin && position < interior.end) return full;
    return lane_mask(axes_[a].lanes_that_see(at.axis[a], position), inner[a], log2[a]);
  };
  // The innermost axis's masks are needed again and again.
  const Range row = at.axis[2].stream;
  std::vector<uint64_t>& row_masks = lists.row_masks;
  row_masks.clear();
  for (int32_t w = row.begin; w < row.end; ++w) row_masks.push_back(mask(2, w));
  for (int32_t t = at.axis[0].stream.begin; t < at.axis[0].stream.end; ++t) {
    const uint64_t t_mask = mask(0, t);
    for (int32_t h = at.axis[1].stream.begin; h < at.axis[1].stream.end; ++h) {
      const uint64_t h_mask = t_mask & mask(1, h);
      const int32_t step = row.end - row.begin > 1
                               ? token_of({t, h, row.begin + 1}) - token_of({t, h, row.begin})
                               : 0;
      int32_t token = row.begin < row.end ? token_of({t, h, row.begin}) : 0;
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
  finish(lists);
}

void Tiling::global_tile(const std::vector<int32_t>& some, int64_t begin,
                         const GlobalTokens& globals, Lists& lists) const {
  clear(lists);
  TileTokens& tile = lists.tile;
  const int64_t left = static_cast<int64_t>(some.size()) - begin;
  tile.lanes = lanes_for(left);
  for (int32_t lane = 0; lane < tile.lanes; ++lane)
    tile.lane_tokens[lane] = lane < left ? some[begin + lane] : -1;
  lists.interior = role_ == Role::queries ? globals.visible : globals.all;
  const auto grid = tokens_ - static_cast<int32_t>(globals.all.size());
  for (int32_t token = prefix_; token < prefix_ + grid; ++token) lists.interior.push_back(token);
  finish(lists);
}

}  // namespace gna
