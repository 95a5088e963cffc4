"""Neighborhood attention over one grid of tokens, with global tokens around it.

The mask is separable: a key is visible to a query iff it is visible on every axis of the grid, so
a `Neighborhood` is a tuple of axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gna_compile.geometry.axis import Axis, GeometryError


@dataclass(frozen=True)
class Neighborhood:
    """GNA over a grid of tokens in raster order (last axis fastest), with global tokens around it.

    Args:
        axes: one `Axis` per grid axis, slowest first; one to three of them.
        prefix: global tokens before the grid.
        suffix: global tokens after the grid.

    A global token sees all tokens and all tokens see it.
    """

    axes: tuple[Axis, ...]
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.axes) <= 3:
            raise GeometryError(f"a grid has 1 to 3 axes, not {len(self.axes)}")
        for name in ("prefix", "suffix"):
            if getattr(self, name) < 0:
                raise GeometryError(f"{name} {getattr(self, name)} must be at least 0")

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        window: Sequence[int],
        stride: Sequence[int] | None = None,
        dilation: Sequence[int] | None = None,
        causal: Sequence[bool] | None = None,
        prefix: int = 0,
        suffix: int = 0,
    ) -> Neighborhood:
        """Builds the axes from one sequence per parameter, as the op and the policy have them.

        Raises:
            GeometryError: if lengths differ or an axis breaks a rule; names the axis.
        """
        rank = len(grid)
        columns = {
            "window": window,
            "stride": stride if stride is not None else [1] * rank,
            "dilation": dilation if dilation is not None else [1] * rank,
            "causal": causal if causal is not None else [False] * rank,
        }
        for name, values in columns.items():
            if len(values) != rank:
                raise GeometryError(
                    f"{name} has {len(values)} entries for a grid of {rank} axes {tuple(grid)}"
                )
        axes = []
        for index, values in enumerate(zip(grid, *columns.values(), strict=True)):
            try:
                axes.append(Axis(*values))
            except GeometryError as error:
                raise GeometryError(f"axis {index} of grid {tuple(grid)}: {error}") from None
        return cls(tuple(axes), prefix, suffix)

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def grid_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def global_tokens(self) -> int:
        return self.prefix + self.suffix

    @property
    def tokens(self) -> int:
        """All tokens: prefix, grid and suffix."""
        return self.grid_tokens + self.global_tokens

    @property
    def is_full(self) -> bool:
        """Whether this is dense attention."""
        return all(axis.is_full for axis in self.axes)

    @cached_property
    def merged(self) -> Neighborhood:
        """The same attention with neighboring axes that hide nothing joined into one."""
        axes: list[Axis] = []
        for axis in self.axes:
            if axes and axis.is_full and axes[-1].is_full:
                length = axes.pop().length * axis.length
                axes.append(Axis(length, length))
            else:
                axes.append(axis)
        return Neighborhood(tuple(axes), self.prefix, self.suffix)

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs, global tokens included, no key mask."""
        grid = math.prod(axis.pairs for axis in self.axes)
        return grid + self.tokens**2 - self.grid_tokens**2

    @property
    def flop_share(self) -> float:
        """Share of dense attention's FLOPs that the mask needs; its inverse is the FLOP bound."""
        return self.pairs / self.tokens**2
