"""How one axis is cut: runs of queries, each against the keys of each key grid that any of them sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gna_compile.geometry import Axis
from gna_compile.providers.portable.pieces import AxisSight

_MAX_TILES = 1024  # per axis, unless the axis has no other cut


@dataclass(frozen=True)
class KeyRun:
    """The keys of one key grid's axis that any query of a run sees.

    Args:
        positions: in the dilation group that the queries lie in, the union box; all at hand where
            the axis limits nothing.
        tokens: the same keys among those at hand.
        full: every query sees every key, so no mask is needed.
    """

    positions: range
    tokens: range
    full: bool


@dataclass(frozen=True)
class AxisTile:
    """A run of queries on one axis and the keys that any of them sees.

    Args:
        axis: the dilation group that the queries lie in, itself an axis of dilation 1.
        positions: of the queries in the group.
        tokens: the same queries among those at hand.
        keys: of each key grid.
    """

    axis: Axis
    positions: range
    tokens: range
    keys: tuple[KeyRun, ...]

    @property
    def full(self) -> bool:
        return all(run.full for run in self.keys)


def cuts(sight: AxisSight, merge: bool) -> list[tuple[AxisTile, ...]]:
    """Cuts of one axis into equal runs of each candidate size, smallest runs first."""
    longest = max(len(positions) for _, positions in _groups(sight))
    stride = sight.axis.stride
    sizes = {longest}
    for base in (1, 3):
        sizes.update(base << shift for shift in range(longest.bit_length()))
    for factor in (1, 2, 3, 4, 6, 8):
        sizes.add(stride * factor)
        if stride % factor == 0:
            sizes.add(stride // factor)
    enough = min(longest, -(-len(sight.queries) // _MAX_TILES))
    fitting = sorted(size for size in sizes if enough <= size <= longest)
    if stride > 4:
        # Runs that straddle stride groups only add masks.
        aligned = [s for s in fitting if s % stride == 0 or stride % s == 0]
        fitting = [s for s in fitting if s in aligned or s == longest]
    unique = dict.fromkeys(tuple(tiles(sight, size, merge)) for size in fitting)
    return list(unique)


def tiles(sight: AxisSight, size: int, merge: bool) -> Iterator[AxisTile]:
    """Runs of `size` queries in every dilation group; maybe neighbors of one window merged."""
    for offset, at_hand in _groups(sight):
        group = sight.axis.group(offset)
        open_tile: AxisTile | None = None
        for positions in _runs(at_hand, size):
            tile = _tile(sight, group, offset, positions)
            if open_tile and merge and tile.full and tile.keys == open_tile.keys:
                joined = range(open_tile.positions.start, positions.stop)
                tokens = _tokens(joined, offset, sight.dilation, sight.queries.start)
                open_tile = AxisTile(group, joined, tokens, tile.keys)
                continue
            if open_tile:
                yield open_tile
            open_tile = tile
        assert open_tile is not None
        yield open_tile


def _groups(sight: AxisSight) -> Iterator[tuple[int, range]]:
    """The dilation groups with queries at hand: their first tokens, their queries' positions."""
    for offset in range(sight.dilation):
        positions = _positions(sight.queries, offset, sight.dilation)
        if positions:
            yield offset, positions


def _runs(positions: range, size: int) -> Iterator[range]:
    """Runs that start at multiples of their size, so that they keep to stride groups."""
    first, stop = positions.start, positions.stop
    if size >= stop - first:
        yield positions
        return
    for start in range(first // size * size, stop, size):
        yield range(max(start, first), min(start + size, stop))


def _tile(sight: AxisSight, group: Axis, offset: int, positions: range) -> AxisTile:
    dilation = sight.dilation
    runs = []
    for keys, limited in zip(sight.keys, sight.limited, strict=True):
        if not limited:
            runs.append(KeyRun(keys, range(len(keys)), full=True))
            continue
        at_hand = _positions(keys, offset, dilation)
        seen = _overlap(group.union(positions), at_hand)
        seen_by_all = group.intersection(positions)
        full = not seen or (seen.start >= seen_by_all.start and seen.stop <= seen_by_all.stop)
        runs.append(KeyRun(seen, _tokens(seen, offset, dilation, keys.start), full))
    tokens = _tokens(positions, offset, dilation, sight.queries.start)
    return AxisTile(group, positions, tokens, tuple(runs))


def _positions(tokens: range, offset: int, dilation: int) -> range:
    """The positions of a dilation group that lie within a range of an axis."""
    start = max(-(-(tokens.start - offset) // dilation), 0)
    return range(start, max(-(-(tokens.stop - offset) // dilation), start))


def _overlap(left: range, right: range) -> range:
    start = max(left.start, right.start)
    return range(start, max(min(left.stop, right.stop), start))


def _tokens(positions: range, offset: int, dilation: int, first: int) -> range:
    """Positions of a dilation group as tokens, counted from the token `first`."""
    if not positions:
        return range(0)
    start = offset + dilation * positions.start - first
    return range(start, start + dilation * (len(positions) - 1) + 1, dilation)
