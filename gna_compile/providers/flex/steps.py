"""What Inductor compiles: both passes of FlexAttention, with the copies into tile order and back.

FlexAttention is called as the operator that `flex_attention` itself calls, because its backward
then takes the forward's results and needs no autograd.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

from gna_compile import _torch
from gna_compile.providers.flex.boxes import TILE

_LOG2 = math.log(2)  # FlexAttention's logsumexp is to base 2

_OPTIONS = {
    "BACKEND": "TRITON",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}

_SHARED = 12  # tables that are there whatever the mask: four of tokens, eight of tiles


class Mask(NamedTuple):
    """What the mask of a kernel is made of; the rest is in the tables.

    Attributes:
        columns: how many columns there are.
        has_shown: whether some keys are limited by none of them.
        has_links: whether that depends on the query.
        has_key_mask: whether global keys may be hidden.
    """

    columns: int
    has_shown: bool
    has_links: bool
    has_key_mask: bool

    @property
    def tables(self) -> int:
        """How many tables come before the other arguments, the key mask included."""
        others = self.has_shown + 3 * self.has_links + 2 * self.has_key_mask
        return _SHARED + 3 * self.columns + others


class Tiles:
    """Reads and writes tensors in tile order.

    Args:
        mask: which mask this is.
        tables: as the provider has them, then the key mask [batch, global keys] if there is one; what
            comes after that is ignored.

    Attributes:
        buffers: what `visible` reads.
    """

    def __init__(self, mask: Mask, tables: Sequence[Tensor]) -> None:
        self._mask = mask
        self._queries, self._query_rows, self._keys, self._key_rows = tables[:4]
        self._lists = tables[4:_SHARED]
        self._is_key = self._keys >= 0
        buffers = list(tables[_SHARED : _SHARED + 3 * mask.columns])
        others = tables[_SHARED + 3 * mask.columns : mask.tables]
        if mask.has_key_mask:
            *others, global_key, key_mask = others
            chosen = key_mask[:, global_key.clamp(min=0)] | (global_key < 0)
            self._is_key = self._is_key & chosen
        if mask.has_shown:
            (shown,) = others
            buffers.append(shown & chosen if mask.has_key_mask else shown)
        if mask.has_links:
            query_part, key_part, links = others
            if mask.has_key_mask:
                key_part = key_part.where(chosen, links.shape[1] - 1)
            buffers += [query_part, key_part, links]
        self.buffers = tuple(buffers)

    def read(self, tensor: Tensor) -> Tensor:
        """[batch, heads, query tokens, ...] in tile order; zero where a row is no token."""
        return _read(tensor, self._queries, self._queries >= 0)

    def read_keys(self, tensor: Tensor) -> Tensor:
        """The same of keys, and zero for hidden ones, which may hold anything."""
        return _read(tensor, self._keys, self._is_key)

    def write(self, target: Tensor, tiled: Tensor) -> None:
        """Writes what `read` would read."""
        target.copy_(tiled[:, :, self._query_rows])

    def write_keys(self, target: Tensor, tiled: Tensor) -> None:
        """Writes what `read_keys` would read."""
        target.copy_(tiled[:, :, self._key_rows])

    def rest(self, scale: float) -> tuple[Any, ...]:
        """FlexAttention's arguments from the block mask on."""
        from torch.nn.attention.flex_attention import BlockMask

        make: Any = BlockMask
        block_mask = make(
            (len(self._queries), len(self._keys)),
            *(table[None, None] for table in self._lists),
            BLOCK_SIZE=(TILE, TILE),
            mask_mod=self.visible,
        )
        return block_mask.as_tuple(), scale, dict(_OPTIONS), (), self.buffers

    def visible(
        self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Tensor
    ) -> Tensor:
        count = self._mask.columns
        columns = zip(*(buffers[n * count : (n + 1) * count] for n in range(3)), strict=True)
        terms = [(at[key] >= first[query]) & (at[key] < stop[query]) for at, first, stop in columns]
        others = buffers[3 * count :]

        def of_key(table: Tensor) -> Tensor:
            return table[batch, key] if self._mask.has_key_mask else table[key]

        if self._mask.has_links:
            query_part, key_part, links = others
            link = links[query_part[query], of_key(key_part)]
            terms = [term | (link & (1 << bit) > 0) for bit, term in enumerate(terms)]
            terms.append(link >= 1 << count)
        if not terms:
            return of_key(others[0])
        visible = reduce(operator.and_, terms)
        return visible | of_key(others[0]) if self._mask.has_shown else visible


def _read(tensor: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    if keep.ndim == 2:
        keep = keep[:, None]
    if tensor.ndim == 4:
        keep = keep[..., None]
    return tensor[:, :, order.clamp(min=0)].masked_fill(~keep, 0)


def _score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def _score_gradient(
    score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, grad: Tensor
) -> list[Tensor | None]:
    return [grad, None, None, None, None]


def forward(mask: Mask, scale: float, *arguments: Tensor) -> None:
    tiles = Tiles(mask, arguments)
    query, key, value, output, logsumexp = arguments[mask.tables :]
    out, lse, *_ = _torch.flex_attention(
        tiles.read(query),
        tiles.read_keys(key),
        tiles.read_keys(value),
        _score,
        *tiles.rest(scale),
    )
    tiles.write(output, out)
    tiles.write(logsumexp, lse * _LOG2)


def backward(mask: Mask, scale: float, *arguments: Tensor) -> None:
    tiles = Tiles(mask, arguments)
    query, key, value, output, logsumexp, grad_output, *targets = arguments[mask.tables :]
    grad_logsumexp = None
    if len(targets) == 4:
        grad_logsumexp = tiles.read(targets.pop()) * _LOG2
    *grads, _ = _torch.flex_attention_backward(
        tiles.read(query),
        tiles.read_keys(key),
        tiles.read_keys(value),
        tiles.read(output),
        tiles.read(logsumexp) / _LOG2,
        tiles.read(grad_output),
        grad_logsumexp,
        _score,
        _score_gradient,
        *tiles.rest(scale),
    )
    writers = (tiles.write, tiles.write_keys, tiles.write_keys)
    for write, target, grad in zip(writers, targets, grads, strict=True):
        write(target, grad)
