"""One axis of a token grid in plain ints: which keys a query sees along it.

Definitions follow Generalized Neighborhood Attention (arXiv 2504.16922), with one choice per open
question written down here.

Words: positions on an axis fall into `dilation` interleaved *groups*; a group is itself an axis of
dilation 1 (`Axis.group`), and tokens of different groups never see each other. Queries of one
stride group share the window of their *leader*. Window starts never decrease along a group, so the
keys of a box of queries are again a box (the *union box*), and so are the keys that all of them
see (the *intersection box*).
"""

from __future__ import annotations

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
