"""Which boxes of tokens the Hopper kernel works on: those whose key tiles cost least, by exact count.

Query and key tiles have 128 tokens each, in boxes of power-of-two extents. The mask is separable, so
the key tiles that a query tile visits are a box of tiles, and every sum over query tiles is a product
of sums along the axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gna_compile.geometry import Axis, Neighborhood

LOG2_TILE = 7

_MASKED_TILE = 0.5  # what a mask adds to the time of a key tile
_QUERY_TILE = 1.5  # what a query tile costs besides its key tiles, in key tiles

# The copy engine's limits on the steps between tokens, and on what a box spans.
_MAX_STEP = 8
_MAX_SPAN = 256


@dataclass(frozen=True)
class Boxes:
    """Boxes as log2 of their extents, one per axis; each sums to LOG2_TILE."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


@lru_cache(maxsize=256)
def choose_boxes(neighborhood: Neighborhood) -> Boxes | None:
    """The cheapest boxes, or None if dilation leaves none that the copy engine can read."""
    shapes = list(_shapes(neighborhood))
    if not shapes:
        return None
    best = min(
        itertools.product(shapes, shapes), key=lambda pair: _cost(neighborhood, pair[0], pair[1])
    )
    return Boxes(*best)


def merged(neighborhood: Neighborhood) -> Neighborhood:
    """The same attention with neighbouring axes that hide nothing joined into one."""
    axes: list[Axis] = []
    for axis in neighborhood.axes:
        if axes and axis.is_full and axes[-1].is_full:
            length = axes.pop().length * axis.length
            axes.append(Axis(length, length))
        else:
            axes.append(axis)
    return Neighborhood(tuple(axes), neighborhood.prefix, neighborhood.suffix)


def _shapes(neighborhood: Neighborhood) -> Iterator[tuple[int, ...]]:
    """The shapes that the copy engine can read, without those far longer than an axis."""

    def fits(axis: Axis, log2: int) -> bool:
        step = axis.dilation
        return log2 == 0 or step == 1 or (step <= _MAX_STEP and step << log2 <= _MAX_SPAN)

    def sensible(axis: Axis, log2: int) -> bool:
        return log2 == 0 or 1 << (log2 - 1) < axis.group(0).length

    axes = neighborhood.axes
    readable = [
        shape
        for shape in itertools.product(range(LOG2_TILE + 1), repeat=len(axes))
        if sum(shape) == LOG2_TILE and all(map(fits, axes, shape))
    ]
    short = [shape for shape in readable if all(map(sensible, axes, shape))]
    yield from short or readable


def _cost(neighborhood: Neighborhood, queries: tuple[int, ...], keys: tuple[int, ...]) -> float:
    counts = [_count(*values) for values in zip(neighborhood.axes, queries, keys, strict=True)]
    tiles = math.prod(count.query_tiles for count in counts)
    visited = math.prod(count.visited for count in counts)
    interior = math.prod(count.interior for count in counts)
    return visited + _MASKED_TILE * (visited - interior) + _QUERY_TILE * tiles


@dataclass(frozen=True)
class _Count:
    """Sums over the query tiles along one axis."""

    query_tiles: int
    visited: int
    interior: int


@lru_cache(maxsize=4096)
def _count(axis: Axis, log2_query: int, log2_key: int) -> _Count:
    query, key = 1 << log2_query, 1 << log2_key
    tiles = visited = interior = 0
    longer = axis.length % axis.dilation
    for group, times in ((0, longer), (axis.dilation - 1, axis.dilation - longer)):
        if not times:
            continue
        part = axis.group(group)
        for begin in range(0, part.length, query):
            box = range(begin, min(begin + query, part.length))
            union, shared = part.union(box), part.intersection(box)
            first = -(-(shared.start - union.start) // key)
            tiles += times
            visited += times * -(-len(union) // key)
            interior += times * max((shared.stop - union.start) // key - first, 0)
    return _Count(tiles, visited, interior)
