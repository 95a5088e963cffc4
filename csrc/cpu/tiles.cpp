#include "tiles.hpp"

#include <algorithm>

namespace gna {

Tiling::Tiling(const gna_problem& problem, Role role)
    : sides_(problem.pattern, problem.key_mask, role),
      linked_(sides_, problem.batch),
      pairs_(linked_.pairs()) {
  for (int32_t segment = 0; segment < sides_.lanes.count(); ++segment)
    if (!sides_.linked(segment, GNA_WINDOW).empty()) grids_.emplace_back(sides_, segment);
  for (std::size_t grid = 0; grid < grids_.size(); ++grid)
    for (int32_t tile = 0; tile < grids_[grid].count(); ++tile) {
      const int64_t streamed = grids_[grid].streamed(tile);
      order_.push_back({streamed, static_cast<int32_t>(grid), tile});
      pairs_ += double(streamed) * grids_[grid].lanes() * problem.batch;
    }
  std::stable_sort(order_.begin(), order_.end(),
                   [](const GridTile& a, const GridTile& b) { return a.streamed > b.streamed; });
}

}  // namespace gna
