"""How the flex provider lays tokens out: in tiles of 128, with the lists of tiles that see each other.

Tokens are taken part by part, and a grid box by box (*tile order*): rows of queries and rows of keys,
the same where the sequences are. What limits a row's keys is in tables of a few numbers per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gna_compile.geometry import AttentionPattern, canonical
from gna_compile.providers.flex.boxes import TILE
from gna_compile.providers.flex.columns import Column, Links, columns_of
from gna_compile.providers.flex.lists import TileLists, tile_lists
from gna_compile.providers.flex.parts import Part, parts_of
from gna_compile.providers.flex.sights import sights_of

__all__ = ["TILE", "Layout", "Rows", "lay_out"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A sequence in tile order.

    Attributes:
        order: int32 [rows], the token of each row; -1 for padding.
        rows: int32 [tokens], the row of each token.
    """

    order: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Tile order and mask of one pattern, with tensors on the CPU.

    Attributes:
        queries: the query sequence.
        keys: the key sequence; the same object if it has the same order.
        key_tiles: for each query tile its key tiles.
        query_tiles: for each key tile its query tiles.
        columns: what limits the keys that a query sees.
        links: bool [key rows], which keys no column limits, or what the parts see of each other.
        global_key: int32 [key rows], which column of the key mask a row has; -1 for others.
    """

    queries: Rows
    keys: Rows
    key_tiles: TileLists
    query_tiles: TileLists
    columns: tuple[Column, ...]
    links: Tensor | Links
    global_key: Tensor


def lay_out(pattern: AttentionPattern, hides_keys: bool = False) -> Layout:
    """Cuts and lists.

    Args:
        pattern: any, of one head group.
        hides_keys: whether a key mask may hide global keys.
    """
    pattern = canonical(pattern)
    of_segments = sights_of(pattern)
    query_parts, key_parts = parts_of(pattern, of_segments)
    sights = [
        [of_segments[part.segment][other.segment] for other in key_parts] for part in query_parts
    ]
    queries, keys = _rows(query_parts), _rows(key_parts)
    if torch.equal(queries.order, keys.order):
        keys = queries
    columns, links = columns_of(query_parts, key_parts, sights)
    return Layout(
        queries,
        keys,
        *tile_lists(query_parts, key_parts, sights, hides_keys),
        tuple(columns),
        links,
        _global_key(key_parts, pattern.key_tokens),
    )


def _rows(parts: Sequence[Part]) -> Rows:
    order = torch.cat([part.tokens for part in parts])
    is_token = order >= 0
    rows = torch.empty(int(is_token.sum()), dtype=torch.int64)
    rows[order[is_token]] = is_token.nonzero().flatten()
    return Rows(order.int(), rows.int())


def _global_key(parts: Sequence[Part], tokens: int) -> Tensor:
    """The global keys are the columns of the key mask in their order in the sequence."""
    are_global = torch.zeros(tokens, dtype=torch.int64)
    for part in parts:
        if part.are_global:
            are_global[part.tokens[part.tokens >= 0]] = 1
    column = torch.where(are_global > 0, are_global.cumsum(0) - 1, -1)
    rows = [column[part.tokens.clamp(min=0)].masked_fill(part.tokens < 0, -1) for part in parts]
    return torch.cat(rows).int()
