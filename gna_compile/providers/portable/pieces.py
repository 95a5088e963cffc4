"""A pattern as pieces: queries with the same links, and the keys at hand that they are linked to.

Keys that all queries of a piece see are ranges of tokens, with neighboring ranges merged. The others
lie in grids, and the window says on each axis which of them a query sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gna_compile.geometry import AttentionPattern, Axis, GlobalTokens, GridTokens, HeadGroup, Link
from gna_compile.geometry.segments import Segment, ranges_of


@dataclass(frozen=True)
class AxisSight:
    """One axis of a piece's query grid, and of the key grids that its window reaches.

    Args:
        axis: the window on it.
        queries: the queries at hand, in the whole grid's coordinates.
        keys: the same of each key grid's keys.
        limited: whether the axis limits the keys of each key grid; else all at hand are seen.
    """

    axis: Axis
    queries: range
    keys: tuple[range, ...]
    limited: tuple[bool, ...]

    @classmethod
    def whole(cls, axis: Axis) -> AxisSight:
        """An axis of a grid that sees itself, all of it at hand."""
        tokens = range(axis.length)
        return cls(axis, tokens, (tokens,), (True,))

    @property
    def dilation(self) -> int:
        return self.axis.dilation if any(self.limited) else 1


@dataclass(frozen=True)
class TokenGrid:
    """A grid's tokens at hand: the first one's place in its sequence, and how they lie."""

    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries with the same links. Told apart by identity, since cuts are looked up at every call.

    Args:
        queries: ranges of the query sequence; one range, a grid, if there are axes.
        linked: ranges of the key sequence that all queries see, neighbors merged.
        sees_globals: whether there are global keys in `linked`, which a key mask may hide.
        may_be_blind: whether a query may see no key at all.
        axes: of the grid, if a window limits what its queries see; else none.
        grid: how the queries lie, if there are axes.
        key_grids: the grids that the window reaches.
    """

    queries: tuple[range, ...]
    linked: tuple[range, ...]
    sees_globals: bool
    may_be_blind: bool
    axes: tuple[AxisSight, ...] = ()
    grid: TokenGrid = TokenGrid(0, ())
    key_grids: tuple[TokenGrid, ...] = ()

    @property
    def query_tokens(self) -> int:
        return sum(map(len, self.queries))

    @property
    def linked_keys(self) -> int:
        return sum(map(len, self.linked))


def group_of(pattern: AttentionPattern) -> HeadGroup | None:
    """The group that all heads are in, or None if they do not all see the same."""
    groups = [group for group in pattern.head_groups if group.heads] or pattern.head_groups
    return groups[0] if all(group.windows == groups[0].windows for group in groups) else None


@lru_cache(maxsize=256)
def pieces_of(pattern: AttentionPattern) -> tuple[Piece, ...]:
    """The pieces, each query in exactly one; those without axes come first.

    Args:
        pattern: one head group, whether canonical or not.
    """
    group = group_of(pattern)
    assert group is not None
    rows: dict[tuple[int, ...], list[range]] = {}
    grids = []
    places = list(ranges_of(pattern.keys))
    for number, (segment, queries) in enumerate(
        zip(pattern.queries, ranges_of(pattern.queries), strict=True)
    ):
        if not segment.tokens:
            continue
        linked, windows = _links(pattern, group, number)
        if windows:
            assert isinstance(segment, GridTokens)
            grids.append(_grid_piece(pattern, queries, segment, linked, windows, places))
        else:
            rows.setdefault(linked, []).append(queries)
    pieces = [_piece(pattern, queries, linked, places) for linked, queries in rows.items()]
    return (*pieces, *grids)


_Axes = tuple[Axis | None, ...]


def _links(
    pattern: AttentionPattern, group: HeadGroup, query: int
) -> tuple[tuple[int, ...], dict[int, _Axes]]:
    """The key segments that all queries of a segment see, and those behind a window, with its axes."""
    linked, windows = [], {}
    for key, link in enumerate(pattern.links[query]):
        if link is Link.NONE or not pattern.keys[key].tokens:
            continue
        axes = pattern.axes(group, query, key)
        if axes is None or all(axis is None or axis.is_full for axis in axes):
            linked.append(key)
        else:
            windows[key] = axes
    return tuple(linked), windows


def _piece(
    pattern: AttentionPattern,
    queries: Iterable[range],
    linked: Sequence[int],
    places: Sequence[range],
) -> Piece:
    segments: list[Segment] = [pattern.keys[key] for key in linked]
    are_global = [isinstance(segment, GlobalTokens) for segment in segments]
    return Piece(
        _merged(queries),
        _merged(places[key] for key in linked),
        sees_globals=any(are_global),
        may_be_blind=all(are_global),
    )


def _grid_piece(
    pattern: AttentionPattern,
    queries: range,
    segment: GridTokens,
    linked: Sequence[int],
    windows: dict[int, _Axes],
    places: Sequence[range],
) -> Piece:
    rows = _piece(pattern, [queries], linked, places)
    key_grids = []
    sights: list[tuple[list[range], list[bool]]] = [([], []) for _ in range(segment.rank)]
    axis_of: list[Axis] = [Axis(length, length) for length in segment.grid]
    for key, axes in windows.items():
        other = pattern.keys[key]
        assert isinstance(other, GridTokens)
        key_grids.append(TokenGrid(places[key].start, other.shape))
        for number, axis in enumerate(axes):
            at_hand, limited = sights[number]
            at_hand.append(other.box[number])
            limited.append(axis is not None)
            axis_of[number] = axis or axis_of[number]
    return Piece(
        rows.queries,
        rows.linked,
        rows.sees_globals,
        # Where all keys at hand are there, a window shows each query at least one.
        may_be_blind=rows.may_be_blind and pattern.partial,
        axes=tuple(
            AxisSight(axis, queries, tuple(keys), tuple(limited))
            for axis, queries, (keys, limited) in zip(axis_of, segment.box, sights, strict=True)
        ),
        grid=TokenGrid(queries.start, segment.shape),
        key_grids=tuple(key_grids),
    )


def _merged(ranges: Iterable[range]) -> tuple[range, ...]:
    merged: list[range] = []
    for tokens in ranges:
        if merged and merged[-1].stop == tokens.start:
            merged[-1] = range(merged[-1].start, tokens.stop)
        else:
            merged.append(tokens)
    return tuple(merged)
