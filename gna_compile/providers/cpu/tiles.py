"""Which boxes of tokens the CPU kernel works on: the choice that costs the fewest operations.

A tile keeps a box of 16, 32 or 64 tokens in the lanes of vectors and streams past them the tokens
that any of them sees (or, for the gradients of keys, that see any of them). The fewer lanes, the
fewer streamed tokens that only some lanes need, but the lower the rate of the matrix products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gna_compile import _native
from gna_compile.geometry import Axis, Neighborhood

_PAIR_COST = {4: 1.35, 5: 1.11, 6: 1.0}
"""By log2 of a tile's lanes: cost of a (lane, streamed token) pair, relative to 64 lanes (measured)."""

_TILE = 30.0  # reading a lane and writing it back, in streamed tokens


@dataclass(frozen=True)
class Boxes:
    """The boxes of both passes, as log2 of their extents, one per axis.

    Args:
        queries: of the forward and of the queries' gradient.
        keys: of the keys' and values' gradients.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]


@lru_cache(maxsize=256)
def choose_boxes(neighborhood: Neighborhood) -> Boxes:
    """The cheapest boxes for a neighborhood."""
    return Boxes(_cheapest(neighborhood, of_keys=False), _cheapest(neighborhood, of_keys=True))


def pairs(neighborhood: Neighborhood, boxes: Boxes) -> int:
    """(query, key) pairs that the forward computes, lanes without a token included."""
    grid = 2 ** sum(boxes.queries) * _streamed(neighborhood, boxes.queries, of_keys=False)
    lanes = -(-neighborhood.global_tokens // 16) * 16
    return grid + lanes * neighborhood.tokens


@lru_cache(maxsize=256)
def predicted_speedup(neighborhood: Neighborhood) -> float:
    """Of the forward over PyTorch's dense attention on a CPU, whose pairs cost as 64 lanes' do."""
    neighborhood = neighborhood.merged
    boxes = choose_boxes(neighborhood).queries
    lanes = -(-neighborhood.global_tokens // 16) * 16
    of_globals = lanes * _PAIR_COST[4] * neighborhood.tokens
    return neighborhood.tokens**2 / (_cost(neighborhood, boxes, of_keys=False) + of_globals)


def arguments(axis: Axis) -> tuple[int, int, int, int, bool]:
    """An axis as the native code takes it."""
    return (axis.length, axis.window, axis.stride, axis.dilation, axis.causal)


def _cheapest(neighborhood: Neighborhood, of_keys: bool) -> tuple[int, ...]:
    return min(
        _candidates(len(neighborhood.axes)), key=lambda boxes: _cost(neighborhood, boxes, of_keys)
    )


def _cost(neighborhood: Neighborhood, boxes: tuple[int, ...], of_keys: bool) -> float:
    """Cost of all grid tiles, in (lane, streamed token) pairs at the rate of 64 lanes."""
    log2_lanes = sum(boxes)
    streamed = _streamed(neighborhood, boxes, of_keys)
    overhead = _TILE * _tiles(neighborhood, boxes)
    return 2**log2_lanes * _PAIR_COST[log2_lanes] * (streamed + overhead)


def _candidates(rank: int) -> Iterator[tuple[int, ...]]:
    for boxes in itertools.product(range(7), repeat=rank):
        if sum(boxes) in _PAIR_COST:
            yield boxes


def _streamed(neighborhood: Neighborhood, boxes: tuple[int, ...], of_keys: bool) -> int:
    """Streamed tokens of all grid tiles."""
    grid = math.prod(
        _streamed_along(axis, log2_box, of_keys)
        for axis, log2_box in zip(neighborhood.axes, boxes, strict=True)
    )
    return grid + neighborhood.global_tokens * _tiles(neighborhood, boxes)


@lru_cache(maxsize=4096)
def _streamed_along(axis: Axis, log2_box: int, of_keys: bool) -> int:
    return _native.streamed(arguments(axis), log2_box, of_keys)


def _tiles(neighborhood: Neighborhood, boxes: tuple[int, ...]) -> int:
    def along(axis: Axis, log2_box: int) -> int:
        longer = axis.length % axis.dilation
        shorter = axis.dilation - longer
        length, extent = axis.length // axis.dilation, 2**log2_box
        return shorter * -(-length // extent) + longer * -(-(length + 1) // extent)

    return math.prod(map(along, neighborhood.axes, boxes))
