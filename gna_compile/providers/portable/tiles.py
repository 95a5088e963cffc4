"""How the portable provider cuts a grid: boxes of queries, each against its union box of keys.

Every cost is a sum of products over the axes, so each axis is cut on its own, described by a few
sums, and all combinations of cuts are compared exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gna_compile.geometry import Axis, Neighborhood

# Costs in units of one (query, key) pair of one head; measured with PyTorch's CPU kernel.
_MASKED_PAIR = 0.1  # what a mask adds to a pair
_GATHERED_KEY = 24.0  # copying one key and value out of the grid, and the tensor core's ramp
_TILE = 2000.0  # calling the operators of one tile, shared by about a dozen heads

MAX_MASK = 1 << 22
"""Most elements of one tile's mask, wherever a cut of the grid allows it."""

_MAX_BOXES = 1024  # per axis, unless the axis has no other cut


@dataclass(frozen=True)
class AxisTile:
    """A box of queries on one axis and the keys that any of them sees.

    Args:
        axis: the dilation group that the boxes lie in, itself an axis of dilation 1.
        queries: group positions of the queries.
        keys: group positions of the keys, the union box.
        offset: the group's first token.
        step: tokens between two positions of the group.
        interior: every query sees every key, so no mask is needed.
    """

    axis: Axis
    queries: range
    keys: range
    offset: int
    step: int
    interior: bool

    @property
    def query_tokens(self) -> slice:
        return self._tokens(self.queries)

    @property
    def key_tokens(self) -> slice:
        return self._tokens(self.keys)

    def _tokens(self, box: range) -> slice:
        start = self.offset + self.step * box.start
        return slice(start, start + self.step * (len(box) - 1) + 1, self.step)


@dataclass(frozen=True)
class _Cut:
    """One way to cut an axis, and the sums over its tiles that the cost needs."""

    tiles: tuple[AxisTile, ...]
    pairs: int
    interior_pairs: int
    keys: int
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, tiles: list[AxisTile]) -> _Cut:
        areas = [len(tile.queries) * len(tile.keys) for tile in tiles]
        return cls(
            tuple(tiles),
            sum(areas),
            sum(area for area, tile in zip(areas, tiles, strict=True) if tile.interior),
            sum(len(tile.keys) for tile in tiles),
            max(len(tile.queries) for tile in tiles),
            max(len(tile.keys) for tile in tiles),
        )


@lru_cache(maxsize=256)
def cut_grid(neighborhood: Neighborhood, mask_rows: int = 1) -> tuple[tuple[AxisTile, ...], ...]:
    """The cheapest cut: for each axis its tiles; the grid's tiles are their product.

    Args:
        neighborhood: the geometry.
        mask_rows: rows of mask that one query takes (the heads of a group, say).
    """
    axes = neighborhood.axes
    best = _cheapest(neighborhood, mask_rows, [_cuts(axis, merge=True) for axis in axes])
    if best is None:
        best = _cheapest(neighborhood, mask_rows, [_cuts(axis, merge=False) for axis in axes])
    if best is None:
        # Not even single queries fit: the unavoidable rest is a mask of one row.
        best = tuple(_cuts(axis, merge=False)[0] for axis in axes)
    return tuple(cut.tiles for cut in best)


@lru_cache(maxsize=256)
def predicted_speedup(neighborhood: Neighborhood, mask_rows: int = 1) -> float:
    """Dense attention's cost over that of the cheapest cut, in the units of the costs above.

    Arguments as for `cut_grid`. Global queries see all tokens in one more tile; global keys come
    along with every tile's own.
    """
    cuts = [_Cut.of(list(tiles)) for tiles in cut_grid(neighborhood, mask_rows)]
    count, tokens = neighborhood.global_tokens, neighborhood.tokens
    tiles = math.prod(len(cut.tiles) for cut in cuts)
    cost = _cost(cuts) + count * (neighborhood.grid_tokens + _GATHERED_KEY * tiles)
    if count:
        cost += count * tokens + _TILE
    return tokens * tokens / cost


def _cost(cuts: Sequence[_Cut]) -> float:
    """Of all tiles of the grid, without global tokens."""
    pairs = math.prod(cut.pairs for cut in cuts)
    masked = pairs - math.prod(cut.interior_pairs for cut in cuts)
    keys = math.prod(cut.keys for cut in cuts)
    tiles = math.prod(len(cut.tiles) for cut in cuts)
    return pairs + _MASKED_PAIR * masked + _GATHERED_KEY * keys + _TILE * tiles


def _cheapest(
    neighborhood: Neighborhood, mask_rows: int, cuts: list[list[_Cut]]
) -> tuple[_Cut, ...] | None:
    """The cheapest combination whose masks fit, if there is one."""
    lowest, best = math.inf, None
    for combination in itertools.product(*cuts):
        pairs = math.prod(cut.pairs for cut in combination)
        masked = pairs - math.prod(cut.interior_pairs for cut in combination)
        queries = math.prod(cut.max_queries for cut in combination)
        keys = math.prod(cut.max_keys for cut in combination) + neighborhood.global_tokens
        if masked and mask_rows * queries * keys > MAX_MASK:
            continue
        cost = _cost(combination)
        if cost < lowest:
            lowest, best = cost, combination
    return best


def _cuts(axis: Axis, merge: bool) -> list[_Cut]:
    """Cuts of one axis into equal boxes of each candidate size, smallest boxes first."""
    longest = axis.group(0).length
    sizes = {longest}
    for base in (1, 3):
        sizes.update(base << shift for shift in range(longest.bit_length()))
    for factor in (1, 2, 3, 4, 6, 8):
        sizes.add(axis.stride * factor)
        if axis.stride % factor == 0:
            sizes.add(axis.stride // factor)
    enough = min(longest, -(-axis.length // _MAX_BOXES))
    fitting = sorted(size for size in sizes if enough <= size <= longest)
    if axis.stride > 4:
        # Boxes that straddle stride groups only add masks.
        aligned = [s for s in fitting if s % axis.stride == 0 or axis.stride % s == 0]
        fitting = [s for s in fitting if s in aligned or s == longest]
    cuts = [_Cut.of(list(_tiles(axis, size, merge))) for size in fitting]
    unique = {cut.tiles: cut for cut in cuts}
    return list(unique.values())


def _tiles(axis: Axis, size: int, merge: bool) -> Iterator[AxisTile]:
    """Boxes of `size` queries in every dilation group; maybe neighbors of one window merged."""
    for offset in range(axis.dilation):
        group = axis.group(offset)
        open_tile: AxisTile | None = None
        for start in range(0, group.length, size):
            queries = range(start, min(start + size, group.length))
            keys = group.union(queries)
            interior = keys == group.intersection(queries)
            tile = AxisTile(group, queries, keys, offset, axis.dilation, interior)
            if open_tile and merge and interior and open_tile.interior and keys == open_tile.keys:
                joined = range(open_tile.queries.start, queries.stop)
                open_tile = AxisTile(group, joined, keys, offset, axis.dilation, True)
                continue
            if open_tile:
                yield open_tile
            open_tile = tile
        assert open_tile is not None
        yield open_tile
