"""The walk over a problem: parts of the batch and of the heads, and the tiles of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gna_compile.providers.portable import tile_tensors
from gna_compile.providers.portable.masks import AxisMasks, join_hidden
from gna_compile.providers.portable.tile_tensors import Gather, Scratch, Tile, without
from gna_compile.providers.portable.tiles import cut_grid
from gna_compile.providers.problem import Inputs, Problem


@dataclass(frozen=True)
class Part:
    batch: slice
    kv_heads: slice


def parts(problem: Problem) -> Iterator[Part]:
    """Splits batch and heads so that a tile's buffers fit the workspace."""
    neighborhood = problem.neighborhood
    group = problem.heads // problem.kv_heads
    cut = cut_grid(neighborhood, group)
    rows = group * math.prod(max(len(tile.queries) for tile in tiles) for tiles in cut)
    keys = math.prod(max(len(tile.keys) for tile in tiles) for tiles in cut)
    keys += neighborhood.global_tokens
    # Key, value, their gradients; query, output, their gradients; fp32 is 4 bytes.
    head_bytes = 4 * 4 * problem.head_dim * (rows + keys)
    if problem.device != "cpu":
        # A few blocks of scores: the exact way holds them whole.
        head_bytes += 4 * 4 * rows * keys
    batch_bytes = head_bytes * problem.kv_heads
    if problem.has_key_mask:
        batch_bytes += 4 * rows * keys
    heads = min(max(tile_tensors.WORKSPACE // head_bytes, 1), problem.kv_heads)
    batches = 1
    if heads == problem.kv_heads:
        batches = min(max(tile_tensors.WORKSPACE // batch_bytes, 1), problem.batch)
    for batch in range(0, problem.batch, batches):
        for head in range(0, problem.kv_heads, heads):
            yield Part(
                slice(batch, min(batch + batches, problem.batch)),
                slice(head, min(head + heads, problem.kv_heads)),
            )


class Step:
    """One part of the batch and heads; makes its tiles.

    Views in here: [batch, kv_heads, group, tokens, ...] of anything that the queries have, and
    [batch, kv_heads, tokens, head_dim] of anything that the keys have.
    """

    def __init__(
        self,
        problem: Problem,
        part: Part,
        inputs: Inputs,
        scratch: Scratch,
    ) -> None:
        self._neighborhood = problem.neighborhood
        self._part = part
        self._scratch = scratch
        self._group = problem.heads // problem.kv_heads
        self._kv_heads = problem.kv_heads
        self._query = self.of_query(inputs.query)
        self._key = self.of_key(inputs.key)
        self._value = self.of_key(inputs.value)
        self._hidden_globals: Tensor | None = None
        if inputs.key_mask is not None and problem.neighborhood.global_tokens:
            self._hidden_globals = ~inputs.key_mask[part.batch]

    def of_query(self, tensor: Tensor) -> Tensor:
        grouped = tensor.unflatten(1, (self._kv_heads, self._group))
        return grouped[self._part.batch, self._part.kv_heads]

    def of_key(self, tensor: Tensor) -> Tensor:
        return tensor[self._part.batch, self._part.kv_heads]

    def tiles(self) -> Iterator[Tile]:
        """All tiles; each query is in exactly one. A tile is valid until the next one."""
        if self._neighborhood.global_tokens:
            yield self._global_tile()
        yield from self._grid_tiles()

    def _global_tile(self) -> Tile:
        """The global queries, which see all tokens."""
        key, value, hidden = self._key, self._value, None
        if self._hidden_globals is not None:
            batch, grid = self._key.shape[0], self._neighborhood.grid_tokens
            visible = self._hidden_globals.new_zeros(batch, grid)
            prefix, suffix = self._hidden_globals.split(
                [self._neighborhood.prefix, self._neighborhood.suffix], dim=1
            )
            hidden = torch.cat([prefix, visible, suffix], dim=1)[:, None, None]
            key, value = (without(tensor, hidden) for tensor in (key, value))
        return Tile(self._neighborhood, None, self._query, key, value, hidden, self._scratch)

    def _grid_tiles(self) -> Iterator[Tile]:
        cut = cut_grid(self._neighborhood, self._group)
        count = self._neighborhood.global_tokens
        masks = AxisMasks(self._query.device)
        hidden_globals = None
        if self._hidden_globals is not None:
            hidden_globals = self._hidden_globals[:, None, None]
        longest = count + math.prod(max(len(tile.keys) for tile in tiles) for tiles in cut)
        keys, values = (
            Gather(name, tensor, self._neighborhood, longest, hidden_globals, self._scratch)
            for name, tensor in (("key", self._key), ("value", self._value))
        )
        for box in itertools.product(*cut):
            hidden = masks.hidden(box)
            if hidden is not None:
                hidden = hidden.repeat(self._group, 1)[None, None]
            if count and (hidden is not None or hidden_globals is not None):
                hidden = join_hidden(hidden_globals, hidden, count, box, self._query.device)
            yield Tile(
                self._neighborhood,
                box,
                self._query,
                keys.take(box),
                values.take(box),
                hidden,
                self._scratch,
            )
