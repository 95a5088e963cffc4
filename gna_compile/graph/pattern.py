"""The pattern of a site: its token layout under the windows that rules give its heads.

layout     512 + 64x64 + 64x64
windows    heads 0-7: 16x16 on both grids; heads 8-23: full
pattern    which keys each query sees, in numbers for choices, in nodes for the graph
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Window,
    default_links,
    write_layout,
)
from gna_compile.graph.symbols import Size, hint, holds
from gna_compile.graph.tokens.layouts import Layout
from gna_compile.policy import Parameters


class HeadWindows(NamedTuple):
    """Consecutive heads, and for each grid of the layout their window; None where it is full."""

    heads: Size
    windows: tuple[Parameters | None, ...]


@dataclass(frozen=True)
class Windows:
    """What a site is rewritten to, on a layout that is known apart.

    Attributes:
        groups: in the order of the heads, which they cover.
        between_grids: what two grids see of each other.
    """

    groups: tuple[HeadWindows, ...]
    between_grids: Link = Link.FULL

    @property
    def heads(self) -> Size:
        total: Size = 0
        for group in self.groups:
            total = total + group.heads
        return total


def pattern_of(layout: Layout, windows: Windows) -> AttentionPattern:
    """The pattern at the sizes of the example.

    Raises:
        GeometryError: if windows or links do not fit the grids.
    """
    segments = tuple(
        GridTokens(tuple(map(hint, segment)))
        if isinstance(segment, tuple)
        else GlobalTokens(hint(segment))
        for segment in layout.segments
    )
    groups = tuple(
        HeadGroup(hint(group.heads), tuple(map(_window, group.windows))) for group in windows.groups
    )
    links = default_links(segments, between_grids=windows.between_grids)
    return AttentionPattern(segments, segments, links, groups)


def _window(parameters: Parameters | None) -> Window | None:
    if parameters is None:
        return None
    window, stride, dilation = (tuple(map(hint, sizes)) for sizes in parameters[:3])
    return Window(window, stride, dilation, tuple(parameters.causal))


def entries_of(
    layout: Layout, windows: Windows, heads: Any, node_for: Callable[[Any], Any]
) -> list[Any]:
    """The pattern as the op's argument.

    Args:
        heads: of the only group; several have numbers of their own.
        node_for: what stands for a size in the graph.
    """

    def nodes(sizes: Any) -> tuple[Any, ...]:
        return tuple(map(node_for, sizes))

    def window(parameters: Parameters | None) -> tuple[Any, ...] | None:
        if parameters is None:
            return None
        return (*map(nodes, parameters[:3]), parameters.causal)

    segments = [
        nodes(segment) if isinstance(segment, tuple) else node_for(segment)
        for segment in layout.segments
    ]
    groups = [
        (
            heads if len(windows.groups) == 1 else node_for(group.heads),
            [*map(window, group.windows)],
        )
        for group in windows.groups
    ]
    return write_layout(segments, groups, windows.between_grids)


def visible_pairs(layout: Layout, windows: Windows) -> Size:
    """Visible (query, key) pairs of all heads together; symbolic where sizes are.

    Of symbolic sizes causality is not counted, so that there are no more than this.
    """
    sizes = [size for segment in layout.segments for size in _sizes(segment)]
    sizes += [size for group in windows.groups for size in (group.heads, *_entries(group))]
    if all(isinstance(size, int) for size in sizes):
        return pattern_of(layout, windows).pairs
    total: Size = 0
    for group in windows.groups:
        total = total + group.heads * _pairs_of(layout, group, windows.between_grids)
    return total


def _pairs_of(layout: Layout, group: HeadWindows, between: Link) -> Size:
    pairs = layout.tokens * layout.tokens
    for i, (grid, window) in enumerate(zip(layout.grids, group.windows, strict=True)):
        queries = math.prod(grid)
        for j, other in enumerate(layout.grids):
            keys = math.prod(other)
            if i != j and between is Link.NONE:
                pairs = pairs - queries * keys
            elif window is not None and (i == j or between is Link.WINDOW):
                seen = (
                    w if holds(a == b) else b
                    for w, a, b in zip(window.window, grid, other, strict=True)
                )
                pairs = pairs - queries * (keys - math.prod(seen))
    return pairs


def _sizes(segment: Size | tuple[Size, ...]) -> tuple[Size, ...]:
    return segment if isinstance(segment, tuple) else (segment,)


def _entries(group: HeadWindows) -> list[Size]:
    known = [window for window in group.windows if window is not None]
    return [size for window in known for size in (*window.window, *window.stride)]
