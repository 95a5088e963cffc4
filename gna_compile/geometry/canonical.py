"""One form for all patterns that are equal, so that equal problems have equal encodings.

Empty segments and head groups are left out. What is joined: axes of a grid that hide nothing, neighboring segments that see and are seen alike,
neighboring head groups with the same windows. Parameters that change nothing take one value (the
stride of a full axis, the dilation of a window of one key). Which keys a query sees stays, and so
do the columns of the key mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from gna_compile.geometry.axis import Axis
from gna_compile.geometry.pattern import AttentionPattern, HeadGroup, Link, Window
from gna_compile.geometry.segments import GlobalTokens, GridTokens, Segment


def canonical(pattern: AttentionPattern) -> AttentionPattern:
    """The pattern's one form: same tokens, same pairs, same columns of the key mask.

    Args:
        pattern: any pattern.

    Returns:
        the form that it shares with every pattern that differs only in how it is written.
    """
    pattern = replace(pattern, partial=True)
    for step in (
        _without_empty_parts,
        _with_plain_windows,
        _without_idle_windows,
        _with_plain_grids,
        _with_joined_axes,
        _with_joined_queries,
        _with_joined_keys,
        _with_joined_heads,
    ):
        pattern = step(pattern)
    return replace(pattern, partial=pattern.missing_key is not None)


def of_heads(pattern: AttentionPattern, group: HeadGroup) -> AttentionPattern:
    """The pattern of one head group alone, as providers are asked for it."""
    own = pattern.of_group(group)
    return own if own.neighborhood is not None else canonical(own)


def _without_empty_parts(pattern: AttentionPattern) -> AttentionPattern:
    """A sequence keeps one segment, and a pattern one head group, even if it is empty."""
    rows = [n for n, segment in enumerate(pattern.queries) if segment.tokens] or [0]
    columns = [n for n, segment in enumerate(pattern.keys) if segment.tokens] or [0]
    groups = tuple(group for group in pattern.head_groups if group.heads)
    return replace(
        pattern,
        queries=tuple(pattern.queries[row] for row in rows),
        keys=tuple(pattern.keys[column] for column in columns),
        links=tuple(tuple(pattern.links[row][column] for column in columns) for row in rows),
        head_groups=groups or pattern.head_groups[:1],
    )


def _with_plain_windows(pattern: AttentionPattern) -> AttentionPattern:
    """Parameters that change nothing take one value."""

    def plain(axis: Axis) -> Axis:
        if axis.window == 1:
            axis = replace(axis, dilation=1, causal=False)
        if axis.window == axis.length:
            axis = replace(axis, stride=1)
        return axis

    def window(place: int, given: Window | None) -> Window | None:
        grid = pattern.queries[place]
        if given is None or not isinstance(grid, GridTokens):
            return given
        axes = [plain(axis) for axis in given.axes(grid.grid)]
        return None if all(axis.is_full for axis in axes) else Window.of_axes(axes)

    return replace(pattern, head_groups=_groups(pattern, window))


def _without_idle_windows(pattern: AttentionPattern) -> AttentionPattern:
    """A window link that no head group has a window for is full."""
    links = [list(row) for row in pattern.links]
    for index, place in enumerate(pattern.query_grids):
        if all(group.windows[index] is None for group in pattern.head_groups):
            links[place] = [Link.FULL if link is Link.WINDOW else link for link in links[place]]
    return replace(pattern, links=tuple(map(tuple, links)))


def _with_plain_grids(pattern: AttentionPattern) -> AttentionPattern:
    """A grid without a window is a row of tokens: of global ones for queries, of grid ones for keys."""
    rows = pattern.links
    queries: list[Segment] = list(pattern.queries)
    kept = []
    for index, place in enumerate(pattern.query_grids):
        if Link.WINDOW in rows[place]:
            kept.append(index)
        else:
            queries[place] = GlobalTokens(pattern.queries[place].tokens)
    keys = [
        GridTokens((segment.tokens,))
        if isinstance(segment, GridTokens) and all(row[place] is not Link.WINDOW for row in rows)
        else segment
        for place, segment in enumerate(pattern.keys)
    ]
    groups = tuple(
        replace(group, windows=tuple(group.windows[index] for index in kept))
        for group in pattern.head_groups
    )
    return replace(pattern, queries=tuple(queries), keys=tuple(keys), head_groups=groups)


def _with_joined_axes(pattern: AttentionPattern) -> AttentionPattern:
    """Neighboring axes that hide nothing are one axis, where all grids that are linked allow it."""
    for index, query in enumerate(pattern.query_grids):
        linked = [key for key, link in enumerate(pattern.links[query]) if link is Link.WINDOW]
        seers = [
            other
            for other, row in enumerate(pattern.links)
            if any(row[key] is Link.WINDOW for key in linked)
        ]
        if len(linked) != 1 or seers != [query]:
            continue
        (key,) = linked
        axis = 0
        while axis + 1 < _grid(pattern.queries[query]).rank:
            if _hides_nothing(pattern, index, query, key, axis):
                pattern = _joined_axis(pattern, index, query, key, axis)
            else:
                axis += 1
    return pattern


def _hides_nothing(pattern: AttentionPattern, index: int, query: int, key: int, axis: int) -> bool:
    """Whether an axis and the next one are whole, of equal lengths, and full for every head."""
    grid, other = _grid(pattern.queries[query]), _grid(pattern.keys[key])
    for number in (axis, axis + 1):
        if grid.grid[number] != other.grid[number]:
            return False
        if not (grid.is_whole(number) and other.is_whole(number)):
            return False
        for group in pattern.head_groups:
            window = group.windows[index]
            if window is not None and not window.axes(grid.grid)[number].is_full:
                return False
    return True


def _joined_axis(
    pattern: AttentionPattern, index: int, query: int, key: int, axis: int
) -> AttentionPattern:
    def joined(segment: Segment) -> GridTokens:
        grid = _grid(segment)
        lengths = _joined(grid.grid, axis)
        return GridTokens(
            lengths,
            _replaced(grid.start, axis, 0),
            _replaced(grid.stop, axis, lengths[axis]),
        )

    queries: list[Segment] = list(pattern.queries)
    keys: list[Segment] = list(pattern.keys)
    lengths = _grid(queries[query]).grid
    queries[query], keys[key] = joined(queries[query]), joined(keys[key])

    def window(place: int, given: Window | None) -> Window | None:
        if place != query or given is None:
            return given
        axes = list(given.axes(lengths))
        length = axes[axis].length * axes[axis + 1].length
        axes[axis : axis + 2] = [Axis(length, length)]
        return Window.of_axes(axes)

    return replace(
        pattern, queries=tuple(queries), keys=tuple(keys), head_groups=_groups(pattern, window)
    )


def _with_joined_queries(pattern: AttentionPattern) -> AttentionPattern:
    """Neighboring query segments off the windows that see the same are one."""
    queries: list[Segment] = []
    links: list[tuple[Link, ...]] = []
    for segment, row in zip(pattern.queries, pattern.links, strict=True):
        alike = queries and links[-1] == row and isinstance(segment, GlobalTokens)
        if alike and isinstance(queries[-1], GlobalTokens):
            queries[-1] = GlobalTokens(queries[-1].tokens + segment.tokens)
        else:
            queries.append(segment)
            links.append(row)
    return replace(pattern, queries=tuple(queries), links=tuple(links))


def _with_joined_keys(pattern: AttentionPattern) -> AttentionPattern:
    """Neighboring key segments off the windows that are seen by the same queries are one."""
    keys: list[Segment] = []
    columns: list[tuple[Link, ...]] = []
    for segment, column in zip(pattern.keys, zip(*pattern.links, strict=True), strict=True):
        alike = keys and columns[-1] == column and Link.WINDOW not in column
        if alike and type(keys[-1]) is type(segment):
            tokens = keys[-1].tokens + segment.tokens
            is_global = isinstance(segment, GlobalTokens)
            keys[-1] = GlobalTokens(tokens) if is_global else GridTokens((tokens,))
        else:
            keys.append(segment)
            columns.append(column)
    return replace(pattern, keys=tuple(keys), links=tuple(zip(*columns, strict=True)))


def _with_joined_heads(pattern: AttentionPattern) -> AttentionPattern:
    groups: list[HeadGroup] = []
    for group in pattern.head_groups:
        if groups and groups[-1].windows == group.windows:
            groups[-1] = replace(groups[-1], heads=groups[-1].heads + group.heads)
        else:
            groups.append(group)
    return replace(pattern, head_groups=tuple(groups))


def _groups(
    pattern: AttentionPattern, change: Callable[[int, Window | None], Window | None]
) -> tuple[HeadGroup, ...]:
    """The head groups with each window changed; `change` gets the window's query segment, too."""
    return tuple(
        replace(
            group,
            windows=tuple(
                change(place, window)
                for place, window in zip(pattern.query_grids, group.windows, strict=True)
            ),
        )
        for group in pattern.head_groups
    )


def _grid(segment: Segment) -> GridTokens:
    assert isinstance(segment, GridTokens)
    return segment


def _joined(lengths: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*lengths[:axis], math.prod(lengths[axis : axis + 2]), *lengths[axis + 2 :])


def _replaced(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 2 :])
