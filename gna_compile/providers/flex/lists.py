"""Which tiles see each other: for each tile a list, as wide as the longest of them.

The mask is separable, so what the tiles of two grids visit is a product over the axes. The work is in
proportion to tokens and visited tiles; where a tile sees all others, so is the width of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gna_compile.providers.flex.cuts import reach
from gna_compile.providers.flex.parts import Part
from gna_compile.providers.flex.sights import Sight, Sights


@dataclass(frozen=True)
class TileLists:
    """For each tile the tiles that it meets, split into those that need a mask and those that do not.

    Attributes:
        masked_counts, whole_counts: int32 [tiles], how many there are.
        masked, whole: int32 [tiles, width], which; the first `count` entries of a row are valid.
    """

    masked_counts: Tensor
    masked: Tensor
    whole_counts: Tensor
    whole: Tensor


_Pairs = tuple[Tensor, Tensor, Tensor]
"""Query tile, key tile, and whether it is a full block."""


def tile_lists(
    queries: Sequence[Part],
    keys: Sequence[Part],
    sights: Sights,
    hides_keys: bool,
) -> tuple[TileLists, TileLists]:
    """Key tiles of each query tile, and query tiles of each key tile.

    Args:
        queries: the parts of the queries.
        keys: the parts of the keys.
        sights: what each part of the queries sees of each part of the keys.
        hides_keys: whether a key mask may hide global keys.
    """
    listed: list[_Pairs] = []
    query_tile = 0
    for part, row in zip(queries, sights, strict=True):
        key_tile = 0
        for other, sight in zip(keys, row, strict=True):
            if sight is not None:
                of_queries, of_keys, full = _pairs(part, other, sight)
                if hides_keys and other.are_global:
                    full = torch.zeros_like(full)
                listed.append((of_queries + query_tile, of_keys + key_tile, full))
            key_tile += other.tiles
        query_tile += part.tiles
    none = torch.zeros(0, dtype=torch.int64)
    listed.append((none, none, none > 0))
    of_queries, of_keys, full = (torch.cat(column) for column in zip(*listed, strict=True))
    query_tiles, key_tiles = (sum(part.tiles for part in parts) for parts in (queries, keys))
    return (
        _lists(of_queries, of_keys, full, query_tiles, key_tiles),
        _lists(of_keys, of_queries, full, key_tiles, query_tiles),
    )


def _pairs(queries: Part, keys: Part, sight: Sight) -> _Pairs:
    """The product of what the axes visit; all pairs if no axis hides keys."""
    if not sight:
        of_queries = torch.arange(queries.tiles).repeat_interleave(keys.tiles)
        of_keys = torch.arange(keys.tiles).repeat(queries.tiles)
        return of_queries, of_keys, keys.whole[of_keys]
    of_queries = of_keys = torch.zeros(1, dtype=torch.int64)
    full = torch.ones(1, dtype=torch.bool)
    for axis, query_cut, key_cut in zip(sight, queries.cuts, keys.cuts, strict=True):
        query_run, key_run, is_full = reach(axis, query_cut, key_cut).pairs()
        of_queries = (of_queries[:, None] * query_cut.runs + query_run).flatten()
        of_keys = (of_keys[:, None] * key_cut.runs + key_run).flatten()
        full = (full[:, None] & is_full).flatten()
    return of_queries, of_keys, full


def _lists(rows: Tensor, entries: Tensor, full: Tensor, tiles: int, most: int) -> TileLists:
    """The entries of each of `tiles` rows, at most `most` of them."""
    sorting = (rows * most + entries).argsort()
    rows, entries, full = rows[sorting], entries[sorting], full[sorting]
    counts = [rows[kind].bincount(minlength=tiles) for kind in (~full, full)]
    # Both lists of one width: torch 2.11 reads the second by the strides of the first. A power of
    # two, so that similar problems share a kernel.
    longest = max(int(count.max()) for count in counts)
    width = min(1 << max(longest - 1, 0).bit_length(), most)
    lists = []
    for kind, count in zip((~full, full), counts, strict=True):
        starts = count.cumsum(0) - count
        place = torch.arange(int(count.sum())) - starts[rows[kind]]
        indices = torch.zeros(tiles, width, dtype=torch.int32)
        indices[rows[kind], place] = entries[kind].int()
        lists += [count.int(), indices]
    return TileLists(*lists)
