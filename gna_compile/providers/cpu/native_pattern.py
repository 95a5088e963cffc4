"""A pattern as the native code takes it: segments, links, and the boxes of its tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from gna_compile import _native
from gna_compile.geometry import AttentionPattern, Axis, GlobalTokens, Link, Segment

Box = tuple[int, ...]
"""The extents of a box of tokens as log2, one per axis; () for a segment that no window limits."""


@dataclass(frozen=True)
class Boxes:
    """The boxes of both passes, one for each segment.

    Args:
        queries: of the forward and of the queries' gradient.
        keys: of the keys' and values' gradients.
    """

    queries: tuple[Box, ...]
    keys: tuple[Box, ...]


def links_of(pattern: AttentionPattern) -> tuple[tuple[Link, ...], ...]:
    """The pattern's links, `WINDOW` only where a window hides something.

    Args:
        pattern: of one head group.
    """
    (group,) = pattern.head_groups

    def link(query: int, key: int) -> Link:
        axes = pattern.axes(group, query, key)
        if axes is None or all(axis is None or axis.is_full for axis in axes):
            return Link(min(pattern.links[query][key], Link.FULL))
        return Link.WINDOW

    count = range(len(pattern.keys))
    return tuple(tuple(link(query, key) for key in count) for query in range(len(pattern.queries)))


def native_pattern(pattern: AttentionPattern, boxes: Boxes | None = None) -> _native.Pattern:
    """The pattern for the native code.

    Args:
        pattern: of one head group.
        boxes: of its tiles; None if it is only asked about, never run.
    """
    (group,) = pattern.head_groups
    windows = dict(zip(pattern.query_grids, group.windows, strict=True))
    queries, keys = [], []
    for place, segment in enumerate(pattern.queries):
        window = windows.get(place)
        axes = None
        if window is not None and not isinstance(segment, GlobalTokens):
            axes = window.axes(segment.grid)
        queries.append(_segment(segment, boxes.queries[place] if boxes else (), axes))
    for place, segment in enumerate(pattern.keys):
        keys.append(_segment(segment, boxes.keys[place] if boxes else ()))
    links = [int(link) for row in links_of(pattern) for link in row]
    return _native.Pattern(queries=queries, keys=keys, links=links)


def _segment(
    segment: Segment, box: Box, axes: Iterable[Axis] | None = None
) -> int | list[tuple[int, ...]]:
    if isinstance(segment, GlobalTokens):
        return segment.tokens
    extents = box or _ANY_BOX[segment.rank]
    axes = axes or [Axis(1, 1)] * segment.rank
    return [
        (length, start, stop, extent, axis.window, axis.stride, axis.dilation, axis.causal)
        for length, start, stop, extent, axis in zip(
            segment.grid, segment.start, segment.stop, extents, axes, strict=True
        )
    ]


# One that the native code takes.
_ANY_BOX = {rank: (4, *itertools.repeat(0, rank - 1)) for rank in (1, 2, 3)}
