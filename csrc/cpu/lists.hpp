// The tokens of one tile, in memory that the next tile uses again.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.hpp"

namespace gna {

struct Lists {
  TileTokens tile;
  std::vector<int32_t> interior, boundary;
  std::vector<uint64_t> masks, row_masks;

  void clear() {
    interior.clear();
    boundary.clear();
    masks.clear();
  }

  // To be called when the lists are complete.
  void finish() {
    tile.interior = interior.data();
    tile.interiors = static_cast<int32_t>(interior.size());
    tile.boundary = boundary.data();
    tile.masks = masks.data();
    tile.boundaries = static_cast<int32_t>(boundary.size());
  }
};

}  // namespace gna
