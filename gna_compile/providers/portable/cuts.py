"""Which cut of a grid is the cheapest, and how fast it will be.

Every cost is a sum of products over the axes, so each axis is cut on its own, described by a few
sums, and all combinations of cuts are compared exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from gna_compile.geometry import AttentionPattern
from gna_compile.providers.portable.pieces import Piece, pieces_of
from gna_compile.providers.portable.tiles import AxisTile, cuts

# Costs in units of one (query, key) pair of one head; measured with PyTorch's CPU kernel.
_MASKED_PAIR = 0.1  # what a mask adds to a pair
_GATHERED_KEY = 24.0  # copying one key and value out of the grid, and the tensor core's ramp
_TILE = 2000.0  # calling the operators of one tile, shared by about a dozen heads

MAX_MASK = 1 << 22
"""Most elements of one tile's mask, wherever a cut of the grid allows it."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut of a grid: for each axis its tiles; the grid's tiles are their product."""

    axes: tuple[tuple[AxisTile, ...], ...]

    @cached_property
    def max_queries(self) -> int:
        """The most queries that a tile may have."""
        return math.prod(max(len(tile.positions) for tile in tiles) for tiles in self.axes)

    @cached_property
    def max_keys(self) -> int:
        """The most keys in grids that a tile may have."""
        of_axes = [
            [
                max(len(r.tokens) for r in runs)
                for runs in zip(*(t.keys for t in tiles), strict=True)
            ]
            for tiles in self.axes
        ]
        return sum(map(math.prod, zip(*of_axes, strict=True)))


@dataclass(frozen=True)
class _AxisCut:
    """One way to cut an axis, and the sums over its tiles that the cost needs; some by key grid."""

    tiles: tuple[AxisTile, ...]
    max_queries: int
    pairs: tuple[int, ...]
    full_pairs: tuple[int, ...]
    keys: tuple[int, ...]
    max_keys: tuple[int, ...]

    @classmethod
    def of(cls, tiles: tuple[AxisTile, ...]) -> _AxisCut:
        queries = [len(tile.positions) for tile in tiles]
        pairs, full_pairs, keys, max_keys = [], [], [], []
        for runs in zip(*(tile.keys for tile in tiles), strict=True):
            lengths = [len(run.positions) for run in runs]
            areas = [rows * length for rows, length in zip(queries, lengths, strict=True)]
            pairs.append(sum(areas))
            full_pairs.append(sum(area for area, run in zip(areas, runs, strict=True) if run.full))
            keys.append(sum(lengths))
            max_keys.append(max(lengths))
        sums = (tuple(column) for column in (pairs, full_pairs, keys, max_keys))
        return cls(tiles, max(queries), *sums)


@lru_cache(maxsize=256)
def cut_grid(piece: Piece, mask_rows: int = 1) -> Cut:
    """The cheapest cut of a piece's grid; no axes, and so one tile, where no window limits it.

    Args:
        piece: the queries and their keys.
        mask_rows: rows of mask that one query takes (the heads of a group, say).
    """
    if not piece.axes:
        return Cut(())
    for merge in (True, False):
        of_axes = [[_AxisCut.of(tiles) for tiles in cuts(axis, merge)] for axis in piece.axes]
        best = _cheapest(piece.linked_keys, mask_rows, of_axes)
        if best is not None:
            break
    else:
        # Not even single queries fit: the unavoidable rest is a mask of one row.
        best = tuple(of_axis[0] for of_axis in of_axes)
    return Cut(tuple(cut.tiles for cut in best))


@lru_cache(maxsize=256)
def predicted_speedup(pattern: AttentionPattern, mask_rows: int = 1) -> float:
    """Dense attention's cost over that of the cheapest cuts, in the units of the costs above.

    Args:
        pattern: one head group, at least one query and key.
        mask_rows: as for `cut_grid`.
    """
    cost = sum(_piece_cost(piece, mask_rows) for piece in pieces_of(pattern))
    return pattern.query_tokens * pattern.key_tokens / cost


def _piece_cost(piece: Piece, mask_rows: int) -> float:
    queries, linked = piece.query_tokens, piece.linked_keys
    if not piece.axes:
        gathered = linked if len(piece.linked) > 1 else 0
        return queries * linked + _GATHERED_KEY * gathered + _TILE
    of_axes = [_AxisCut.of(tiles) for tiles in cut_grid(piece, mask_rows).axes]
    tiles = math.prod(len(axis.tiles) for axis in of_axes)
    # Linked keys come along with every tile's own.
    return _cost(of_axes) + linked * (queries + _GATHERED_KEY * tiles)


def _total(sums: Iterable[tuple[int, ...]]) -> int:
    """Over the key grids, the products over the axes."""
    return sum(map(math.prod, zip(*sums, strict=True)))


def _is_masked(combination: Sequence[_AxisCut]) -> bool:
    pairs = _total(cut.pairs for cut in combination)
    return pairs > _total(cut.full_pairs for cut in combination)


def _cost(combination: Sequence[_AxisCut]) -> float:
    """Of all tiles of a grid, without the keys that all queries see."""
    pairs = _total(cut.pairs for cut in combination)
    masked = pairs - _total(cut.full_pairs for cut in combination)
    keys = _total(cut.keys for cut in combination)
    tiles = math.prod(len(cut.tiles) for cut in combination)
    return pairs + _MASKED_PAIR * masked + _GATHERED_KEY * keys + _TILE * tiles


def _cheapest(
    linked: int, mask_rows: int, of_axes: list[list[_AxisCut]]
) -> tuple[_AxisCut, ...] | None:
    """The cheapest combination whose masks fit, if there is one."""
    lowest, best = math.inf, None
    for combination in itertools.product(*of_axes):
        cost = _cost(combination)
        if cost >= lowest:
            continue
        queries = math.prod(cut.max_queries for cut in combination)
        keys = linked + _total(cut.max_keys for cut in combination)
        if mask_rows * queries * keys > MAX_MASK and _is_masked(combination):
            continue
        lowest, best = cost, combination
    return best
