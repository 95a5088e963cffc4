"""One tile: a box of queries, the keys that any of them sees, and how both are read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gna_compile.geometry import Neighborhood
from gna_compile.providers.portable.tiles import AxisTile

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
    """A box of queries, the keys and values that any of them sees, and what is hidden from whom.

    Args:
        neighborhood: the geometry.
        box: one axis tile per grid axis, or None for the global queries, which see all tokens.
        query: all queries, [batch, kv_heads, group, tokens, D].
        key: this tile's keys [batch, kv_heads, keys, D]: global keys first, then the box, for a
            box; all tokens in their own order for the global queries.
        value: like key.
        hidden: bool, broadcastable to [batch, kv_heads, rows, keys], or None if nothing is hidden.
    """

    def __init__(
        self,
        neighborhood: Neighborhood,
        box: tuple[AxisTile, ...] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None,
        scratch: Scratch,
    ) -> None:
        self._neighborhood = neighborhood
        self._box = box
        self.scratch = scratch
        self.query = self.read_rows(query, "query")
        self.key = key
        self.value = value
        self.hidden = hidden

    def read_rows(self, tensor: Tensor, name: str) -> Tensor:
        """This tile's rows [batch, kv_heads, group * queries, ...] of all queries' `tensor`.

        Maybe in the scratch buffer `name`.
        """
        if self._box is None:
            return torch.cat(self._ends(tensor, 3), dim=3).flatten(2, 3)
        box, last = self._query_box(tensor), 2 + len(self._box)
        if is_row(box, last):
            return box.flatten(2, last)
        rows = self.scratch.take(name, box.shape, tensor).copy_(box)
        return rows.flatten(2, last)

    def write_rows(self, tensor: Tensor, rows: Tensor) -> None:
        """The inverse of `read_rows`."""
        group = tensor.shape[2]
        if self._box is not None:
            box = self._query_box(tensor)
            box.copy_(rows.unflatten(2, box.shape[2 : 3 + len(self._box)]))
            return
        sizes = [self._neighborhood.prefix, self._neighborhood.suffix]
        parts = rows.unflatten(2, (group, sum(sizes))).split(sizes, dim=3)
        for target, part in zip(self._ends(tensor, 3), parts, strict=True):
            target.copy_(part)

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        """Adds the gradient of this tile's keys to `total` [batch, kv_heads, tokens, D]."""
        if self._box is None:
            total.add_(grad)
            return
        sizes = [self._neighborhood.prefix, self._neighborhood.suffix]
        *parts, box_grad = grad.split([*sizes, grad.shape[2] - sum(sizes)], dim=2)
        for target, part in zip(self._ends(total, 2), parts, strict=True):
            target.add_(part)
        box = grid_box(total, 2, self._neighborhood, [tile.key_tokens for tile in self._box])
        box.add_(box_grad.unflatten(2, box.shape[2:-1]))

    def row_chunks(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Slices of the rows whose scores fit the workspace, and what is hidden from them."""
        batch, heads, rows, _ = self.query.shape
        keys = self.key.shape[2]
        step = max(WORKSPACE // (4 * 4 * batch * heads * keys), 1)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            hidden = self.hidden
            if hidden is not None:
                if hidden.shape[2] != 1:
                    hidden = hidden[:, :, chunk]
                hidden = hidden.expand(-1, -1, chunk.stop - chunk.start, -1)
            yield chunk, hidden

    def _query_box(self, tensor: Tensor) -> Tensor:
        assert self._box is not None
        tokens = [tile.query_tokens for tile in self._box]
        return grid_box(tensor, 3, self._neighborhood, tokens)

    def _ends(self, tensor: Tensor, dim: int) -> list[Tensor]:
        return global_tokens(tensor, dim, self._neighborhood)


class Gather:
    """Brings the keys (or values) of one tile after another into one row of tokens.

    The global tokens are copied once, to the front of the buffer; boxes follow behind them.
    Without global tokens, a box that already is one evenly strided row is not copied.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        neighborhood: Neighborhood,
        longest: int,
        hidden_globals: Tensor | None,
        scratch: Scratch,
    ) -> None:
        self._name = name
        self._scratch = scratch
        self._tensor = tensor
        self._neighborhood = neighborhood
        self._longest = longest
        self._hidden_globals = hidden_globals
        self._buffer: Tensor | None = None

    def take(self, box: tuple[AxisTile, ...]) -> Tensor:
        tokens = [tile.key_tokens for tile in box]
        view = grid_box(self._tensor, 2, self._neighborhood, tokens)
        count = self._neighborhood.global_tokens
        if count == 0 and is_row(view, view.ndim - 2):
            return view.flatten(2, -2)
        if self._buffer is None:
            self._buffer = self._new_buffer(count)
        row = self._buffer[:, :, : count + math.prod(view.shape[2:-1])]
        row[:, :, count:].unflatten(2, view.shape[2:-1]).copy_(view)
        return row

    def _new_buffer(self, count: int) -> Tensor:
        batch, heads, _, head_dim = self._tensor.shape
        shape = (batch, heads, self._longest, head_dim)
        buffer = self._scratch.take(self._name, shape, self._tensor)
        if count:
            tokens = torch.cat(global_tokens(self._tensor, 2, self._neighborhood), dim=2)
            if self._hidden_globals is not None:
                tokens = without(tokens, self._hidden_globals)
            buffer[:, :, :count].copy_(tokens)
        return buffer


def without(tensor: Tensor, hidden: Tensor) -> Tensor:
    """Keys [batch, kv_heads, n, D] with those that `hidden` [batch, 1, 1, n] hides set to zero."""
    return tensor.masked_fill(hidden.transpose(2, 3), 0)


def grid_box(tensor: Tensor, dim: int, neighborhood: Neighborhood, box: list[slice]) -> Tensor:
    """A box of the grid of tokens that lies along `dim`, as a view with one dimension an axis."""
    tokens = tensor.narrow(dim, neighborhood.prefix, neighborhood.grid_tokens)
    grid = tokens.unflatten(dim, neighborhood.grid)
    return grid[(slice(None),) * dim + tuple(box)]


def global_tokens(tensor: Tensor, dim: int, neighborhood: Neighborhood) -> list[Tensor]:
    """The prefix and the suffix tokens along `dim`, as views."""
    start = neighborhood.prefix + neighborhood.grid_tokens
    return [
        tensor.narrow(dim, 0, neighborhood.prefix),
        tensor.narrow(dim, start, neighborhood.suffix),
    ]


def is_row(view: Tensor, last: int) -> bool:
    """Whether the dimensions 2 .. last are one evenly strided dimension."""
    stride = None
    for size, step in zip(view.shape[last:1:-1], view.stride()[last:1:-1], strict=True):
        if size == 1:
            continue
        if stride is not None and step != stride:
            return False
        stride = step * size
    return True
