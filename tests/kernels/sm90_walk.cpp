// Plays a kernel's part on the host: walks all tiles of a problem and marks the pairs it would use.
// Built and called by test_sm90.py.
#include <cstdint>

#include "gna/box_mask.h"
#include "gna/coordinate_mask.h"
#include "gna/tile_walk.h"

namespace {

using namespace gna;

// Whether a row of a query tile sees column `column` of a key tile, by the words of box_mask.h; -1 if
// coordinate_mask.h says otherwise.
int32_t sees_in_tile(const Problem& problem, const QueryTile& query, int32_t row, const KeyTile& tile,
                     int32_t column) {
  if (tile.part != grid_part) return tile.at[2] + column < part_tokens(problem, tile.part);
  const CoordinateBits bits = coordinate_bits(
      {problem.axes[0].log2_key, problem.axes[1].log2_key, problem.axes[2].log2_key});
  uint32_t word = all_bits, masked = 0;
  int32_t log2_inner = 0;
  for (int32_t a = max_axes - 1; a >= 0; --a) {
    const QueryAxis& axis = query.axes[a];
    const int32_t position = axis.queries.begin + row_coordinate(problem, row, a);
    const Range keys = query.part == grid_part
                           ? keys_of(axis.axis, smaller(position, axis.axis.length - 1))
                           : axis.keys;
    const AxisWords words = axis_words(log2_inner, problem.axes[a].log2_key);
    const int32_t first = tile.at[a] + first_of_word(words, column / 32);
    word &= word_bits(words, {keys.begin - first, keys.end - first});
    masked |= masked_coordinates(bits, a, {keys.begin - tile.at[a], keys.end - tile.at[a]});
    log2_inner += problem.axes[a].log2_key;
  }
  const bool sees = word >> column % 32 & 1;
  // As the tensor core sums it up: no element of one is not zero where the other's is not.
  uint32_t sum = 0;
  for (int32_t pair = 0; pair < 8 * bits.steps; ++pair)
    for (int32_t shift = 0; shift < 32; shift += 16)
      sum |= two_columns(masked, pair, masked_element) >> shift & 0xffff &&
               two_columns(coordinates_of(bits, column), pair, has_element) >> shift & 0xffff;
  return bits.steps > 0 && (sum == 0) != sees ? -1 : sees;
}

// The token of a position in each axis, or -1 outside the grid.
int32_t grid_token(const Problem& problem, const QueryTile& query, const int32_t* positions) {
  int32_t token = 0;
  for (int32_t a = 0; a < max_axes; ++a) {
    const QueryAxis& axis = query.axes[a];
    if (positions[a] >= axis.axis.length) return -1;
    token = token * problem.axes[a].length + axis.group + axis.step * positions[a];
  }
  return problem.prefix + token;
}

int32_t part_token(const Problem& problem, int32_t part, int32_t index) {
  if (index >= part_tokens(problem, part)) return -1;
  const int32_t grid = problem.axes[0].length * problem.axes[1].length * problem.axes[2].length;
  return index + (part == suffix_part ? problem.prefix + grid : 0);
}

}  // namespace

// axes: 3 x (length, window, stride, dilation, causal, log2_query, log2_key). Adds 1 to seen[q][k] for
// each pair that is used. Returns 0, or the line of the first contradiction.
extern "C" int32_t walk_all(const int32_t* axes, int32_t prefix, int32_t suffix, int32_t tokens,
                            uint8_t* seen) {
  Problem problem{};
  for (int32_t a = 0; a < max_axes; ++a) {
    const int32_t* x = axes + 7 * a;
    problem.axes[a] = {x[0], x[1], x[2], x[3], x[4], x[5], x[6], 0, 0};
    problem.axes[a].query_tiles = query_tiles_of(problem.axes[a]);
    problem.log2_query_tile += x[5];
    problem.log2_key_tile += x[6];
  }
  problem.prefix = prefix;
  problem.suffix = suffix;
  set_rasterization(problem, 5);
  const int32_t half = 1 << (problem.log2_query_tile - 1);
  for (int32_t index = 0; index < global_query_tiles(problem) + grid_query_tiles(problem); ++index) {
    const QueryTileIndex decoded(problem, index, problem.log2_query_tile);
    QueryTile query{decoded.part(), decoded.first(), {}};
    bool empty = false;
    for (int32_t a = 0; a < max_axes; ++a) {
      query.axes[a] = decoded.axis(problem, a);
      empty |= is_empty(query.axes[a]);
    }
    if (empty) continue;
    for (KeyWalk walk(query); !walk.done; walk.next(problem, query))
      for (int32_t row = 0; row < 2 * half; ++row) {
        bool visited = true, interior = true;
        for (int32_t a = 0; a < max_axes && walk.tile.part == grid_part; ++a) {
          const RowsAxis rows = rows_axis(problem, query, a, row / half * half,
                                          problem.log2_query_tile - 1);
          visited &= overlaps(rows, walk.tile.at[a], problem.axes[a].log2_key);
          interior &= is_full(rows, walk.tile.at[a], problem.axes[a].log2_key);
        }
        if (walk.tile.part != grid_part)
          interior = walk.tile.at[2] + (1 << problem.log2_key_tile) <=
                     part_tokens(problem, walk.tile.part);
        int32_t positions[max_axes];
        for (int32_t a = 0; a < max_axes; ++a)
          positions[a] = query.axes[a].queries.begin + row_coordinate(problem, row, a);
        const int32_t q = query.part == grid_part ? grid_token(problem, query, positions)
                                                  : part_token(problem, query.part, query.first + row);
        if (q < 0) continue;
        for (int32_t column = 0; column < 1 << problem.log2_key_tile; ++column) {
          const int32_t sees = sees_in_tile(problem, query, row, walk.tile, column);
          if (sees < 0) return __LINE__;
          if (sees && !visited) return __LINE__;
          if (!sees && interior) return __LINE__;
          if (!sees) continue;
          int32_t at[max_axes];
          for (int32_t a = 0, inside = problem.log2_key_tile; a < max_axes; ++a) {
            inside -= problem.axes[a].log2_key;
            at[a] = walk.tile.at[a] + (column >> inside & ((1 << problem.axes[a].log2_key) - 1));
          }
          const int32_t k = walk.tile.part == grid_part
                                ? grid_token(problem, query, at)
                                : part_token(problem, walk.tile.part, walk.tile.at[2] + column);
          if (k < 0) return __LINE__;
          ++seen[static_cast<int64_t>(q) * tokens + k];
        }
      }
  }
  return 0;
}
