"""What reacts to a change of an input, and what that says of a claimed layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gna_compile.verify.probe import OPERANDS, Call, Claim
from gna_compile.verify.ways import Dimensions, Region

_MOVED, _LARGE = 0.1, 0.5
"""Shares of the largest reaction: a row reacts at all, or as the one that was changed does."""
_FAINT = 0.02
"""And where something reaches it from far, such as a normalization of all."""
ALONG_IT = ("spatial", "cut", "blurred")
"""Kinds of dimensions that tokens lie along; in the last, every token feels a little of all."""
_MOST_OF_ROWS = 0.75
"""The rows that a slab across a dimension moves are no part of all if they are more."""
_ALONG = 2
"""How far along a sequence a convolution may spread a change."""


@dataclass(eq=False)
class Subject:
    """A claim for one call of an attention.

    Attributes:
        place, call: which.
        shown: for each input along which its queries vary, how.
        moves: for each input, the operands that vary with it from token to token.
        feels: for each input, the operands that depend on it.
        passed: the inputs in which the grid lies as claimed.
        failures: for each input in which it does not, why, by the most usual way; None where
            that does not come from one input alone.
        verified: whether it holds.
        doubt: why nothing can be said.
    """

    place: int
    call: int
    claim: Claim
    tokens: int
    shown: dict[int, Dimensions] = field(default_factory=dict)
    moves: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    feels: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    passed: set[int] = field(default_factory=set)
    failures: dict[int | None, str] = field(default_factory=dict)
    verified: bool = False
    doubt: str = "no floating input of the graph moves its tokens one by one"

    def on_grid(self, reaction: Tensor) -> Tensor:
        grid, prefix = self.claim
        return reaction[:, prefix : prefix + math.prod(grid)]


Reactions = tuple[Tensor, Tensor, Tensor]
"""How much each row of queries, keys and values changed: [batch, tokens] each."""


def changed(value: Tensor, region: Region, seed: int) -> Tensor:
    """A copy of an input with other values in a region, about as far from the old as these differ.

    Not farther: where layers normalize, a large change of a part is as large as one of the whole.
    """
    copy = value.detach().clone()
    spread = float(value.detach().float().std())
    amount = spread / 2 if 0 < spread < math.inf else 1.0
    part = copy[tuple(slice(start, stop) for start, stop in region.bounds)]
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, part.shape, generator=generator) * 2 - 1
    part += (signs * amount).to(part)
    return copy


def difference(before: Call, after: Call) -> Reactions:
    changes = ((new - old).norm(dim=-1) for old, new in zip(before.rows, after.rows, strict=True))
    one, other, third = (torch.nan_to_num(change, nan=0.0, posinf=0.0) for change in changes)
    return one, other, third


def mean(draws: Sequence[Reactions]) -> Reactions:
    one, other, third = (torch.stack(same).mean(0) for same in zip(*draws, strict=True))
    return one, other, third


def kind_of(subject: Subject, reaction: Tensor, whole: Tensor) -> str:
    """What a dimension is, by the reaction to a slab across it; "" if nothing reacts.

    Args:
        whole: the reaction to a change of all of the input.
    """
    on_grid, of_all = subject.on_grid(reaction), subject.on_grid(whole)
    if on_grid.numel() == 0 or not bool(on_grid.any()):
        return ""
    felt = of_all > _MOVED / 10 * whole.max()
    if float(felt.any(0).float().mean()) < _MOST_OF_ROWS:
        return ""  # it reaches the grid from elsewhere, across an edge
    shares = torch.where(felt, on_grid / of_all, 0.0)
    moved = shares > _MOVED * shares.max()
    is_parted = not bool((moved.any(1) | ~felt.any(1)).all())
    rows = float(felt.any(0).sum())
    if float(moved.any(0).sum()) < _MOST_OF_ROWS * rows:
        faint = shares > _FAINT * shares.max()
        is_sharp = float(faint.any(0).sum()) < _MOST_OF_ROWS * rows
        return ("cut" if is_parted else "spatial") if is_sharp else "blurred"
    return "batch" if is_parted else "all"


def trouble_of(subject: Subject, cell: Sequence[int], reactions: Reactions) -> str | None:
    """What is wrong with the reactions to a change of a cell; "" if nothing is, None without any."""
    if not any(bool(reaction.any()) for reaction in reactions):
        return None
    grid, prefix = subject.claim
    row = prefix + sum(i * stride for i, stride in zip(cell, _strides(grid), strict=True))
    expected = f"row {row} was expected to react"
    for name, reaction in zip(OPERANDS, reactions, strict=True):
        strongest, of_rows = float(reaction.max()), reaction.amax(0)
        if strongest == 0:
            return f"{expected}, but none of the {name} did"
        large = of_rows >= _LARGE * strongest
        if row >= len(large) or not (bool(large[row]) or _is_blurred(subject, of_rows, row)):
            return f"{expected}, but of the {name} {_listed(large)} did"
        far = large & _is_far(subject, cell)
        if bool(far.any()):
            return f"{expected} alone, but of the {name} {_listed(far)} did, too"
    queries = reactions[0][:, row]
    for name, reaction in zip(OPERANDS[1:], reactions[1:], strict=True):
        theirs = reaction[:, row]
        if len(theirs) != len(queries):
            continue  # heads are among the batch rows of one of them
        for one, other in ((queries, theirs), (theirs, queries)):
            if bool(((one >= _LARGE * one.max()) & (other < _MOVED / 2 * other.max())).any()):
                mine, yours = (
                    _listed(x >= _LARGE * x.max(), "batch row") for x in (queries, theirs)
                )
                return f"{expected} in the same batch rows, but of the queries {mine} did, of the {name} {yours}"
    return ""


def _is_blurred(subject: Subject, of_rows: Tensor, row: int) -> bool:
    """Whether a row is one of several cells that convolutions spread a change to."""
    strongest = of_rows.max()
    large = int((of_rows >= _LARGE * strongest).sum())
    large_on_grid = int((subject.on_grid(of_rows[None]) >= _LARGE * strongest).sum())
    return bool(of_rows[row] >= _MOVED * strongest) and large == large_on_grid


def _strides(grid: Sequence[int]) -> list[int]:
    return [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]


def _is_far(subject: Subject, cell: Sequence[int]) -> Tensor:
    """Which rows are cells that lie too far from a cell for a convolution to mix them."""
    grid, prefix = subject.claim
    far = torch.zeros(grid, dtype=torch.bool)
    for axis, (index, length) in enumerate(zip(cell, grid, strict=True)):
        distance = (torch.arange(length) - index).abs() > max(2, -(-length // 3))
        far |= distance.reshape([-1 if i == axis else 1 for i in range(len(grid))])
    row = prefix + sum(i * stride for i, stride in zip(cell, _strides(grid), strict=True))
    rows = torch.zeros(subject.tokens, dtype=torch.bool)
    rows[prefix : prefix + far.numel()] = far.reshape(-1)
    rows[max(row - _ALONG, 0) : row + _ALONG + 1] = False  # along the sequence, too
    return rows


def _listed(rows: Tensor, what: str = "row") -> str:
    places = rows.nonzero().flatten().tolist()
    shown = ", ".join(map(str, places[:4]))
    more = f" and {len(places) - 4} others" if len(places) > 4 else ""
    return f"{what}{'s' if len(places) > 1 else ''} {shown}{more}"
