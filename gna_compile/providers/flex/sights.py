"""What the queries of one segment see of the keys of another: nothing, all, or what a window leaves."""

from __future__ import annotations

from collections.abc import Sequence

from gna_compile.geometry import AttentionPattern, Axis, Link

Sight = tuple[Axis | None, ...] | None
"""None: nothing. (): all keys. Else the axes of the window, None for an axis that hides no key."""

Sights = Sequence[Sequence[Sight]]
"""For each segment, or part, of the queries, what it sees of each of the keys."""


def sights_of(pattern: AttentionPattern) -> Sights:
    """What the segments of a pattern of one head group see of each other."""
    keys = range(len(pattern.keys))
    return tuple(
        tuple(_sight(pattern, query, key) for key in keys) for query in range(len(pattern.queries))
    )


def _sight(pattern: AttentionPattern, query: int, key: int) -> Sight:
    if pattern.links[query][key] is Link.NONE:
        return None
    axes = pattern.axes(pattern.head_groups[0], query, key) or ()
    hiding = tuple(None if axis is None or axis.is_full else axis for axis in axes)
    return hiding if any(hiding) else ()
