// All tiles of a problem for one role: each of its tokens is in a lane of exactly one.
#pragma once

#include <cstdint>
#include <vector>

#include "grid_tiles.hpp"
#include "linked_tiles.hpp"
#include "lists.hpp"
#include "sides.hpp"

namespace gna {

class Tiling {
 public:
  Tiling(const gna_problem& problem, Role role);
  // Its parts point to its sides.
  Tiling(const Tiling&) = delete;
  Tiling& operator=(const Tiling&) = delete;

  // Tiles of one head that no window limits, in the batch element that has the most of them; tiles
  // of its grids.
  int64_t linked_count() const { return linked_.most(); }
  int64_t grid_count() const { return static_cast<int64_t>(order_.size()); }

  // Makes a tile of a batch element, the longest first; false if it has no such tile. What `lists`
  // has stays valid until its next use.
  bool make_linked(int32_t batch, int64_t index, Lists& lists) const {
    return linked_.make(batch, index, lists);
  }
  void make_grid(int32_t batch, int64_t index, Lists& lists) const {
    grids_[order_[index].grid].make(order_[index].tile, batch, lists);
  }

  // (lane, streamed token) pairs of all batch elements, one head.
  double pairs() const { return pairs_; }
  int32_t lane_tokens() const { return sides_.lanes.tokens(); }
  int32_t streamed_tokens() const { return sides_.streamed.tokens(); }

 private:
  struct GridTile {
    int64_t streamed;
    int32_t grid, tile;
  };

  Sides sides_;
  LinkedTiles linked_;
  std::vector<GridTiles> grids_;
  std::vector<GridTile> order_;
  double pairs_;
};

}  // namespace gna
