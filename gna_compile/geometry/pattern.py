"""Any attention pattern: two sequences of segments, links between them, and groups of heads.

Everything is per axis and everything is a box, as in `neighborhood.py`. A key is visible to a
query iff the link between their segments says so: all of them (`FULL`), none (`NONE`), or those
within the query's window (`WINDOW`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

from gna_compile.geometry.axis import Axis, GeometryError
from gna_compile.geometry.neighborhood import Neighborhood
from gna_compile.geometry.segments import (
    GlobalTokens,
    GridTokens,
    Segment,
    ranges_of,
    text_of,
    tokens_of,
)


class Link(IntEnum):
    """What the queries of one segment see of the keys of another."""

    NONE = 0
    FULL = 1
    WINDOW = 2


@dataclass(frozen=True)
class Window:
    """A window over a grid: one entry for each of its axes, with the meaning that `Axis` gives."""

    window: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        rank = len(self.window)
        object.__setattr__(self, "stride", self.stride or (1,) * rank)
        object.__setattr__(self, "dilation", self.dilation or (1,) * rank)
        object.__setattr__(self, "causal", self.causal or (False,) * rank)

    @classmethod
    def of_axes(cls, axes: Sequence[Axis]) -> Window:
        """The window that these axes have."""
        return cls(
            tuple(axis.window for axis in axes),
            tuple(axis.stride for axis in axes),
            tuple(axis.dilation for axis in axes),
            tuple(axis.causal for axis in axes),
        )

    def axes(self, grid: tuple[int, ...]) -> tuple[Axis, ...]:
        """The axes of a grid under this window.

        Raises:
            GeometryError: if an axis breaks a rule, or the ranks differ.
        """
        return Neighborhood.of(grid, self.window, self.stride, self.dilation, self.causal).axes


@dataclass(frozen=True)
class HeadGroup:
    """Consecutive heads that see the same.

    Args:
        heads: how many query heads, at least 0.
        windows: for each grid among the query segments, in their order, the window of its `WINDOW`
            links; None makes them full.
    """

    heads: int
    windows: tuple[Window | None, ...]


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys each query sees.

    Args:
        queries: the segments of the query sequence, in order; at least one.
        keys: the segments of the key sequence; usually the same.
        links: for each query segment, what it sees of each key segment. `WINDOW` is for two grids
            whose axes have equal lengths, or length 1 on one side, which makes that axis full; the
            window is that of the query's grid.
        head_groups: in the order of the heads, which they cover.
        partial: whether a query may see keys of its grid that are not at hand. The output is then
            one part of the result, to be merged with others by the logsumexp.

    Raises:
        GeometryError: if links or windows do not fit the segments, or, unless partial, a key is
            not at hand.

    Example, text, a video, and an image that the video is made from:
        >>> video, image = GridTokens((8, 24, 32)), GridTokens((1, 24, 32))
        >>> segments = (GlobalTokens(77), video, image)
        >>> window = Window((4, 12, 16), (2, 4, 8))
        >>> AttentionPattern(
        ...     segments, segments, default_links(segments), (HeadGroup(12, (window, None)),)
        ... ).query_tokens
        6989
    """

    queries: tuple[Segment, ...]
    keys: tuple[Segment, ...]
    links: tuple[tuple[Link, ...], ...]
    head_groups: tuple[HeadGroup, ...]
    partial: bool = False

    def __post_init__(self) -> None:
        if not self.queries or not self.keys:
            raise GeometryError("a sequence has at least one segment")
        shape = (len(self.queries), len(self.keys))
        if len(self.links) != shape[0] or any(len(row) != shape[1] for row in self.links):
            raise GeometryError(
                f"links must be one row of {shape[1]} key segments for each of {shape[0]} query "
                f"segments, not {self.links}"
            )
        if not self.head_groups:
            raise GeometryError("there must be at least one head group")
        for number, group in enumerate(self.head_groups):
            self._check_group(number, group)
        for query in range(shape[0]):
            for key in range(shape[1]):
                if self.links[query][key] is Link.WINDOW:
                    self._check_aligned(query, key)
        if not self.partial and self.missing_key is not None:
            raise GeometryError(
                f"{self.missing_key}, but is not among the keys at hand {text_of(self.keys)}: widen "
                "their box, or ask for a partial result"
            )

    @classmethod
    def of_neighborhood(cls, neighborhood: Neighborhood, heads: int) -> AttentionPattern:
        """The pattern of one grid with global tokens around it, the same for all heads."""
        window = Window.of_axes(neighborhood.axes)
        segments: tuple[Segment, ...] = (
            *_global(neighborhood.prefix),
            GridTokens(neighborhood.grid),
            *_global(neighborhood.suffix),
        )
        return cls(segments, segments, default_links(segments), (HeadGroup(heads, (window,)),))

    @property
    def heads(self) -> int:
        return sum(group.heads for group in self.head_groups)

    @cached_property
    def query_tokens(self) -> int:
        return tokens_of(self.queries)

    @cached_property
    def key_tokens(self) -> int:
        return tokens_of(self.keys)

    @property
    def global_keys(self) -> int:
        """The keys off any grid: the columns of a key mask, in their order."""
        return sum(segment.tokens for segment in self.keys if isinstance(segment, GlobalTokens))

    @cached_property
    def query_grids(self) -> tuple[int, ...]:
        """Which query segments are grids: a head group has a window for each of them."""
        places = enumerate(self.queries)
        return tuple(place for place, segment in places if isinstance(segment, GridTokens))

    def axes(self, group: HeadGroup, query: int, key: int) -> tuple[Axis | None, ...] | None:
        """What limits the keys of segment `key` for the queries of segment `query`.

        Returns:
            one `Axis` for each axis of the query's grid, None for an axis that hides nothing
            because one side has length 1; or None if all keys are visible or hidden by the link.
        """
        if self.links[query][key] is not Link.WINDOW:
            return None
        window = group.windows[self.query_grids.index(query)]
        if window is None:
            return None
        grid, other = self.queries[query], self.keys[key]
        assert isinstance(grid, GridTokens) and isinstance(other, GridTokens)
        axes = window.axes(grid.grid)
        return tuple(
            axis if axis.length == length else None
            for axis, length in zip(axes, other.grid, strict=True)
        )

    def sees(self, head: int, query: int, key: int) -> bool:
        """Whether a query sees a key; both by their places in their sequences."""
        group = self.group_of(head)
        of_query, query = _find(self.queries, query)
        of_key, key = _find(self.keys, key)
        link = self.links[of_query][of_key]
        axes = self.axes(group, of_query, of_key)
        if axes is None:
            return link is not Link.NONE
        grid, other = self.queries[of_query], self.keys[of_key]
        assert isinstance(grid, GridTokens) and isinstance(other, GridTokens)
        places = zip(axes, grid.place(query), other.place(key), strict=True)
        return all(axis is None or axis.sees(at, there) for axis, at, there in places)

    def group_of(self, head: int) -> HeadGroup:
        """The group of a head."""
        for group in self.head_groups:
            if head < group.heads:
                return group
            head -= group.heads
        raise IndexError("there is no such head")

    def of_group(self, group: HeadGroup) -> AttentionPattern:
        """The pattern of one group's heads."""
        return replace(self, head_groups=(group,))

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all heads, no key mask."""
        return sum(group.heads * self._pairs(group) for group in self.head_groups)

    @property
    def flop_share(self) -> float:
        """Share of dense attention's FLOPs that the pattern needs; its inverse is the FLOP bound."""
        return self.pairs / (self.heads * self.query_tokens * self.key_tokens)

    @cached_property
    def neighborhood(self) -> Neighborhood | None:
        """The same as one grid with global tokens around it, all heads alike; None if it is not.

        A grid whose links are all full counts as global tokens, but has no columns in a key mask.
        """
        if len(self.head_groups) != 1 or self.partial or self.query_tokens != self.key_tokens:
            return None
        (group,) = self.head_groups
        windowed = []
        for query, row in enumerate(self.links):
            for key, link in enumerate(row):
                if self.axes(group, query, key) is not None:
                    windowed.append((query, key))
                elif link is Link.NONE:
                    return None
        if not windowed:
            return self._full_neighborhood
        if len(windowed) > 1:
            return None
        ((query, key),) = windowed
        grid, other = self.queries[query], self.keys[key]
        prefix = tokens_of(self.keys[:key])
        assert isinstance(grid, GridTokens) and isinstance(other, GridTokens)
        if not (grid == other and grid.is_whole() and tokens_of(self.queries[:query]) == prefix):
            return None
        window = group.windows[self.query_grids.index(query)]
        assert window is not None
        return Neighborhood(window.axes(grid.grid), prefix, tokens_of(self.keys[key + 1 :]))

    @property
    def _full_neighborhood(self) -> Neighborhood:
        """Of a pattern that hides nothing; its one grid stays one, so that key masks keep columns."""
        places = [n for n, segment in enumerate(self.keys) if isinstance(segment, GridTokens)]
        if len(places) != 1:
            return Neighborhood((Axis(self.key_tokens, self.key_tokens),))
        (place,) = places
        grid = self.keys[place]
        assert isinstance(grid, GridTokens)
        axes = tuple(Axis(n, n) for n in grid.shape)
        return Neighborhood(axes, tokens_of(self.keys[:place]), tokens_of(self.keys[place + 1 :]))

    def __str__(self) -> str:
        queries, keys = text_of(self.queries), text_of(self.keys)
        return queries if queries == keys else f"{queries} of {keys}"

    def _pairs(self, group: HeadGroup) -> int:
        total = 0
        for query, grid in enumerate(self.queries):
            for key, other in enumerate(self.keys):
                axes = self.axes(group, query, key)
                if axes is None:
                    seen = self.links[query][key] is not Link.NONE
                    total += seen * grid.tokens * other.tokens
                    continue
                assert isinstance(grid, GridTokens) and isinstance(other, GridTokens)
                total += math.prod(map(_axis_pairs, axes, grid.box, other.box))
        return total

    def _check_group(self, number: int, group: HeadGroup) -> None:
        if group.heads < 0:
            raise GeometryError(f"head group {number} has {group.heads} heads; at least 0")
        if len(group.windows) != len(self.query_grids):
            raise GeometryError(
                f"head group {number} has {len(group.windows)} windows for "
                f"{len(self.query_grids)} grids among the queries {text_of(self.queries)}"
            )
        for place, window in zip(self.query_grids, group.windows, strict=True):
            grid = self.queries[place]
            assert isinstance(grid, GridTokens)
            if window is not None:
                try:
                    window.axes(grid.grid)
                except GeometryError as error:
                    raise GeometryError(f"head group {number}: {error}") from None

    def _check_aligned(self, query: int, key: int) -> None:
        grid, other = self.queries[query], self.keys[key]
        if not isinstance(grid, GridTokens) or not isinstance(other, GridTokens):
            raise GeometryError(
                f"query segment {query} ({grid}) is linked to key segment {key} ({other}) by a "
                "window, which takes two grids: link them by `full`"
            )
        lengths = list(zip(grid.grid, other.grid, strict=False))
        if grid.rank != other.rank or any(a != b and 1 not in (a, b) for a, b in lengths):
            raise GeometryError(
                f"the grids {grid} and {other} cannot be aligned: each axis must have equal lengths, "
                "or length 1 in one of them; link them by `full`"
            )

    @cached_property
    def missing_key(self) -> str | None:
        """A key that a query sees and that is not at hand, in words; None if all are at hand."""
        for group in self.head_groups:
            for query, grid in enumerate(self.queries):
                for key, other in enumerate(self.keys):
                    link = self.links[query][key]
                    if link is Link.NONE or isinstance(other, GlobalTokens) or other.is_whole():
                        continue
                    axes = self.axes(group, query, key)
                    if axes is None:
                        return f"all keys of grid {other.grid} are seen by segment {query} ({grid})"
                    assert isinstance(grid, GridTokens)
                    for number, axis in enumerate(axes):
                        box, at_hand = grid.box[number], other.box[number]
                        missing = _missing(axis, box, at_hand, other.grid[number])
                        if missing is not None:
                            return f"key {missing} of axis {number} is seen by segment {query} ({grid})"
        return None


def default_links(
    segments: Sequence[Segment],
    documents: Sequence[int] | None = None,
    between_grids: Link = Link.FULL,
) -> tuple[tuple[Link, ...], ...]:
    """The links of a sequence with itself.

    Args:
        segments: of the sequence.
        documents: which document of a packed batch each segment belongs to; one if None. Segments
            of different documents do not see each other.
        between_grids: what two grids of one document see of each other.

    Returns:
        a window from each grid to itself, `between_grids` from a grid to another, and all else full.
    """

    are_grids = [isinstance(segment, GridTokens) for segment in segments]
    return links_between(are_grids, documents, between_grids)


def links_between(
    are_grids: Sequence[bool],
    documents: Sequence[int] | None = None,
    between_grids: Link = Link.FULL,
) -> tuple[tuple[Link, ...], ...]:
    """As `default_links`, of segments of which it is known whether each is a grid."""

    def link(query: int, key: int) -> Link:
        if documents is not None and documents[query] != documents[key]:
            return Link.NONE
        if not (are_grids[query] and are_grids[key]):
            return Link.FULL
        return Link.WINDOW if query == key else between_grids

    count = range(len(are_grids))
    return tuple(tuple(link(query, key) for key in count) for query in count)


def _global(tokens: int) -> tuple[GlobalTokens, ...]:
    return (GlobalTokens(tokens),) if tokens else ()


def _find(segments: Sequence[Segment], token: int) -> tuple[int, int]:
    """The segment of a token of a sequence, and the token's place in it."""
    for place, tokens in enumerate(ranges_of(segments)):
        if token in tokens:
            return place, token - tokens.start
    raise IndexError("there is no such token")


def _axis_pairs(axis: Axis | None, queries: range, keys: range) -> int:
    if axis is None:
        return len(queries) * len(keys)
    if len(queries) == len(keys) == axis.length:
        return axis.pairs
    return sum(len(_within(axis.keys(query), keys)) for query in queries)


def _within(seen: range, keys: range) -> range:
    """The part of an increasing range that lies within a range of step 1."""
    skipped = max(-(-(keys.start - seen.start) // seen.step), 0)
    start = seen.start + skipped * seen.step
    return range(start, max(min(seen.stop, keys.stop), start), seen.step)


def _missing(axis: Axis | None, queries: range, keys: range, length: int) -> int | None:
    """A key that a query of the box sees and that is not at hand."""
    if axis is None:
        return None if len(keys) == length else (0 if keys.start else keys.stop)
    if len(keys) == length:
        return None
    for query in queries:
        seen = axis.keys(query)
        for key in (seen[0], seen[-1]):
            if key not in keys:
                return key
    return None
