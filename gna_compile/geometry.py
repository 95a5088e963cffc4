"""Generalized Neighborhood Attention in plain ints: which keys a query sees.

The mask is separable: a key is visible to a query iff it is visible on every axis of the token
grid. So this module is about one `Axis` at a time, and a `Neighborhood` is a tuple of them.
Definitions follow Generalized Neighborhood Attention (arXiv 2504.16922), with one choice per
open question written down here; everything else in this package takes its geometry from here.

Words: positions on an axis fall into `dilation` interleaved *groups*; a group is itself an axis of
dilation 1 (`Axis.group`), and tokens of different groups never see each other. Queries of one
stride group share the window of their *leader*. Window starts never decrease along a group, so the
keys of a box of queries are again a box (the *union box*), and so are the keys that all of them
see (the *intersection box*).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


class GeometryError(ValueError):
    """A window, stride, dilation or grid that breaks a rule; the message names axis, value and rule."""


@dataclass(frozen=True)
class Axis:
    """One axis of a token grid and the attention along it.

    Args:
        length: tokens along the axis, at least 1.
        window: keys a query sees, 1 <= window and window * dilation <= length.
        stride: queries that share one window, 1 <= stride <= window.
        dilation: step between the keys of one window, at least 1.
        causal: a query sees no key after itself.

    Raises:
        GeometryError: if any of these rules is broken.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise GeometryError(f"grid length {self.length} must be at least 1")
        if self.window < 1:
            raise GeometryError(f"window {self.window} must be at least 1")
        if not 1 <= self.stride <= self.window:
            raise GeometryError(
                f"stride {self.stride} must lie between 1 and the window {self.window}"
            )
        if self.dilation < 1:
            raise GeometryError(f"dilation {self.dilation} must be at least 1")
        if self.window * self.dilation > self.length:
            span = f"window {self.window}"
            if self.dilation > 1:
                span += f" x dilation {self.dilation} = {self.window * self.dilation}"
            raise GeometryError(f"{span} is larger than the grid's {self.length} tokens")

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key of the axis."""
        return self.window == self.length and not self.causal

    def group(self, index: int) -> Axis:
        """The axis formed by the tokens `index`, `index + dilation`, `index + 2 * dilation`, ..."""
        if self.dilation == 1:
            return self
        length = self.length // self.dilation + (index < self.length % self.dilation)
        return Axis(length, self.window, self.stride, 1, self.causal)

    def keys(self, query: int) -> range:
        """The keys that `query` sees, as token positions on this axis."""
        group = query % self.dilation
        axis, position = self.group(group), query // self.dilation
        first = axis._first(position)
        stop = position + 1 if axis.causal else first + axis.window
        return range(group + self.dilation * first, group + self.dilation * stop, self.dilation)

    def sees(self, query: int, key: int) -> bool:
        """Whether `query` sees `key`, both token positions on this axis."""
        return key in self.keys(query)

    def union(self, queries: range) -> range:
        """The keys that any query of a non-empty box of queries sees. Needs dilation 1."""
        self._require_group(queries)
        last = queries[-1]
        stop = last + 1 if self.causal else self._first(last) + self.window
        return range(self._first(queries[0]), stop)

    def intersection(self, queries: range) -> range:
        """The keys that every query of a non-empty box of queries sees; may be empty. Needs dilation 1."""
        self._require_group(queries)
        first = self._first(queries[-1])
        stop = queries[0] + 1 if self.causal else self._first(queries[0]) + self.window
        return range(first, max(first, stop))

    def seen_by(self, keys: range) -> range:
        """The queries that see any key of a non-empty box of keys. Needs dilation 1.

        The inverse of `union`, which the backward pass needs; it may be empty, since a causal or
        strided window can leave keys that nobody sees.
        """
        self._require_group(keys)
        first = self._first_query(lambda query: self._stop(query) > keys[0])
        stop = self._first_query(lambda query: self._first(query) > keys[-1])
        return range(first, max(first, stop))

    @cached_property
    def pairs(self) -> int:
        """How many (query, key) pairs are visible along this axis; closed form, any length."""
        if not self.causal:
            return self.length * self.window
        longer = self.length % self.dilation
        groups = [(self.dilation - longer, self.length // self.dilation)]
        groups.append((longer, self.length // self.dilation + 1))
        return sum(count * self._causal_pairs(length) for count, length in groups if count)

    def _causal_pairs(self, length: int) -> int:
        window, stride = self.window, self.stride
        whole, tail = divmod(length, stride)
        # Stride groups 0 .. growing-1 start at key 0; later ones see a window that slides along.
        growing = min(whole, window // stride)
        rows = growing * stride
        pairs = rows * (rows + 1) // 2
        pairs += (whole - growing) * (stride * (2 * window - stride + 1) // 2)
        # The last, shorter stride group: its rows end at length - tail .. length - 1.
        first = max(length - window, 0)
        pairs += tail * (2 * length - tail + 1) // 2 - tail * first
        return pairs

    def _first(self, position: int) -> int:
        """First key of the window of the query at `position`; dilation 1."""
        last = self.length - 1
        if self.causal:
            leader = min(position // self.stride * self.stride + self.stride - 1, last)
            return max(leader - self.window + 1, 0)
        leader = min(position // self.stride * self.stride + self.stride // 2, last)
        return min(max(leader - self.window // 2, 0), self.length - self.window)

    def _stop(self, position: int) -> int:
        return position + 1 if self.causal else self._first(position) + self.window

    def _first_query(self, holds) -> int:  # type: ignore[no-untyped-def]
        """Smallest query for which a monotone predicate holds, or the length if none does."""
        low, high = 0, self.length
        while low < high:
            middle = (low + high) // 2
            if holds(middle):
                high = middle
            else:
                low = middle + 1
        return low

    def _require_group(self, box: range) -> None:
        if self.dilation != 1:
            raise GeometryError(
                f"a box on an axis of dilation {self.dilation} is defined per group: use .group(g)"
            )
        if not box or box.step != 1 or box[0] < 0 or box[-1] >= self.length:
            raise GeometryError(f"{box} is not a non-empty box within 0..{self.length - 1}")


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
