// Which tiles a kernel touches: the query tiles of a problem, and for each the key tiles it visits.
//
// A query tile is a box of the grid's queries, or a run of global tokens. It visits the key tiles of
// its union box, which start at the union box's corner (dynamic tiling), then those of the global
// tokens. A query tile of global tokens visits every key of the grid, from the grid's corner on.
// Whoever loads the tiles and whoever computes on them walk the same list.
#pragma once

#include <cstdint>

#include "gna/axis.h"
#include "gna/macros.h"

namespace gna {

constexpr int32_t max_axes = 3;

// Which tokens a tile consists of.
enum Part : int32_t { grid_part = 0, prefix_part = 1, suffix_part = 2 };

// One axis of the token grid, and the extents of a tile's boxes along it.
struct GridAxis {
  int32_t length, window, stride, dilation;
  int32_t causal;
  int32_t log2_query, log2_key;
  int32_t query_tiles;  // of all dilation groups; a tile of a short group may be empty
};

// A grid of fewer than three axes has axes of length 1 in front.
struct Problem {
  GridAxis axes[max_axes];
  int32_t prefix, suffix;
  int32_t log2_query_tile, log2_key_tile;  // tokens of a tile
};

GNA_HD constexpr int32_t tiles_of(int32_t tokens, int32_t log2_tile) {
  return (tokens + (1 << log2_tile) - 1) >> log2_tile;
}

// Query tiles along an axis: each dilation group has as many as the longest.
GNA_HD constexpr int32_t query_tiles_of(const GridAxis& axis) {
  return axis.dilation * tiles_of(group_length(axis.length, axis.dilation, 0), axis.log2_query);
}

GNA_HD constexpr int32_t part_tokens(const Problem& problem, int32_t part) {
  return part == prefix_part ? problem.prefix : problem.suffix;
}

// Query tiles of the global tokens of one head; they are numbered first.
GNA_HD constexpr int32_t global_query_tiles(const Problem& problem) {
  return tiles_of(problem.prefix, problem.log2_query_tile) +
         tiles_of(problem.suffix, problem.log2_query_tile);
}

GNA_HD constexpr int32_t grid_query_tiles(const Problem& problem) {
  return problem.axes[0].query_tiles * problem.axes[1].query_tiles * problem.axes[2].query_tiles;
}

struct QueryTile {
  int32_t part;
  int32_t first;            // of global tokens: the first one, counted within the part
  Axis axes[max_axes];      // what the keys lie on: a dilation group, or the whole axis
  int32_t group[max_axes];  // the dilation group, its first token
  int32_t step[max_axes];   // tokens between two positions of the group
  Range queries[max_axes];  // positions of the box, cut at the group's end
  Range keys[max_axes];     // the union box
  bool empty;               // no query lies in it
};

// `index` counts the query tiles of one head: those of global tokens, then the grid's in raster order.
GNA_HD QueryTile query_tile(const Problem& problem, int32_t index) {
  QueryTile tile{};
  const int32_t in_prefix = tiles_of(problem.prefix, problem.log2_query_tile);
  const int32_t in_globals = global_query_tiles(problem);
  if (index < in_globals) {
    tile.part = index < in_prefix ? prefix_part : suffix_part;
    tile.first = (index < in_prefix ? index : index - in_prefix) << problem.log2_query_tile;
    for (int32_t a = 0; a < max_axes; ++a) {
      const int32_t length = problem.axes[a].length;
      tile.axes[a] = {length, length, 1, false};
      tile.step[a] = 1;
      tile.queries[a] = tile.keys[a] = {0, length};
    }
    return tile;
  }
  int32_t rest = index - in_globals;
  for (int32_t a = max_axes - 1; a >= 0; --a) {
    const GridAxis& axis = problem.axes[a];
    const int32_t place = rest % axis.query_tiles;
    rest /= axis.query_tiles;
    const int32_t group = place % axis.dilation;
    const int32_t begin = place / axis.dilation << axis.log2_query;
    const int32_t length = group_length(axis.length, axis.dilation, group);
    tile.axes[a] = {length, axis.window, axis.stride, axis.causal != 0};
    tile.group[a] = group;
    tile.step[a] = axis.dilation;
    tile.queries[a] = {begin, smaller(begin + (1 << axis.log2_query), length)};
    tile.empty |= begin >= length;
    tile.keys[a] = tile.empty ? Range{0, 0} : union_of(tile.axes[a], tile.queries[a]);
  }
  return tile;
}

// A key tile: the position of its first key on each axis or, of global tokens, in at[2].
struct KeyTile {
  int32_t part;
  int32_t at[max_axes];
};

// The key tiles of a query tile, one after the other; there is at least one.
struct KeyWalk {
  KeyTile tile;
  bool done;

  GNA_HD KeyWalk(const QueryTile& query)
      : tile{grid_part, {query.keys[0].begin, query.keys[1].begin, query.keys[2].begin}},
        done(query.empty) {}

  GNA_HD void next(const Problem& problem, const QueryTile& query) {
    if (tile.part == grid_part) {
      for (int32_t a = max_axes - 1; a >= 0; --a) {
        tile.at[a] += 1 << problem.axes[a].log2_key;
        if (tile.at[a] < query.keys[a].end) return;
        tile.at[a] = query.keys[a].begin;
      }
    } else {
      tile.at[2] += 1 << problem.log2_key_tile;
      if (tile.at[2] < part_tokens(problem, tile.part)) return;
    }
    // The next part that has tokens.
    do {
      ++tile.part;
    } while (tile.part <= suffix_part && part_tokens(problem, tile.part) == 0);
    tile.at[2] = 0;
    done = tile.part > suffix_part;
  }
};

// A run of rows of a query tile that decides for itself which key tiles it skips and masks.
struct Rows {
  Range sees[max_axes];   // the keys that any of the rows sees
  Range share[max_axes];  // the keys that all of them see
  bool empty;
};

// Rows [first, first + 2^log2_rows) of a query tile, first being a multiple of 2^log2_rows.
GNA_HD Rows rows_of(const Problem& problem, const QueryTile& tile, int32_t first,
                           int32_t log2_rows) {
  Rows rows{};
  rows.empty = tile.empty;
  if (tile.part != grid_part) {
    rows.empty = tile.first + first >= part_tokens(problem, tile.part);
    for (int32_t a = 0; a < max_axes; ++a) rows.sees[a] = rows.share[a] = tile.keys[a];
    return rows;
  }
  int32_t inside = 0;  // log2 of the tokens of the axes inside this one
  for (int32_t a = max_axes - 1; a >= 0; --a) {
    const int32_t log2_extent = problem.axes[a].log2_query;
    const int32_t log2_part = smaller(larger(log2_rows - inside, 0), log2_extent);
    const int32_t place = (first >> inside) & ((1 << log2_extent) - 1);
    const int32_t begin = tile.queries[a].begin + place;
    const Range queries{begin, smaller(begin + (1 << log2_part), tile.queries[a].end)};
    inside += log2_extent;
    rows.empty |= queries.begin >= queries.end;
    if (rows.empty) continue;
    rows.sees[a] = union_of(tile.axes[a], queries);
    rows.share[a] = intersection_of(tile.axes[a], queries);
  }
  return rows;
}

// Whether any of the rows sees any key of the tile.
GNA_HD bool visits(const Problem& problem, const Rows& rows, const KeyTile& tile) {
  bool meets = !rows.empty;
  for (int32_t a = 0; a < max_axes; ++a) {
    const int32_t end = tile.at[a] + (1 << problem.axes[a].log2_key);
    meets &= tile.part != grid_part || (tile.at[a] < rows.sees[a].end && end > rows.sees[a].begin);
  }
  return meets;
}

// Whether all of the rows see all keys of the tile, and the tile is full.
GNA_HD bool is_interior(const Problem& problem, const Rows& rows, const KeyTile& tile,
                               bool hides_globals) {
  if (tile.part != grid_part)
    return !hides_globals &&
           tile.at[2] + (1 << problem.log2_key_tile) <= part_tokens(problem, tile.part);
  bool inside = true;
  for (int32_t a = 0; a < max_axes; ++a) {
    const int32_t end = tile.at[a] + (1 << problem.axes[a].log2_key);
    inside &= tile.at[a] >= rows.share[a].begin && end <= rows.share[a].end;
  }
  return inside;
}

// The coordinate of row `row` of a box on axis `a`.
GNA_HD constexpr int32_t row_coordinate(const Problem& problem, int32_t row, int32_t a) {
  int32_t inside = 0;
  for (int32_t i = max_axes - 1; i > a; --i) inside += problem.axes[i].log2_query;
  return (row >> inside) & ((1 << problem.axes[a].log2_query) - 1);
}

}  // namespace gna
