"""Exact counts of key tiles per query tile, in plain ints, without a loop over tiles of the grid.

Queries and keys are cut into boxes. The mask is separable, so what a query box visits is a box of
key tiles, and every count over the grid is a product over its axes. On one axis the query tiles
fall into few kinds: those whose window is held at an end of the axis, and those that slide, whose
counts repeat with the period lcm(query extent, stride). The work is therefore bounded by the
extents of the boxes, whatever the length of the axis.

A query tile *visits* the key tiles that meet its union box. A visited key tile is a
*full* block, and needs no mask, if it lies wholly inside the intersection box; otherwise it is a
*partial* block. The GNA paper calls them interior and boundary tiles.
Key tiles start at the union box (`dynamic`) or lie on a fixed grid (`static`); the words and both
tilings are those of Generalized Neighborhood Attention (arXiv 2504.16922).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from gna_compile.geometry import Axis, GeometryError, Neighborhood

Tiling = Literal["dynamic", "static"]
Box = tuple[int, ...]


class _Span(NamedTuple):
    """Query tiles in a row, each an extent further; `growth` is by how much both stops move then."""

    union_start: int
    union_stop: int
    intersection_start: int
    intersection_stop: int
    tiles: int = 1
    growth: int = 0
    times: int = 1


class Run(NamedTuple):
    """`times` x `length` query tiles; within one run of `length` both counts grow by `step`."""

    visited: int
    full: int
    step: int
    length: int
    times: int


@dataclass(frozen=True)
class AxisCounts:
    """Key tiles per query tile along one axis, over all of its dilation groups.

    Attributes:
        query_tiles: how many query tiles there are.
        visited, full: sums over them.
        most: the most key tiles that one of them visits.
        runs: the kinds of query tiles.
    """

    query_tiles: int
    visited: int
    full: int
    most: int
    runs: tuple[Run, ...]

    @property
    def extremes(self) -> frozenset[tuple[int, int]]:
        """(visited, full) at the ends of the runs; a multilinear function peaks at these."""
        ends = set()
        for run in self.runs:
            grown = run.step * (run.length - 1)
            ends |= {(run.visited, run.full), (run.visited + grown, run.full + grown)}
        return frozenset(ends)


@lru_cache(maxsize=8192)
def axis_counts(
    axis: Axis, query_extent: int, key_extent: int, tiling: Tiling = "dynamic"
) -> AxisCounts:
    """Counts along one axis cut into tiles of these extents, each dilation group on its own."""
    kinds: Counter[tuple[int, int, int, int]] = Counter()
    longer = axis.length % axis.dilation
    # Groups differ in length only: the first `longer` ones have one token more.
    for group, groups in ((0, longer), (axis.dilation - 1, axis.dilation - longer)):
        if groups:
            for span in _spans(axis.group(group), query_extent, key_extent, tiling):
                for run in _runs(span, key_extent, tiling):
                    kinds[run[:4]] += run.times * groups
    runs = tuple(Run(*kind, times) for kind, times in kinds.items())
    return AxisCounts(
        query_tiles=sum(run.times * run.length for run in runs),
        visited=sum(_total(run, run.visited) for run in runs),
        full=sum(_total(run, run.full) for run in runs),
        most=max(run.visited + run.step * (run.length - 1) for run in runs),
        runs=runs,
    )


def _total(run: Run, first: int) -> int:
    return run.times * (run.length * first + run.step * (run.length * (run.length - 1) // 2))


def _spans(axis: Axis, extent: int, key_extent: int, tiling: Tiling) -> tuple[_Span, ...]:
    # Only a static grid of key tiles makes the spans depend on the key extent.
    return _cut(axis, extent, key_extent if tiling == "static" else 1)


@lru_cache(maxsize=4096)
def _cut(axis: Axis, extent: int, alignment: int) -> tuple[_Span, ...]:
    """All query tiles of an axis of dilation 1; alike ones once."""
    slides, held = _sliding(axis)
    whole = axis.length // extent
    first, stop = -(-slides // extent), min(held // extent, whole)
    period = math.lcm(extent, axis.stride, alignment) // extent
    repeats = max(stop - first, 0) // period
    spans: list[_Span] = []
    if repeats > 1:
        spans += _walk(axis, extent, 0, first)
        spans += (s._replace(times=repeats) for s in _walk(axis, extent, first, first + period))
        spans += _walk(axis, extent, first + repeats * period, whole)
    else:
        spans += _walk(axis, extent, 0, whole)
    if whole * extent < axis.length:
        spans.append(_span(axis, range(whole * extent, axis.length)))
    return tuple(spans)


def _sliding(axis: Axis) -> tuple[int, int]:
    """The queries whose window is held at neither end of the axis, as start and stop."""
    held = axis.union(range(axis.length - 1, axis.length)).start
    if held == 0:
        return axis.length, axis.length
    return axis.seen_by(range(1)).stop, axis.seen_by(range(held - 1, held)).stop


def _walk(axis: Axis, extent: int, tile: int, stop: int) -> Iterator[_Span]:
    """Whole query tiles from `tile` on: those of one window start together, others one by one."""
    slides, held = _sliding(axis)
    while tile < stop:
        query = tile * extent
        if query < slides:
            change = slides
        elif query < held:
            change = (query // axis.stride + 1) * axis.stride
        else:
            change = axis.length
        tiles = max(min(change // extent, stop) - tile, 1)
        growth = extent if axis.causal else 0
        yield _span(axis, range(query, query + extent))._replace(tiles=tiles, growth=growth)
        tile += tiles


def _span(axis: Axis, queries: range) -> _Span:
    union, intersection = axis.union(queries), axis.intersection(queries)
    return _Span(union.start, union.stop, intersection.start, intersection.stop)


def _runs(span: _Span, extent: int, tiling: Tiling) -> Iterator[Run]:
    if span.growth == 0 or span.tiles == 1:
        yield Run(*_count(span, extent, tiling), 0, 1, span.tiles * span.times)
        return
    # After `period` tiles the box has grown by whole key tiles. The first period stands alone: its
    # intersection box may be too small to follow the rule.
    period = extent // math.gcd(extent, span.growth)
    step = period * span.growth // extent
    for index in range(min(2 * period, span.tiles)):
        grown = index * span.growth
        tile = span._replace(
            union_stop=span.union_stop + grown, intersection_stop=span.intersection_stop + grown
        )
        length = 1 if index < period else -(-(span.tiles - index) // period)
        yield Run(*_count(tile, extent, tiling), step if length > 1 else 0, length, span.times)


def _count(span: _Span, extent: int, tiling: Tiling) -> tuple[int, int]:
    origin = span.union_start if tiling == "dynamic" else 0
    visited = -((origin - span.union_stop) // extent) - (span.union_start - origin) // extent
    whole = (span.intersection_stop - origin) // extent
    return visited, max(whole + (origin - span.intersection_start) // extent, 0)


@dataclass(frozen=True)
class Tally:
    """A count of key tiles, over query tiles: its sum, its largest value, its mean."""

    sum: int
    max: int
    query_tiles: int

    @property
    def mean(self) -> float:
        """0 if there are no query tiles."""
        return self.sum / self.query_tiles if self.query_tiles else 0.0


@dataclass(frozen=True)
class Counts:
    """Key tiles per query tile, over the query tiles of one kind (grid or global)."""

    query_tiles: int
    visited: Tally
    full: Tally
    partial: Tally

    @classmethod
    def of(cls, query_tiles: int, *tallies: tuple[int, int]) -> Counts:
        """From the sum and the largest value of visited, full and partial blocks."""
        return cls(query_tiles, *(Tally(*tally, query_tiles) for tally in tallies))


def grid_counts(
    neighborhood: Neighborhood,
    query_box: Box,
    key_box: Box,
    tiling: Tiling = "dynamic",
    key_mask: bool = False,
) -> Counts:
    """Counts over the query tiles of the grid; the key tiles of global tokens included.

    Args:
        neighborhood: the geometry.
        query_box: tokens of a query tile along each axis.
        key_box: tokens of a key tile along each axis. Global keys lie in tiles of as many tokens,
            prefix and suffix apart.
        tiling: where key tiles start.
        key_mask: global keys may be masked, so all tiles of them are partial blocks.

    Raises:
        GeometryError: if a box does not fit the grid's rank or has an extent below 1.
    """
    _check(neighborhood, query_box, "query box")
    _check(neighborhood, key_box, "key box")
    axes = [
        axis_counts(*values, tiling)
        for values in zip(neighborhood.axes, query_box, key_box, strict=True)
    ]
    tiles = math.prod(axis.query_tiles for axis in axes)
    visited, full = global_key_tiles(neighborhood, math.prod(key_box))
    full = 0 if key_mask else full
    partial = visited - full
    most_full = math.prod(max(i for _, i in axis.extremes) for axis in axes)
    most_partial = max(v - i for v, i in _products([axis.extremes for axis in axes]))
    grid_visited = math.prod(axis.visited for axis in axes)
    grid_full = math.prod(axis.full for axis in axes)
    return Counts.of(
        tiles,
        (grid_visited + tiles * visited, math.prod(axis.most for axis in axes) + visited),
        (grid_full + tiles * full, most_full + full),
        (grid_visited - grid_full + tiles * partial, most_partial + partial),
    )


def _products(axes: Sequence[frozenset[tuple[int, int]]]) -> list[tuple[int, int]]:
    """(visited, full) of the grid's tiles, without those that cannot have most partial blocks."""
    products = [(1, 1)]
    for axis in axes:
        every = {(v * a, i * b) for v, i in products for a, b in axis}
        products, fewest = [], math.inf
        for visited, full in sorted(every, key=lambda pair: (-pair[0], pair[1])):
            if full < fewest:
                products.append((visited, full))
                fewest = full
    return products


def global_counts(
    neighborhood: Neighborhood,
    query_tile: int,
    key_box: Box,
    key_mask: bool = False,
    queries: range | None = None,
) -> Counts:
    """Counts over the query tiles of global tokens, `query_tile` tokens each: they see everything.

    Such a tile walks the whole grid (every dilation group) in key boxes from the grid's corner on.
    Only tiles that hold some of `queries` count, which are counted over prefix, then suffix; None is
    all.
    """
    _check(neighborhood, key_box, "key box")
    tokens = range(neighborhood.global_tokens)
    parts = tokens[: neighborhood.prefix], tokens[neighborhood.prefix :]
    rows = tokens if queries is None else queries
    tiles = sum(_tiles_of(rows, part, query_tile) for part in parts)
    visited, full = global_key_tiles(neighborhood, math.prod(key_box))
    full = 0 if key_mask else full
    all_tiles, whole_tiles = 1, 1
    for axis, extent in zip(neighborhood.axes, key_box, strict=True):
        every, whole = axis_key_tiles(axis, extent)
        all_tiles, whole_tiles = all_tiles * every, whole_tiles * whole
    visited, full = visited + all_tiles, full + whole_tiles
    if tiles == 0:
        visited = full = 0
    partial = visited - full
    return Counts.of(tiles, *((tiles * count, count) for count in (visited, full, partial)))


def _tiles_of(tokens: range, part: range, extent: int) -> int:
    """Tiles that hold some of the tokens, of those that a part is cut into from its start on."""
    start = max(tokens.start, part.start) - part.start
    stop = min(tokens.stop, part.stop) - part.start
    return -(-stop // extent) - start // extent if start < stop else 0


def global_key_tiles(neighborhood: Neighborhood, extent: int) -> tuple[int, int]:
    """Key tiles of the global tokens, and how many of them are full."""
    parts = (neighborhood.prefix, neighborhood.suffix)
    return sum(-(-part // extent) for part in parts), sum(part // extent for part in parts)


def axis_key_tiles(axis: Axis, extent: int) -> tuple[int, int]:
    """Key tiles of the whole axis from each dilation group's start on, and how many are full."""
    length, longer = divmod(axis.length, axis.dilation)
    shorter = axis.dilation - longer
    every = longer * -(-(length + 1) // extent) + shorter * -(-length // extent)
    return every, longer * ((length + 1) // extent) + shorter * (length // extent)


def _check(neighborhood: Neighborhood, box: Box, name: str) -> None:
    if len(box) != len(neighborhood.axes):
        raise GeometryError(
            f"{name} {box} has {len(box)} extents for a grid of {len(neighborhood.axes)} axes "
            f"{neighborhood.grid}: give one per axis"
        )
    for index, extent in enumerate(box):
        if extent < 1:
            raise GeometryError(f"axis {index}: {name} extent {extent} must be at least 1")
