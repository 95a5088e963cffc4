"""Into which boxes of 128 tokens grids are cut: those whose tiles cost the least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product

from gna_compile.geometry import AttentionPattern, Axis, GridTokens
from gna_compile.geometry.segments import tokens_of
from gna_compile.planner.search import boxes
from gna_compile.providers.flex.cuts import AxisCut, reach
from gna_compile.providers.flex.sights import Sights

TILE = 128

_MASK = 1.0  # what a mask adds to the cost of a tile: a guess

Cuts = tuple[AxisCut, ...]


def cuts_of(
    pattern: AttentionPattern, sights: Sights, pairs: Iterable[tuple[int, int]]
) -> tuple[Cuts, Cuts]:
    """The cuts of queries and keys that suit the one of `pairs` that matters most.

    Args:
        pattern: of one head group.
        sights: what its query segments see of its key segments.
        pairs: query segments and key segments that a window links. A grid and itself go before
            others, then many tokens before few.
    """

    def weight(pair: tuple[int, int]) -> tuple[bool, int]:
        queries, keys = pattern.queries[pair[0]], pattern.keys[pair[1]]
        return queries == keys, queries.tokens * keys.tokens

    query, key = max(pairs, key=weight)
    queries, keys, axes = pattern.queries[query], pattern.keys[key], sights[query][key]
    window = pattern.head_groups[0].windows[pattern.query_grids.index(query)]
    assert isinstance(queries, GridTokens) and isinstance(keys, GridTokens)
    assert window is not None and axes
    seen = (other for other, sight in zip(pattern.keys, sights[query], strict=True) if sight == ())
    seers = (other for other, row in zip(pattern.queries, sights, strict=True) if row[key] == ())
    return _choose(
        queries, keys, window.axes(queries.grid), axes, tokens_of([*seen]), tokens_of([*seers])
    )


@lru_cache(maxsize=1024)
def _choose(
    queries: GridTokens,
    keys: GridTokens,
    window: tuple[Axis, ...],
    axes: tuple[Axis | None, ...],
    other_keys: int,
    other_queries: int,
) -> tuple[Cuts, Cuts]:
    """One cut for both if they are the same grid.

    Args:
        queries: their grid.
        keys: their grid.
        window: of the queries' grid.
        axes: those of its axes that hide keys, None for others.
        other_keys: how many more keys all of these queries see.
        other_queries: how many more queries see all of these keys.
    """

    def query_cuts(box: Sequence[int]) -> Cuts:
        dilations = [1 if axis.is_full else axis.dilation for axis in window]
        return tuple(map(AxisCut, queries.grid, queries.box, dilations, box))

    def key_cuts(box: Sequence[int]) -> Cuts:
        dilations = [1 if axis is None else axis.dilation for axis in axes]
        return tuple(map(AxisCut, keys.grid, keys.box, dilations, box))

    cuts_of_queries = [query_cuts(box) for box in boxes(TILE, queries.rank)]
    cuts_of_keys = [key_cuts(box) for box in boxes(TILE, keys.rank)]
    both = zip(cuts_of_queries, cuts_of_keys, strict=True)
    candidates = both if queries == keys else product(cuts_of_queries, cuts_of_keys)
    other_key_tiles, other_query_tiles = -(-other_keys // TILE), -(-other_queries // TILE)

    def cost(cuts: tuple[Cuts, Cuts]) -> float:
        counts = [_counts(*parts) for parts in zip(axes, *cuts, strict=True)]
        visited, full = (math.prod(values) for values in zip(*counts, strict=True))
        query_tiles, key_tiles = (math.prod(cut.runs for cut in side) for side in cuts)
        others = query_tiles * other_key_tiles + key_tiles * other_query_tiles
        return visited + _MASK * (visited - full) + others

    return min(candidates, key=cost)


@lru_cache(maxsize=8192)
def _counts(axis: Axis | None, queries: AxisCut, keys: AxisCut) -> tuple[int, int]:
    return reach(axis, queries, keys).counts
