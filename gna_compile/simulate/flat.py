"""Flattened tiles: runs of tokens in raster order, which are not separable and so are enumerated.

That is how a kernel without boxes cuts a grid of several axes. The count is exact; it takes time
and memory in proportion to the square of the number of tiles, hence the limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from gna_compile.geometry import Axis, GeometryError, Neighborhood
from gna_compile.planner import Counts, Tiling

MAX_TOKENS = 1 << 18
"""The largest grid that is enumerated."""


def flat_counts(
    neighborhood: Neighborhood, query_tile: int, key_tile: int, tiling: Tiling = "static"
) -> Counts:
    """Key tiles per query tile of the grid, both runs of tokens in raster order.

    Args:
        neighborhood: the geometry; global tokens are not counted.
        query_tile: tokens of a query tile.
        key_tile: tokens of a key tile.
        tiling: key tiles start at token 0 (static) or at the first key of a query tile (dynamic).

    Raises:
        GeometryError: if the grid has more than `MAX_TOKENS` tokens, or a tile less than one.
    """
    tokens = neighborhood.grid_tokens
    if tokens > MAX_TOKENS:
        raise GeometryError(
            f"grid {neighborhood.grid} has {tokens} tokens; flattened tiles are enumerated up to "
            f"{MAX_TOKENS} only: leave them out, or take a smaller grid"
        )
    for name, extent in (("query", query_tile), ("key", key_tile)):
        if extent < 1:
            raise GeometryError(f"flattened {name} tile {extent} must be at least 1 token")
    rows = [
        _row(neighborhood, range(start, min(start + query_tile, tokens)), key_tile, tiling)
        for start in range(0, tokens, query_tile)
    ]
    visited, full = zip(*rows, strict=True)
    partial = [v - i for v, i in rows]
    tallies = ((sum(count), max(count)) for count in (visited, full, partial))
    return Counts.of(len(rows), *tallies)


def _row(
    neighborhood: Neighborhood, queries: range, key_tile: int, tiling: Tiling
) -> tuple[int, int]:
    """Visited key tiles and full blocks of one query tile."""
    seen_by_any, seen_by_all = 0, -1
    for piece in _pieces(neighborhood.grid, queries):
        axes = list(zip(neighborhood.axes, piece, strict=True))
        seen_by_any |= _bits(neighborhood.grid, [_union(axis, span) for axis, span in axes])
        if seen_by_all:
            common = [_intersection(axis, span) for axis, span in axes]
            seen_by_all &= _bits(neighborhood.grid, common)
    if tiling == "dynamic":
        first = (seen_by_any & -seen_by_any).bit_length() - 1
        seen_by_any >>= first
        seen_by_all >>= first
    return _count(seen_by_any, key_tile)[0], _count(seen_by_all, key_tile)[1]


def _pieces(grid: tuple[int, ...], tokens: range) -> Iterator[list[range]]:
    """The boxes of one row each that a run of tokens consists of."""
    width = grid[-1]
    start = tokens.start
    while start < tokens.stop:
        stop = min((start // width + 1) * width, tokens.stop)
        row, piece = start // width, [range(start % width, start % width + stop - start)]
        for length in reversed(grid[:-1]):
            piece.insert(0, range(row % length, row % length + 1))
            row //= length
        yield piece
        start = stop


def _union(axis: Axis, queries: range) -> int:
    bits = 0
    for query in queries:
        bits |= _keys(axis, query)
    return bits


def _intersection(axis: Axis, queries: range) -> int:
    bits = -1
    for query in queries:
        bits &= _keys(axis, query)
    return bits


def _keys(axis: Axis, query: int) -> int:
    keys = axis.keys(query)
    if keys.step == 1:
        return ((1 << len(keys)) - 1) << keys.start
    return sum(1 << key for key in keys)


def _bits(grid: tuple[int, ...], axes: list[int]) -> int:
    """The box of keys given by the bits of each axis, as bits of the raster."""
    bits, size = axes[-1], grid[-1]
    for length, axis in zip(reversed(grid[:-1]), reversed(axes[:-1]), strict=True):
        rows = 0
        for row in range(length):
            if axis >> row & 1:
                rows |= bits << row * size
        bits, size = rows, size * length
    return bits


def _count(bits: int, key_tile: int) -> tuple[int, int]:
    """In how many tiles of this number of bits any is set, and in how many all are."""
    text = f"{bits:b}"[::-1]
    tiles = [text[start : start + key_tile] for start in range(0, len(text), key_tile)]
    full = "1" * key_tile
    return sum("1" in tile for tile in tiles), tiles.count(full)
