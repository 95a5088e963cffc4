"""A pattern as a flat list of ints: the argument of the op, of compiled graphs and of caches.

    [VERSION, partial, segments of the queries, segments of the keys, links, head groups]

    segments      their number, then each: 0, tokens                      global tokens
                                           rank, lengths, start, stop     a grid, or a box of it
                  of the keys: -1 if they are those of the queries
    links         for each query segment, for each key segment: 0 none, 1 full, 2 window
    head groups   their number, then each: heads, then for each grid among the queries:
                                           0                              full
                                           rank, window, stride, dilation, causal

Equal patterns have equal lists, since what is encoded is the canonical form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gna_compile.geometry.axis import GeometryError
from gna_compile.geometry.canonical import canonical
from gna_compile.geometry.pattern import (
    AttentionPattern,
    HeadGroup,
    Link,
    Window,
    links_between,
)
from gna_compile.geometry.segments import GlobalTokens, GridTokens, Segment

VERSION = 1
SAME = -1


def encode(pattern: AttentionPattern) -> list[int]:
    """The list of a pattern; equal for equal patterns."""
    return write(canonical(pattern))


def write(pattern: AttentionPattern) -> list[int]:
    """The list of a pattern as it is written, canonical or not."""
    ints = [VERSION, int(pattern.partial), *_segments(pattern.queries)]
    ints += [SAME] if pattern.keys == pattern.queries else _segments(pattern.keys)
    ints += [int(link) for row in pattern.links for link in row]
    ints.append(len(pattern.head_groups))
    for group in pattern.head_groups:
        ints.append(group.heads)
        for window in group.windows:
            ints += [0] if window is None else _window(window)
    return ints


def write_layout(
    segments: Sequence[Any],
    head_groups: Sequence[tuple[Any, Sequence[Any]]],
    between_grids: Link = Link.FULL,
) -> list[Any]:
    """The list of a sequence that attends to itself; every size may be a symbol or a graph node.

    Args:
        segments: each a number of global tokens, or the lengths of a whole grid.
        head_groups: for each its heads and, for each grid, None where it is full, or its window,
            stride, dilation and causality, each with one entry for each axis.
        between_grids: what two grids see of each other.

    Raises:
        GeometryError: if the entries per axis are not as many as the axes, or a count is negative.

    Example:
        >>> write_layout([77, (64,)], [(4, [((16,), (8,), (1,), (False,))])])
        [1, 0, 2, 0, 77, 1, 64, 0, 64, -1, 1, 1, 1, 2, 1, 4, 1, 16, 8, 1, 0]
    """
    grids = [segment for segment in segments if isinstance(segment, tuple)]
    ints: list[Any] = [VERSION, 0, len(segments)]
    for segment in segments:
        if isinstance(segment, tuple):
            ints += [len(segment), *segment, *[0] * len(segment), *segment]
        elif isinstance(segment, int) and segment < 0:
            raise GeometryError(f"a segment of {segment} global tokens; it must have at least 0")
        else:
            ints += [0, segment]
    links = links_between([isinstance(s, tuple) for s in segments], between_grids=between_grids)
    ints += [SAME, *(int(link) for row in links for link in row), len(head_groups)]
    for heads, windows in head_groups:
        ints.append(heads)
        for grid, window in zip(grids, windows, strict=True):
            ints += [0] if window is None else _entries(grid, window)
    return ints


def write_grid(
    grid: Sequence[Any],
    window: Sequence[Any],
    stride: Sequence[Any],
    dilation: Sequence[Any],
    causal: Sequence[bool],
    prefix: Any,
    suffix: Any,
    heads: Any,
) -> list[Any]:
    """As `write_layout`, of one grid with global tokens around it.

    Raises:
        GeometryError: if the entries per axis are not as many as the axes, or a count is negative.
    """
    for name, count in (("prefix", prefix), ("suffix", suffix)):
        if isinstance(count, int) and count < 0:
            raise GeometryError(f"{name} {count} must be at least 0")
    around = [[] if isinstance(n, int) and n == 0 else [n] for n in (prefix, suffix)]
    return write_layout(
        [*around[0], tuple(grid), *around[1]], [(heads, [(window, stride, dilation, causal)])]
    )


def _entries(grid: Sequence[Any], window: Sequence[Sequence[Any]]) -> list[Any]:
    names = ("window", "stride", "dilation", "causal")
    for name, values in zip(names, window, strict=True):
        if len(values) != len(grid):
            raise GeometryError(
                f"{name} has {len(values)} entries for a grid of {len(grid)} axes {tuple(grid)}"
            )
    keys, stride, dilation, causal = window
    return [len(grid), *keys, *stride, *dilation, *map(int, causal)]


def decode(ints: Sequence[int]) -> AttentionPattern:
    """The pattern of a list.

    Args:
        ints: what `encode` gave.

    Raises:
        GeometryError: if the list is none of this version, or its pattern breaks a rule.
    """
    reader = _Reader(ints)
    version = reader.take("version")
    if version != VERSION:
        raise GeometryError(
            f"the pattern {list(ints)} is of version {version}, not {VERSION}: compile the model "
            "again with this gna-compile"
        )
    partial = reader.take("partial") != 0
    queries = reader.segments(reader.take("number of query segments"))
    count = reader.take("number of key segments")
    keys = queries if count == SAME else reader.segments(count)
    links = tuple(tuple(reader.link() for _ in keys) for _ in queries)
    grids = [segment.rank for segment in queries if isinstance(segment, GridTokens)]
    groups = tuple(
        HeadGroup(reader.take("heads"), tuple(reader.window(rank) for rank in grids))
        for _ in range(reader.take("number of head groups"))
    )
    reader.finish()
    return AttentionPattern(queries, keys, links, groups, partial)


def _segments(segments: Sequence[Segment]) -> list[int]:
    ints = [len(segments)]
    for segment in segments:
        if isinstance(segment, GlobalTokens):
            ints += [0, segment.tokens]
        else:
            ints += [segment.rank, *segment.grid, *segment.start, *segment.stop]
    return ints


def _window(window: Window) -> list[int]:
    rows = (window.window, window.stride, window.dilation, map(int, window.causal))
    return [len(window.window), *(value for row in rows for value in row)]


class _Reader:
    """Takes one entry after another, and says what was expected where the list ends."""

    def __init__(self, ints: Sequence[int]) -> None:
        self._ints = ints
        self._rest: Iterator[int] = iter(ints)

    def take(self, what: str) -> int:
        for value in self._rest:
            return value
        raise GeometryError(f"the pattern {list(self._ints)} ends where its {what} should be")

    def many(self, count: int, what: str) -> tuple[int, ...]:
        return tuple(self.take(what) for _ in range(count))

    def segments(self, count: int) -> tuple[Segment, ...]:
        return tuple(self.segment() for _ in range(count))

    def segment(self) -> Segment:
        rank = self.take("segment")
        if rank == 0:
            return GlobalTokens(self.take("global tokens"))
        return GridTokens(*(self.many(rank, name) for name in ("grid", "start", "stop")))

    def link(self) -> Link:
        value = self.take("link")
        try:
            return Link(value)
        except ValueError:
            raise GeometryError(
                f"the pattern {list(self._ints)} has the link {value}; there are 0, 1 and 2"
            ) from None

    def window(self, grid_rank: int) -> Window | None:
        rank = self.take("window")
        if rank == 0:
            return None
        if rank != grid_rank:
            raise GeometryError(
                f"the pattern {list(self._ints)} has a window of {rank} axes for a grid of {grid_rank}"
            )
        rows = [self.many(rank, name) for name in ("window", "stride", "dilation")]
        causal = tuple(value != 0 for value in self.many(rank, "causal"))
        return Window(rows[0], rows[1], rows[2], causal)

    def finish(self) -> None:
        if any(True for _ in self._rest):
            raise GeometryError(f"the pattern {list(self._ints)} goes on after its last head group")
