"""How a grid may lie along the dimensions of an input, and what to change there for one cell."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gna_compile.verify.probe import Claim

_RANDOM_CELLS = 4
_MOST_FITS = 24


@dataclass(frozen=True)
class Dimensions:
    """What the dimensions of an input are to one attention.

    Attributes:
        spatial: tokens lie along them.
        cut: of these, those of which different stretches are in different batch rows.
        batch: different elements are in different batch rows.
        blind: how many others there are that move all tokens.
        is_sharp: whether tokens feel nothing of what lies elsewhere along these.
    """

    spatial: tuple[int, ...]
    cut: frozenset[int]
    batch: tuple[int, ...]
    blind: int
    is_sharp: bool


@dataclass(frozen=True)
class Fit:
    """Neighboring axes of a grid along one dimension of an input.

    Attributes:
        dim: the dimension, of length `size`.
        axes: the axes, of together `cells` cells in raster order.
        step: elements to a cell; 0 if they do not divide.
        windows: how often the cells follow one after another, each time in another batch row.
        offset: elements before the first cell.
    """

    dim: int
    size: int
    axes: tuple[int, ...]
    cells: int
    step: int
    windows: int = 1
    offset: int = 0

    def stretch(self, cell: int, window: int) -> tuple[int, int]:
        """The elements of a cell."""
        if self.step:
            start = self.offset + (window * self.cells + cell) * self.step
            return start, start + self.step
        start = cell * self.size // self.cells
        return start, max(start + 1, (cell + 1) * self.size // self.cells)


def _fits(
    dim: int, size: int, axes: tuple[int, ...], grid: Sequence[int], is_cut: bool
) -> list[Fit]:
    """The ways to lay axes along a dimension; `is_cut`: its stretches are in several batch rows."""
    cells = math.prod(grid[axis] for axis in axes)
    fit = partial(Fit, dim, size, axes, cells)
    if size % cells:
        return [fit(0)] if len(axes) == 1 and size > cells else []
    ratio = size // cells
    found = [fit(ratio)]
    if is_cut:
        found += [fit(step, ratio // step) for step in range(1, ratio) if ratio % step == 0]
    return found


@dataclass(frozen=True)
class Way:
    """A way in which a grid may lie in an input: what to change for a cell.

    Attributes:
        input: its position.
        grid: the grid.
        fits: the axes along each dimension.
        batch: further dimensions, of which one element belongs to a sequence.
        blind: how many dimensions move all tokens; if they are several, tokens may lie along one
            that a convolution reaches all over.
    """

    input: int
    grid: tuple[int, ...]
    fits: tuple[Fit, ...]
    batch: tuple[int, ...]
    blind: int

    @property
    def is_exact(self) -> bool:
        """Whether a failure of this way speaks against the grid."""
        is_merged = any(len(fit.axes) > 1 for fit in self.fits)
        return all(fit.step for fit in self.fits) and not (is_merged and self.blind > 1)

    def rank(self) -> tuple[Any, ...]:
        """Sorts what is usual first."""
        dims = [fit.dim for fit in self.fits]
        crossed = sum(a > b for a, b in itertools.combinations(dims, 2))
        return (not self.is_exact, crossed, sum(fit.windows > 1 for fit in self.fits), self.input)

    def region(
        self, cell: Sequence[int], turn: int, shape: Sequence[int], *, is_core: bool = False
    ) -> Region:
        """The elements of a cell in one sequence; another one at each turn.

        Args:
            is_core: only those in its middle, where patches are shifted by padding.
        """
        chance = random.Random(turn)
        bounds = [(0, size) for size in shape]
        for fit in self.fits:
            index = 0
            for axis in fit.axes:
                index = index * self.grid[axis] + cell[axis]
            start, stop = fit.stretch(index, chance.randrange(fit.windows))
            margin = (stop - start) // 4 if is_core else 0
            bounds[fit.dim] = (start + margin, stop - margin)
        for dim in self.batch:
            last = shape[dim] - 1
            index = (last, 0, chance.randint(0, last))[turn % 3]
            bounds[dim] = (index, index + 1)
        return Region(self.input, tuple(bounds))


@dataclass(frozen=True)
class Region:
    """A part of an input: first and last index along each dimension."""

    input: int
    bounds: tuple[tuple[int, int], ...]

    def words(self, name: str, shape: Sequence[int]) -> str:
        parts = [
            ":" if bound == (0, size) else f"{bound[0]}:{bound[1]}"
            for bound, size in zip(self.bounds, shape, strict=True)
        ]
        return f"{name}[{', '.join(parts)}]"


def ways_of(
    place: int, shape: Sequence[int], claim: Claim, tokens: int, shown: Dimensions
) -> list[Way]:
    """The ways to lay a grid along all dimensions that tokens lie along, the usual one first."""
    grid, prefix = claim
    axes = tuple(axis for axis, length in enumerate(grid) if length > 1)
    found = []
    for cuts in itertools.combinations(range(1, len(axes)), len(shown.spatial) - 1):
        edges = (0, *cuts, len(axes))
        groups = [axes[a:b] for a, b in itertools.pairwise(edges)]
        for dims in itertools.permutations(shown.spatial):
            options = []
            for dim, group in zip(dims, groups, strict=True):
                fits = _fits(dim, shape[dim], group, grid, dim in shown.cut)
                if len(groups) == 1 and shape[dim] == tokens != math.prod(grid):
                    whole = Fit(dim, tokens, group, math.prod(grid), 1, offset=prefix)
                    fits.insert(0, whole)
                options.append(fits)
            for fits_of_all in itertools.product(*options):
                found.append(Way(place, grid, fits_of_all, shown.batch, shown.blind))
    return sorted(found, key=Way.rank)[:_MOST_FITS]


def cells_of(grid: Sequence[int]) -> list[tuple[int, ...]]:
    """All corners, and some others."""
    corners = itertools.product(*(sorted({length - 1, 0}) for length in grid))
    chance = random.Random(0)
    others = [tuple(map(chance.randrange, grid)) for _ in range(_RANDOM_CELLS)]
    return list(dict.fromkeys([*corners, *others]))
