"""How the kernel runs an attention pattern: one launch for each grid that has a window.

A launch takes all tokens off its grid as global ones. To the queries of its grid, as keys, they are:
every link is full but that of a grid to itself. So each launch writes the rows of its own grid, and
the first one those of the tokens off all of these grids, too.

Launches run in this order. The first may also write rows of grids that lie between such tokens, as if
they were global; the grid's own launch follows and overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gna_compile.geometry import (
    AttentionPattern,
    Axis,
    GlobalTokens,
    GridTokens,
    Link,
    Neighborhood,
)
from gna_compile.geometry.segments import ranges_of

NO_LAUNCHES = (
    "takes grids with a window to themselves, all else linked in full, and queries that are the "
    "keys' tokens"
)
"""Why the kernel declines a pattern without launches."""


class Launch(NamedTuple):
    """One launch of the kernel.

    Attributes:
        neighborhood: a grid, and all other tokens of the sequence as global ones around it.
        global_queries: which rows of these global tokens are needed, counted over prefix, then
            suffix; it may write others beside them.
    """

    neighborhood: Neighborhood
    global_queries: range


def launches_of(pattern: AttentionPattern) -> tuple[Launch, ...] | None:
    """The launches for a pattern of one head group, in their order; None if launches cannot do it."""
    tokens = pattern.key_tokens
    if len(pattern.head_groups) != 1 or pattern.partial or pattern.query_tokens != tokens:
        return None
    grids = _windowed_grids(pattern)
    if grids is None:
        return None
    if not grids:
        whole = pattern.neighborhood
        return None if whole is None else (Launch(whole, range(whole.global_tokens)),)
    rows = [_rows_off(grids, grid, tokens) for grid in grids]
    first = min(range(len(grids)), key=lambda index: len(rows[index]))
    launches = [Launch(grid.among(tokens), range(0)) for grid in grids]
    launches.insert(0, launches.pop(first)._replace(global_queries=rows[first]))
    return tuple(launches)


def key_masks(
    pattern: AttentionPattern, launches: Sequence[Launch], key_mask: Tensor | None
) -> Sequence[Tensor | None]:
    """For each launch, which of its global keys are shown; None where all are.

    Args:
        pattern: of the launches.
        launches: of the pattern.
        key_mask: bool [batch, global keys of the pattern], as the op takes it.
    """
    if key_mask is None or not key_mask.numel():
        return [None] * len(launches)
    if launches[0].neighborhood.global_tokens == pattern.global_keys:
        return [key_mask]
    shown = key_mask.new_ones((key_mask.shape[0], pattern.key_tokens))
    column = 0
    for segment, tokens in zip(pattern.keys, ranges_of(pattern.keys), strict=True):
        if isinstance(segment, GlobalTokens):
            columns = key_mask[:, column : column + segment.tokens]
            shown[:, tokens.start : tokens.stop] = columns
            column += segment.tokens
    return [
        torch.cat([shown[:, : around.prefix], shown[:, around.tokens - around.suffix :]], 1)
        for around, _ in launches
    ]


class _Grid(NamedTuple):
    """A grid with a window.

    Attributes:
        tokens: where it lies in the sequence, of queries and of keys.
        axes: of its window.
    """

    tokens: range
    axes: tuple[Axis, ...]

    def among(self, tokens: int) -> Neighborhood:
        """The grid with all other tokens of the sequence, which has so many, around it."""
        return Neighborhood(self.axes, self.tokens.start, tokens - self.tokens.stop)

    def place(self, token: int) -> int:
        """The place of a token among all that are off this grid."""
        return token if token < self.tokens.start else token - len(self.tokens)


def _windowed_grids(pattern: AttentionPattern) -> list[_Grid] | None:
    """The grids with a window, in the sequence's order; None if a link is of another kind."""
    (group,) = pattern.head_groups
    grids = []
    for query, here in enumerate(ranges_of(pattern.queries)):
        for key, there in enumerate(ranges_of(pattern.keys)):
            if pattern.links[query][key] is Link.NONE:
                return None
            if pattern.axes(group, query, key) is None:
                continue
            grid, other = pattern.queries[query], pattern.keys[key]
            window = group.windows[pattern.query_grids.index(query)]
            assert isinstance(grid, GridTokens) and window is not None
            if here != there or grid != other or not grid.is_whole():
                return None
            grids.append(_Grid(here, window.axes(grid.grid)))
    return grids


def _rows_off(grids: Sequence[_Grid], grid: _Grid, tokens: int) -> range:
    """From the first to the last token off all grids, as the launch of one of them counts."""
    edges = [0, *(edge for each in grids for edge in (each.tokens.start, each.tokens.stop)), tokens]
    runs = [range(*run) for run in zip(edges[::2], edges[1::2], strict=True) if run[0] < run[1]]
    if not runs:
        return range(0)
    return range(grid.place(runs[0][0]), grid.place(runs[-1][-1]) + 1)
