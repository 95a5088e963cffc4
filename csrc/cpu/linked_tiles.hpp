// Tiles of segments that no window limits: all lanes of a tile see the same segments, whole.
#pragma once

#include <cstdint>
#include <vector>

#include "lists.hpp"
#include "sides.hpp"

namespace gna {

class LinkedTiles {
 public:
  LinkedTiles(const Sides& sides, int32_t batch);

  // Tiles of the batch element that has the most of them.
  int64_t most() const;
  double pairs() const { return pairs_; }  // (lane, streamed token) pairs of all batch elements

  // False if the batch element has no such tile.
  bool make(int32_t batch, int64_t index, Lists& lists) const;

 private:
  // Segments that see (of keys) or are seen by (of queries) the same.
  struct Alike {
    std::vector<int32_t> segments, linked;
    bool shown;  // their tokens that the key mask shows, or those that it hides
    int64_t streamed;
  };
  struct Tile {
    const Alike* alike;
    int64_t begin, end;  // of the batch element's tokens
  };
  struct BatchElement {
    std::vector<int32_t> tokens;
    std::vector<Tile> tiles;
  };

  BatchElement cut(int32_t batch) const;

  const Sides& sides_;
  std::vector<Alike> alike_;
  std::vector<BatchElement> elements_;  // one for all where no key mask tells them apart
  double pairs_ = 0;
};

}  // namespace gna
