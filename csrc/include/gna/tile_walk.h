// Which tiles a kernel touches: the query tiles of a problem, and for each the key tiles it visits.
//
// A query tile is a box of the grid's queries, or a run of global tokens. It visits the key tiles of
// its union box, which start at the union box's corner (dynamic tiling), then those of the global
// tokens. A query tile of global tokens visits every key of the grid, from the grid's corner on.
// Producers and consumers walk the same list.
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
  int32_t tile_stride;  // query tiles from one to the next along the axis, in the order of rasterization
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

// The query tile of a global token, counted over prefix, then suffix.
GNA_HD constexpr int32_t global_query_tile(const Problem& problem, int32_t token) {
  return token < problem.prefix
             ? token >> problem.log2_query_tile
             : tiles_of(problem.prefix, problem.log2_query_tile) +
                   ((token - problem.prefix) >> problem.log2_query_tile);
}

// The query tiles that hold a range of global tokens.
GNA_HD constexpr Range global_query_tiles(const Problem& problem, Range tokens) {
  if (tokens.begin >= tokens.end) return {0, 0};
  return {global_query_tile(problem, tokens.begin), global_query_tile(problem, tokens.end - 1) + 1};
}

GNA_HD constexpr int32_t grid_query_tiles(const Problem& problem) {
  return problem.axes[0].query_tiles * problem.axes[1].query_tiles * problem.axes[2].query_tiles;
}

// One axis of a query tile of the grid.
struct QueryAxis {
  Axis axis;      // what the keys lie on: a dilation group, or the whole axis
  int32_t group;  // the dilation group, its first token
  int32_t step;   // tokens between two positions of the group
  Range queries;  // positions of the box, cut at the group's end; empty if the group is too short
  Range keys;     // the union box
};

struct QueryTile {
  int32_t part;
  int32_t first;  // of global tokens: the first one, counted within the part
  QueryAxis axes[max_axes];
};

// The tile at `place` along axis `a`.
GNA_HD constexpr QueryAxis query_axis(const Problem& problem, int32_t a, int32_t place) {
  const GridAxis& axis = problem.axes[a];
  const int32_t group = place % axis.dilation;
  const int32_t begin = place / axis.dilation << axis.log2_query;
  const int32_t length = group_length(axis.length, axis.dilation, group);
  const Axis keys{length, axis.window, axis.stride, axis.causal != 0};
  const Range queries{begin, smaller(begin + (1 << axis.log2_query), length)};
  const bool empty = begin >= length;
  return {keys, group, axis.dilation, queries, empty ? Range{0, 0} : union_of(keys, queries)};
}

// What a query tile of global tokens attends to along axis `a`: all of it.
GNA_HD constexpr QueryAxis whole_axis(const Problem& problem, int32_t a) {
  const int32_t length = problem.axes[a].length;
  return {{length, length, 1, false}, 0, 1, {0, length}, {0, length}};
}

// The place along axis `a` of tile `index` of the grid's tiles, in the order of rasterization.
GNA_HD constexpr int32_t place_along(const Problem& problem, int32_t a, int32_t index) {
  return index / problem.axes[a].tile_stride % problem.axes[a].query_tiles;
}

// How many keys on an axis `tiles` neighboring query tiles attend to, away from the ends of the axis.
GNA_HD constexpr int32_t keys_of_neighbors(const GridAxis& axis, int32_t tiles) {
  const Axis group{group_length(axis.length, axis.dilation, 0), axis.window, axis.stride,
                   axis.causal != 0};
  const int32_t per_group = (tiles + axis.dilation - 1) / axis.dilation << axis.log2_query;
  const int32_t middle = larger(group.length - per_group, 0) / 2 / axis.stride * axis.stride;
  const Range keys = union_of(group, {middle, smaller(middle + per_group, group.length)});
  return (keys.end - keys.begin) * smaller(axis.dilation, tiles);
}

// Sets the order of rasterization of the grid's query tiles: that in which `at_once` consecutive ones
// attend to the fewest different keys, so that those stay in the L2 cache.
inline void set_rasterization(Problem& problem, int32_t at_once) {
  constexpr int32_t orders[6][max_axes] = {{2, 1, 0}, {2, 0, 1}, {1, 2, 0},
                                           {1, 0, 2}, {0, 2, 1}, {0, 1, 2}};  // innermost first
  int64_t fewest = INT64_MAX;
  for (const auto& order : orders) {
    int64_t keys = 1;
    int32_t left = at_once, stride = 1, strides[max_axes] = {};
    for (const int32_t a : order) {
      const int32_t tiles = smaller(problem.axes[a].query_tiles, left);
      left = (left + tiles - 1) / tiles;
      keys *= keys_of_neighbors(problem.axes[a], tiles);
      strides[a] = stride;
      stride *= problem.axes[a].query_tiles;
    }
    if (keys >= fewest) continue;
    fewest = keys;
    for (int32_t a = 0; a < max_axes; ++a) problem.axes[a].tile_stride = strides[a];
  }
}

// A query tile by its index, which counts the tiles of one head: those of the prefix, of the suffix, then
// the grid's. Its parts can be decoded by different lanes.
struct QueryTileIndex {
  int32_t index, in_prefix, globals, log2_tile;

  GNA_HD QueryTileIndex(const Problem& problem, int32_t index, int32_t log2_tile)
      : index(index),
        in_prefix(tiles_of(problem.prefix, log2_tile)),
        globals(global_query_tiles(problem)),
        log2_tile(log2_tile) {}

  GNA_HD bool is_of_grid() const { return index >= globals; }

  GNA_HD int32_t part() const {
    return is_of_grid() ? grid_part : index < in_prefix ? prefix_part : suffix_part;
  }

  // Of global tokens.
  GNA_HD int32_t first() const {
    return (index < in_prefix ? index : index - in_prefix) << log2_tile;
  }

  GNA_HD QueryAxis axis(const Problem& problem, int32_t a) const {
    return is_of_grid() ? query_axis(problem, a, place_along(problem, a, index - globals))
                        : whole_axis(problem, a);
  }
};

GNA_HD constexpr bool is_empty(const QueryAxis& axis) {
  return axis.queries.begin >= axis.queries.end;
}

// A key tile: the position of its first key on each axis or, of global tokens, in at[2].
struct KeyTile {
  int32_t part;
  int32_t at[max_axes];
};

// The key tiles of a query tile that is not empty, one after the other; there is at least one.
struct KeyWalk {
  KeyTile tile;
  bool done;

  GNA_HD KeyWalk(const QueryTile& query)
      : tile{grid_part,
             {query.axes[0].keys.begin, query.axes[1].keys.begin, query.axes[2].keys.begin}},
        done(false) {}

  GNA_HD void next(const Problem& problem, const QueryTile& query) {
    if (tile.part == grid_part) {
      for (int32_t a = max_axes - 1; a >= 0; --a) {
        tile.at[a] += 1 << problem.axes[a].log2_key;
        if (tile.at[a] < query.axes[a].keys.end) return;
        tile.at[a] = query.axes[a].keys.begin;
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

// Some rows of a query tile, on one axis: the keys that any of them and that all of them attend to. Both are
// empty where there are no rows.
struct RowsAxis {
  Range any, all;
};

// Rows [first, first + 2^log2_rows) of a query tile, first being a multiple of 2^log2_rows.
GNA_HD constexpr RowsAxis rows_axis(const Problem& problem, const QueryTile& tile, int32_t a,
                                    int32_t first, int32_t log2_rows) {
  const QueryAxis& axis = tile.axes[a];
  if (tile.part != grid_part) {
    const bool any = tile.first + first < part_tokens(problem, tile.part);
    const Range keys{0, any ? axis.keys.end : 0};
    return {keys, keys};
  }
  int32_t inside = 0;  // log2 of the tokens of the axes inside this one
  for (int32_t inner = max_axes - 1; inner > a; --inner) inside += problem.axes[inner].log2_query;
  const int32_t log2_extent = problem.axes[a].log2_query;
  const int32_t log2_part = smaller(larger(log2_rows - inside, 0), log2_extent);
  const int32_t begin = axis.queries.begin + ((first >> inside) & ((1 << log2_extent) - 1));
  const Range queries{begin, smaller(begin + (1 << log2_part), axis.queries.end)};
  if (queries.begin >= queries.end) return {{0, 0}, {0, 0}};
  return {union_of(axis.axis, queries), intersection_of(axis.axis, queries)};
}

// Whether any of the rows attends to any key of a tile at `at` along an axis; whether all rows attend to all
// of its keys, so that the tile is full.
GNA_HD constexpr bool overlaps(const RowsAxis& rows, int32_t at, int32_t log2_extent) {
  return at < rows.any.end && at + (1 << log2_extent) > rows.any.begin;
}

GNA_HD constexpr bool is_full(const RowsAxis& rows, int32_t at, int32_t log2_extent) {
  return at >= rows.all.begin && at + (1 << log2_extent) <= rows.all.end;
}

// The coordinate of row `row` of a box on axis `a`.
GNA_HD constexpr int32_t row_coordinate(const Problem& problem, int32_t row, int32_t a) {
  int32_t inside = 0;
  for (int32_t i = max_axes - 1; i > a; --i) inside += problem.axes[i].log2_query;
  return (row >> inside) & ((1 << problem.axes[a].log2_query) - 1);
}

}  // namespace gna
