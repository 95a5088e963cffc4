#include "linked_tiles.hpp"

#include <algorithm>

namespace gna {

namespace {

// Fewest lanes, of 16, 32 and 64, that hold `count` tokens if 64 do.
int32_t lanes_for(int64_t count) { return count <= 16 ? 16 : count <= 32 ? 32 : 64; }

}  // namespace

LinkedTiles::LinkedTiles(const Sides& sides, int32_t batch) : sides_(sides) {
  for (int32_t segment = 0; segment < sides.lanes.count(); ++segment) {
    if (sides.lanes.size(segment) == 0 || !sides.linked(segment, GNA_WINDOW).empty()) continue;
    const std::vector<int32_t> linked = sides.linked(segment, GNA_FULL);
    const auto alike = std::find_if(alike_.begin(), alike_.end(),
                                    [&](const Alike& other) { return other.linked == linked; });
    if (alike != alike_.end()) {
      alike->segments.push_back(segment);
      continue;
    }
    int64_t streamed = 0;
    for (const int32_t other : linked) streamed += sides.streamed.size(other);
    alike_.push_back({{segment}, linked, true, streamed});
  }
  std::stable_sort(alike_.begin(), alike_.end(),
                   [](const Alike& a, const Alike& b) { return a.streamed > b.streamed; });
  if (sides.lanes.has_key_mask()) {
    // Nobody sees a hidden key: its gradients are sums of nothing.
    Alike hidden = {{}, {}, false, 0};
    for (int32_t segment = 0; segment < sides.lanes.count(); ++segment)
      hidden.segments.push_back(segment);
    alike_.push_back(hidden);
  }

  const bool all_alike = !sides.lanes.has_key_mask();
  for (int32_t element = 0; element < (all_alike ? 1 : batch); ++element) {
    elements_.push_back(cut(element));
    for (const Tile& tile : elements_.back().tiles)
      pairs_ += double(lanes_for(tile.end - tile.begin)) * double(tile.alike->streamed);
  }
  if (all_alike) pairs_ *= batch;
}

LinkedTiles::BatchElement LinkedTiles::cut(int32_t batch) const {
  BatchElement element;
  for (const Alike& alike : alike_) {
    auto begin = static_cast<int64_t>(element.tokens.size());
    for (const int32_t segment : alike.segments)
      sides_.lanes.append(segment, batch, alike.shown, element.tokens);
    const auto end = static_cast<int64_t>(element.tokens.size());
    for (; begin < end; begin += most_lanes)
      element.tiles.push_back({&alike, begin, std::min(begin + most_lanes, end)});
  }
  return element;
}

int64_t LinkedTiles::most() const {
  std::size_t most = 0;
  for (const BatchElement& element : elements_) most = std::max(most, element.tiles.size());
  return static_cast<int64_t>(most);
}

bool LinkedTiles::make(int32_t batch, int64_t index, Lists& lists) const {
  const BatchElement& element = elements_[elements_.size() == 1 ? 0 : batch];
  if (index >= static_cast<int64_t>(element.tiles.size())) return false;
  const Tile& tile = element.tiles[index];
  lists.clear();
  lists.tile.lanes = lanes_for(tile.end - tile.begin);
  for (int64_t lane = 0; lane < lists.tile.lanes; ++lane)
    lists.tile.lane_tokens[lane] =
        tile.begin + lane < tile.end ? element.tokens[tile.begin + lane] : -1;
  for (const int32_t other : tile.alike->linked)
    sides_.streamed.append(other, batch, true, lists.interior);
  lists.finish();
  return true;
}

}  // namespace gna
