"""The walk over a problem: parts of the batch and of the heads, and the tiles of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gna_compile.geometry import GlobalTokens
from gna_compile.geometry.segments import ranges_of
from gna_compile.providers.portable import tile_tensors
from gna_compile.providers.portable.cuts import cut_grid
from gna_compile.providers.portable.masks import AxisMasks, join_hidden
from gna_compile.providers.portable.pieces import Piece, pieces_of
from gna_compile.providers.portable.places import Place
from gna_compile.providers.portable.tile_tensors import Gather, Scratch, Tile
from gna_compile.providers.portable.tiles import AxisTile
from gna_compile.providers.problem import Inputs, Problem


@dataclass(frozen=True)
class Part:
    batch: slice
    kv_heads: slice


@lru_cache(maxsize=256)
def _pieces(problem: Problem) -> tuple[Piece, ...]:
    # A problem knows its hash, a pattern computes it every time.
    return pieces_of(problem.pattern)


def parts(problem: Problem) -> Iterator[Part]:
    """Splits batch and heads so that a tile's buffers fit the workspace."""
    of_pieces = [_head_bytes(problem, piece) for piece in _pieces(problem)]
    head_bytes, mask_bytes = map(max, zip(*of_pieces, strict=True))
    batch_bytes = head_bytes * problem.kv_heads + mask_bytes
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


def _head_bytes(problem: Problem, piece: Piece) -> tuple[int, int]:
    """What a tile's buffers take for one head, and its mask for one batch entry if there is one each."""
    group = problem.heads // problem.kv_heads
    # Key, value, their gradients; query, output, their gradients; fp32 is 4 bytes.
    token_bytes = 4 * 4 * problem.head_dim
    if not piece.axes:
        # One range of keys is not copied, and scores come in chunks.
        copied = piece.linked_keys if len(piece.linked) > 1 else 0
        return token_bytes * (group * piece.query_tokens + copied), 0
    cut = cut_grid(piece, group)
    rows, keys = group * cut.max_queries, cut.max_keys + piece.linked_keys
    head_bytes = token_bytes * (rows + keys)
    if problem.device != "cpu":
        # A few blocks of scores: the exact way holds them whole.
        head_bytes += 4 * 4 * rows * keys
    return head_bytes, 4 * rows * keys if problem.has_key_mask else 0


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
        self._problem = problem
        self._part = part
        self._scratch = scratch
        self._group = problem.heads // problem.kv_heads
        self._query = self.of_query(inputs.query)
        self._key = self.of_key(inputs.key)
        self._value = self.of_key(inputs.value)
        self._hidden_keys: Tensor | None = None
        if inputs.key_mask is not None and problem.pattern.global_keys:
            self._hidden_keys = self._hidden(inputs.key_mask[part.batch])

    def of_query(self, tensor: Tensor) -> Tensor:
        grouped = tensor.unflatten(1, (self._problem.kv_heads, self._group))
        return grouped[self._part.batch, self._part.kv_heads]

    def of_key(self, tensor: Tensor) -> Tensor:
        return tensor[self._part.batch, self._part.kv_heads]

    def tiles(self) -> Iterator[Tile]:
        """All tiles; each query is in exactly one. A tile is valid until the next one."""
        for piece in _pieces(self._problem):
            yield from self._piece_tiles(piece)

    def _hidden(self, key_mask: Tensor) -> Tensor:
        """Bool [batch, 1, 1, key tokens]: what the key mask [batch, global keys] hides."""
        pattern = self._problem.pattern
        hidden = key_mask.new_zeros(key_mask.shape[0], 1, 1, pattern.key_tokens)
        column = 0
        for segment, place in zip(pattern.keys, ranges_of(pattern.keys), strict=True):
            if isinstance(segment, GlobalTokens):
                shown = key_mask[:, None, None, column : column + segment.tokens]
                torch.logical_not(shown, out=hidden[..., place.start : place.stop])
                column += segment.tokens
        return hidden

    def _piece_tiles(self, piece: Piece) -> Iterator[Tile]:
        cut = cut_grid(piece, self._group)
        linked = [Place.of_range(keys) for keys in piece.linked]
        hidden = self._hidden_linked(piece)
        longest = piece.linked_keys + cut.max_keys
        keys, values = (
            Gather(name, tensor, linked, longest, hidden, self._scratch)
            for name, tensor in (("key", self._key), ("value", self._value))
        )
        masks = AxisMasks(self._query.device)
        rows = [Place.of_range(queries) for queries in piece.queries]
        for box in itertools.product(*cut.axes):
            if box:
                rows = [Place.of_box(piece.grid, [tile.tokens for tile in box])]
            numbers, boxes = _key_boxes(piece, box)
            yield Tile(
                rows,
                linked + boxes,
                self._query,
                keys.take(boxes),
                values.take(boxes),
                self._hidden_in(piece, box, numbers, hidden, masks),
                piece.may_be_blind,
                self._scratch,
            )

    def _hidden_linked(self, piece: Piece) -> Tensor | None:
        """What the key mask hides of the keys that all queries see."""
        if self._hidden_keys is None or not piece.sees_globals:
            return None
        parts = [self._hidden_keys[..., keys.start : keys.stop] for keys in piece.linked]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    def _hidden_in(
        self,
        piece: Piece,
        box: tuple[AxisTile, ...],
        numbers: Sequence[int],
        hidden_linked: Tensor | None,
        masks: AxisMasks,
    ) -> Tensor | None:
        """What is hidden among all keys of a tile, which has keys of the key grids `numbers`."""
        joined = [(hidden_linked, piece.linked_keys)] if piece.linked else []
        for number in numbers:
            hidden = masks.hidden(box, number)
            if hidden is not None:
                hidden = hidden.repeat(self._group, 1)[None, None]
            joined.append((hidden, math.prod(len(tile.keys[number].tokens) for tile in box)))
        return join_hidden(joined, self._query.device)


def _key_boxes(piece: Piece, box: tuple[AxisTile, ...]) -> tuple[list[int], list[Place]]:
    """The key grids that a tile sees keys of, and where these lie."""
    numbers, boxes = [], []
    for number, grid in enumerate(piece.key_grids):
        tokens = [tile.keys[number].tokens for tile in box]
        if all(tokens):
            numbers.append(number)
            boxes.append(Place.of_box(grid, tokens))
    return numbers, boxes
