"""One tile: some queries, the keys that any of them sees, and how both are read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from gna_compile.providers.portable.places import Place, is_row

WORKSPACE = 1 << 26
"""Bytes that the buffers of one step aim to stay under; one head of one tile always runs."""


class Scratch:
    """Buffers by name, used again by every tile: fresh memory costs more than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialized and contiguous; what was taken under this name before is lost."""
        numel = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = like.new_empty(numel)
        return buffer[:numel].view(shape)


class Tile:
    """Some queries, the keys and values that any of them sees, and what is hidden from whom.

    Args:
        rows: where its queries lie; several places are ranges.
        keys: where its keys lie, in the order of `key`.
        query: all queries, [batch, kv_heads, group, tokens, D].
        key: this tile's keys [batch, kv_heads, keys, D].
        value: like key.
        hidden: bool, broadcastable to [batch, kv_heads, rows, keys], or None if nothing is hidden.
        may_be_blind: whether all keys may be hidden from a query.
    """

    def __init__(
        self,
        rows: Sequence[Place],
        keys: Sequence[Place],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None,
        may_be_blind: bool,
        scratch: Scratch,
    ) -> None:
        self._rows = rows
        self._keys = keys
        self.scratch = scratch
        self.query = self.read_rows(query, "query")
        self.key = key
        self.value = value
        self.hidden = hidden
        self.may_be_blind = may_be_blind

    def read_rows(self, tensor: Tensor, name: str) -> Tensor:
        """This tile's rows [batch, kv_heads, group * queries, ...] of all queries' `tensor`.

        Maybe in the scratch buffer `name`.
        """
        if len(self._rows) == 1:
            place = self._rows[0]
            view, last = place.of(tensor, 3), 2 + place.rank
            if is_row(view, last):
                return view.flatten(2, last)
            return self.scratch.take(name, view.shape, tensor).copy_(view).flatten(2, last)
        sizes = [place.tokens for place in self._rows]
        shape = (*tensor.shape[:3], sum(sizes), *tensor.shape[4:])
        buffer = self.scratch.take(name, shape, tensor)
        for place, part in zip(self._rows, buffer.split(sizes, dim=3), strict=True):
            part.copy_(place.of(tensor, 3))
        return buffer.flatten(2, 3)

    def write_rows(self, tensor: Tensor, rows: Tensor) -> None:
        """The inverse of `read_rows`."""
        if len(self._rows) == 1:
            place = self._rows[0]
            view = place.of(tensor, 3)
            view.copy_(rows.unflatten(2, view.shape[2 : 3 + place.rank]))
            return
        sizes = [place.tokens for place in self._rows]
        parts = rows.unflatten(2, (tensor.shape[2], sum(sizes))).split(sizes, dim=3)
        for place, part in zip(self._rows, parts, strict=True):
            place.of(tensor, 3).copy_(part)

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        """Adds the gradient of this tile's keys to `total` [batch, kv_heads, tokens, D]."""
        parts = grad.split([place.tokens for place in self._keys], dim=2) if self._keys else ()
        for place, part in zip(self._keys, parts, strict=True):
            view = place.of(total, 2)
            view.add_(part.unflatten(2, view.shape[2:-1]))

    def row_chunks(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Slices of the rows whose scores fit the workspace, and what is hidden from them."""
        batch, heads, rows, _ = self.query.shape
        keys = self.key.shape[2]
        step = max(WORKSPACE // (4 * 4 * batch * heads * max(keys, 1)), 1)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            hidden = self.hidden
            if hidden is not None:
                if hidden.shape[2] != 1:
                    hidden = hidden[:, :, chunk]
                hidden = hidden.expand(-1, -1, chunk.stop - chunk.start, -1)
            yield chunk, hidden


class Gather:
    """Brings the keys (or values) of one tile after another into one row of tokens.

    The keys that all queries of a piece see are copied once, to the front of the buffer; boxes
    follow behind them. Keys that already are one evenly strided row are not copied.

    Args:
        name: of the scratch buffer.
        tensor: all keys, [batch, kv_heads, tokens, D].
        linked: where the keys lie that all queries see.
        longest: the most keys that a tile has.
        hidden: which of `linked` the key mask hides, bool [batch, 1, 1, keys]; or None.
        scratch: where the buffer comes from.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        linked: Sequence[Place],
        longest: int,
        hidden: Tensor | None,
        scratch: Scratch,
    ) -> None:
        self._name = name
        self._scratch = scratch
        self._tensor = tensor
        self._linked = linked
        self._count = sum(place.tokens for place in linked)
        self._longest = longest
        self._hidden = hidden
        self._buffer: Tensor | None = None

    def take(self, boxes: Sequence[Place]) -> Tensor:
        """The keys of one tile: those that all queries see, then the boxes."""
        places = len(self._linked) + len(boxes)
        if places == 0:
            return self._tensor[:, :, :0]
        if places == 1 and self._hidden is None:
            view = (self._linked or boxes)[0].of(self._tensor, 2)
            if is_row(view, view.ndim - 2):
                return view.flatten(2, -2)
        if self._buffer is None:
            self._buffer = self._new_buffer()
        end = self._count
        for place in boxes:
            start, end = end, end + place.tokens
            view = place.of(self._tensor, 2)
            self._buffer[:, :, start:end].unflatten(2, view.shape[2:-1]).copy_(view)
        return self._buffer[:, :, :end]

    def _new_buffer(self) -> Tensor:
        batch, heads, _, head_dim = self._tensor.shape
        shape = (batch, heads, self._longest, head_dim)
        buffer = self._scratch.take(self._name, shape, self._tensor)
        end = 0
        for place in self._linked:
            start, end = end, end + place.tokens
            buffer[:, :, start:end].copy_(place.of(self._tensor, 2))
        if self._hidden is not None:
            buffer[:, :, :end].masked_fill_(self._hidden.transpose(2, 3), 0)
        return buffer
