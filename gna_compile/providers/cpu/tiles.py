"""Which boxes of tokens the CPU kernel works on: the choice that costs the fewest operations.

A tile keeps a box of 16, 32 or 64 tokens in the lanes of vectors and streams past them the tokens
that any of them sees (or, for the gradients of keys, that see any of them). The fewer lanes, the
fewer streamed tokens that only some lanes need, but the lower the rate of the matrix products.
Segments that no window limits have no boxes: tokens that see the same fill tiles of 64 lanes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from gna_compile.geometry import AttentionPattern, GlobalTokens, Link, Segment, canonical
from gna_compile.providers.cpu.native_pattern import Box, Boxes, links_of, native_pattern

_PAIR_COST = {4: 1.35, 5: 1.11, 6: 1.0}
"""By log2 of a tile's lanes: cost of a (lane, streamed token) pair, relative to 64 lanes (measured)."""

_TILE = 30.0  # reading a lane and writing it back, in streamed tokens


def choose_boxes(pattern: AttentionPattern) -> Boxes:
    """The cheapest boxes for a canonical pattern of one head group."""
    return Boxes(_Side(pattern).boxes(), _Side(pattern, of_keys=True).boxes())


def pairs(pattern: AttentionPattern) -> int:
    """(query, key) pairs that the forward computes, lanes without a token included."""
    return sum(tiles.pairs for tiles in _forward(pattern))


@lru_cache(maxsize=256)
def predicted_speedup(pattern: AttentionPattern) -> float:
    """Of the forward over PyTorch's dense attention on a CPU, whose pairs cost as 64 lanes' do."""
    dense = pattern.query_tokens * pattern.key_tokens
    return dense / sum(tiles.cost for tiles in _forward(pattern))


def candidates(rank: int) -> Iterator[Box]:
    """The boxes that the kernel can take on a grid of this rank."""
    for box in itertools.product(range(7), repeat=rank):
        if sum(box) in _PAIR_COST:
            yield box


@dataclass(frozen=True)
class _Tiles:
    """Tiles of equal lanes, and the tokens that all of them together stream."""

    log2_lanes: int
    count: int
    streamed: int

    @property
    def pairs(self) -> int:
        return 2**self.log2_lanes * self.streamed

    @property
    def cost(self) -> float:
        """In (lane, streamed token) pairs at the rate of 64 lanes."""
        lanes = 2**self.log2_lanes * _PAIR_COST[self.log2_lanes]
        return lanes * (self.streamed + _TILE * self.count)


def _forward(pattern: AttentionPattern) -> list[_Tiles]:
    side = _Side(canonical(pattern))
    return side.tiles(side.boxes())


class _Side:
    """A canonical pattern from one side: its queries in lanes, or its keys."""

    def __init__(self, pattern: AttentionPattern, of_keys: bool = False) -> None:
        links, sides = links_of(pattern), (pattern.queries, pattern.keys)
        self._of_keys = of_keys
        self._links = tuple(zip(*links, strict=True)) if of_keys else links
        self._lanes, self._streamed = reversed(sides) if of_keys else sides
        self._streamed_along = cache(self._uncached_streamed_along)
        self._native = native_pattern(pattern)

    def boxes(self) -> tuple[Box, ...]:
        """The cheapest for each segment."""
        return tuple(map(self._cheapest, range(len(self._lanes))))

    def tiles(self, boxes: tuple[Box, ...]) -> list[_Tiles]:
        """All tiles, those of equal lanes together."""
        made = [self._grid_tiles(place, box) for place, box in enumerate(boxes) if box]
        alike: dict[tuple[Link, ...], int] = {}
        for segment, links, box in zip(self._lanes, self._links, boxes, strict=True):
            if not box:
                alike[links] = alike.get(links, 0) + segment.tokens
        for links, tokens in alike.items():
            whole, rest = divmod(tokens, 64)
            linked = _linked(self._streamed, links)
            made.append(_Tiles(6, whole, whole * linked))
            if rest:
                made.append(_Tiles(max((rest - 1).bit_length(), 4), 1, linked))
        return made

    def _cheapest(self, place: int) -> Box:
        segment = self._lanes[place]
        if isinstance(segment, GlobalTokens) or Link.WINDOW not in self._links[place]:
            return ()
        return min(candidates(segment.rank), key=lambda box: self._grid_tiles(place, box).cost)

    def _grid_tiles(self, place: int, box: Box) -> _Tiles:
        along = [self._streamed_along(place, *extent) for extent in enumerate(box)]
        count = math.prod(boxes for boxes, _ in along)
        windows = sum(map(math.prod, zip(*(streamed for _, streamed in along), strict=True)))
        linked = _linked(self._streamed, self._links[place])
        return _Tiles(sum(box), count, windows + count * linked)

    def _uncached_streamed_along(
        self, place: int, axis: int, log2_box: int
    ) -> tuple[int, list[int]]:
        return self._native.streamed(self._of_keys, place, axis, log2_box)


def _linked(segments: tuple[Segment, ...], links: tuple[Link, ...]) -> int:
    """Tokens that are streamed past every lane."""
    return sum(
        segment.tokens for segment, link in zip(segments, links, strict=True) if link is Link.FULL
    )
