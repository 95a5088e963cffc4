"""One axis of a box of tokens, cut into runs of slots, and which runs a window links."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from gna_compile.geometry import Axis


@dataclass(frozen=True)
class AxisCut:
    """One axis cut into runs of `extent` slots, each dilation group on its own.

    Args:
        length: of the whole grid's axis.
        box: the tokens at hand, in the whole axis's coordinates.
        dilation: how many groups the axis falls into.
        extent: slots of a run.
    """

    length: int
    box: range
    dilation: int
    extent: int

    @cached_property
    def coordinates(self) -> Tensor:
        """The token in each slot, int64 [runs, extent]; -1 where a slot is empty."""
        runs = []
        for group in range(self.dilation):
            first = self.box.start + (group - self.box.start) % self.dilation
            tokens = torch.arange(first, max(self.box.stop, first), self.dilation)
            empty = -len(tokens) % self.extent
            runs.append(torch.nn.functional.pad(tokens, (0, empty), value=-1))
        return torch.cat(runs).view(-1, self.extent)

    @property
    def runs(self) -> int:
        return len(self.coordinates)

    @cached_property
    def whole(self) -> Tensor:
        """Whether a run has no empty slot, bool [runs]."""
        return self.coordinates[:, -1] >= 0

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last token of each run, int64 [runs]."""
        tokens = (self.coordinates >= 0).sum(dim=1, keepdim=True)
        return self.coordinates[:, 0], self.coordinates.gather(1, tokens - 1)[:, 0]

    def positions(self, dilation: int) -> Tensor:
        """Where the tokens lie if an axis's dilation groups are put one after another."""
        return _positions(self.coordinates, self.length, dilation)


def _positions(tokens: Tensor, length: int, dilation: int) -> Tensor:
    """So that a window is a range of positions, whatever its dilation."""
    group = tokens % dilation
    before = group * (length // dilation) + group.clamp(max=length % dilation)
    return before + tokens // dilation


@lru_cache(maxsize=256)
def windows(axis: Axis) -> Tensor:
    """First and stop of each token's keys, as positions, int64 [2, length]."""
    tokens = torch.arange(axis.length)
    table = torch.empty(2, axis.length, dtype=torch.int64)
    known: dict[int, Tensor] = {}
    before = 0
    for offset in range(axis.dilation):
        group = axis.group(offset)
        if group.length not in known:
            unions = [group.union(range(query, query + 1)) for query in range(group.length)]
            known[group.length] = torch.tensor([(keys.start, keys.stop) for keys in unions]).T
        table[:, tokens[offset :: axis.dilation]] = known[group.length] + before
        before += group.length
    return table


@dataclass(frozen=True)
class Reach:
    """Which runs of keys each run of queries visits along one axis; a full run needs no mask.

    Attributes:
        first, stop: int64 [query runs], the key runs that a query run visits.
        full_first, full_stop: int64 [query runs]; those of them that are whole are full.
        whole: bool [key runs].
    """

    first: Tensor
    stop: Tensor
    full_first: Tensor
    full_stop: Tensor
    whole: Tensor

    @property
    def counts(self) -> tuple[int, int]:
        """How many pairs of runs are visited, and how many of them are full."""
        whole = torch.nn.functional.pad(self.whole.cumsum(0), (1, 0))
        full = whole[self.full_stop] - whole[self.full_first]
        return int((self.stop - self.first).sum()), int(full.sum())

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The visited pairs: query run, key run, whether it is full; each [visited]."""
        counts = self.stop - self.first
        queries = torch.arange(len(counts)).repeat_interleave(counts)
        keys = torch.arange(len(queries)) - (counts.cumsum(0) - counts - self.first)[queries]
        inside = (keys >= self.full_first[queries]) & (keys < self.full_stop[queries])
        return queries, keys, inside & self.whole[keys]


@lru_cache(maxsize=1024)
def reach(axis: Axis | None, queries: AxisCut, keys: AxisCut) -> Reach:
    """What runs of queries visit along an axis that hides keys, or nothing if None.

    Args:
        axis: of the window; its dilation is that of `queries`.
        queries: the queries' axis.
        keys: the keys' axis, of the same length if `axis` hides keys. Where it is cut by another
            dilation, all is visited and nothing is full.
    """
    none = torch.zeros(queries.runs, dtype=torch.int64)
    every = torch.full_like(none, keys.runs)
    if axis is None:
        return Reach(none, every, none, every, keys.whole)
    if keys.dilation != axis.dilation:
        return Reach(none, every, none, none, keys.whole)
    first, stop = windows(axis)
    head, tail = queries.ends
    low, high = (_positions(tokens, keys.length, axis.dilation) for tokens in keys.ends)
    visited = torch.searchsorted(high, first[head])
    full = torch.searchsorted(low, first[tail])
    return Reach(
        visited,
        torch.searchsorted(low, stop[tail]).maximum(visited),
        full,
        torch.searchsorted(high, stop[head]).maximum(full),
        keys.whole,
    )
