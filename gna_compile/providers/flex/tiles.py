"""How the flex provider lays tokens out: in tiles of 128, with the lists of tiles that see each other.

The grid is cut into equal boxes of 128 tokens, on a dilated axis within one dilation group, and
tokens are taken box by box (*tile order*). Global tokens come first, in tiles of their own; rows
left over at the edges are padding. Queries and keys share this order.

The mask is separable, and so is everything here: each axis is cut on its own, and what the grid
needs is a product over the axes. The work is in proportion to tokens and visited tiles; the lists
are as wide as the longest of them, and with global tokens one list holds all tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gna_compile.geometry import Axis, Neighborhood
from gna_compile.planner.counts import Box, axis_counts
from gna_compile.planner.search import boxes

TILE = 128

_MASK = 1.0  # what a mask adds to the cost of a tile: a guess
_EVERYWHERE = 2**31 - 1  # past any position


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


@dataclass(frozen=True)
class Layout:
    """Tile order and mask of one neighborhood, with tensors on the CPU.

    A query row sees a key row iff on every axis that hides anything the key's position lies within
    the query's first .. stop - 1, or if the key is global. Positions count group by group of a
    dilated axis, so that a window is a range.

    Attributes:
        box: tokens of a tile along each axis of the merged neighborhood.
        order: int32 [rows], the token of each row; -1 for padding.
        rows: int32 [tokens], the row of each token.
        global_key: int32 [rows], which global token a row holds, prefix first; -1 for others.
        position: per axis int32 [rows]; -1 where the row is no token of the grid.
        first, stop: per axis int32 [rows], the keys that a query sees.
        keys: for each query tile its key tiles.
        queries: for each key tile its query tiles.
    """

    box: Box
    order: Tensor
    rows: Tensor
    global_key: Tensor
    position: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    stop: tuple[Tensor, ...]
    keys: TileLists
    queries: TileLists


@lru_cache(maxsize=1024)
def choose_box(neighborhood: Neighborhood) -> Box:
    """The box of power-of-two extents whose tiles cost the least; for a merged neighborhood."""

    def cost(box: Box) -> float:
        counts = [
            axis_counts(axis, extent, extent, "static")
            for axis, extent in zip(neighborhood.axes, box, strict=True)
        ]
        visited = math.prod(count.visited for count in counts)
        full = math.prod(count.full for count in counts)
        tiles = math.prod(count.query_tiles for count in counts)
        global_tiles = -(-neighborhood.global_tokens // TILE)
        return visited + _MASK * (visited - full) + 2 * tiles * global_tiles

    return min(boxes(TILE, len(neighborhood.axes)), key=cost)


def lay_out(neighborhood: Neighborhood, hides_keys: bool = False) -> Layout:
    """Cuts and lists; `hides_keys` if a key mask may hide global keys."""
    neighborhood = neighborhood.merged
    box = choose_box(neighborhood)
    cuts = [_Cut(axis, extent) for axis, extent in zip(neighborhood.axes, box, strict=True)]
    global_rows = -(-neighborhood.global_tokens // TILE) * TILE
    order = _order(neighborhood, cuts, global_rows)
    on_grid = (order >= 0) & (torch.arange(len(order)) >= global_rows)
    global_key = torch.full_like(order, -1)
    global_key[: neighborhood.global_tokens] = torch.arange(neighborhood.global_tokens)
    rows = torch.empty(neighborhood.tokens, dtype=torch.int64)
    rows[order[order >= 0]] = (order >= 0).nonzero().flatten()
    # A row that is off the grid is so by its position on any axis, so full axes hide nothing more.
    hiding = [i for i, axis in enumerate(neighborhood.axes) if not axis.is_full] or [0]

    def tables(values: Sequence[Tensor], of_globals: int, of_padding: int) -> tuple[Tensor, ...]:
        columns = []
        for index in hiding:
            column = torch.full_like(order, of_padding)
            column[: neighborhood.global_tokens] = of_globals
            on_this = _spread(values, index)
            column[global_rows:] = on_this.where(on_grid[global_rows:], of_padding)
            columns.append(column.int())
        return tuple(columns)

    keys, queries = _tile_lists(cuts, order, global_rows // TILE, hides_keys)
    return Layout(
        box,
        order.int(),
        rows.int(),
        global_key.int(),
        tables([cut.position for cut in cuts], -1, -1),
        tables([cut.first for cut in cuts], 0, 0),
        tables([cut.stop for cut in cuts], _EVERYWHERE, 0),
        keys,
        queries,
    )


class _Cut:
    """One axis cut into tiles of `extent` slots, each dilation group on its own.

    Attributes:
        token, position, first, stop: int64 [tiles, extent]; token -1 where a slot is empty.
        pairs: int64 [3, n]: a query tile, a key tile that it visits, and whether that needs no mask.
    """

    def __init__(self, axis: Axis, extent: int) -> None:
        length = -(-axis.group(0).length // extent) * extent
        columns: list[Tensor] = []
        pairs: list[Tensor] = []
        done, tiles = 0, 0
        known: dict[int, tuple[Tensor, Tensor]] = {}
        for offset in range(axis.dilation):
            group = axis.group(offset)
            if group.length not in known:
                known[group.length] = _windows(group), _visits(group, extent)
            windows, visits = known[group.length]
            size = -(-group.length // extent) * extent
            column = torch.full((4, size), -1)
            positions = torch.arange(group.length)
            column[0, : group.length] = offset + axis.dilation * positions
            column[1, : group.length] = positions + done
            column[2:, : group.length] = windows + done
            columns.append(column)
            pairs.append(visits + torch.tensor([tiles, tiles, 0])[:, None])
            done += length
            tiles += size // extent
        table = torch.cat(columns, dim=1).unflatten(1, (tiles, extent))
        self.token, self.position, self.first, self.stop = table
        self.pairs = torch.cat(pairs, dim=1)


def _windows(axis: Axis) -> Tensor:
    """First and stop of each query's keys, int64 [2, length]; dilation 1."""
    unions = [axis.union(range(query, query + 1)) for query in range(axis.length)]
    return torch.tensor([(keys.start, keys.stop) for keys in unions]).T


def _visits(axis: Axis, extent: int) -> Tensor:
    """Query tile, key tile and whether it is a full block, int64 [3, visited]; dilation 1."""
    spans = []
    for start in range(0, axis.length, extent):
        queries = range(start, min(start + extent, axis.length))
        union, shared = axis.union(queries), axis.intersection(queries)
        spans.append(
            (
                union.start // extent,
                -(-union.stop // extent),
                -(-shared.start // extent),
                shared.stop // extent,
            )
        )
    first, stop, whole_first, whole_stop = torch.tensor(spans).T
    counts = stop - first
    queries_of = torch.arange(len(spans)).repeat_interleave(counts)
    keys = torch.arange(len(queries_of)) - (counts.cumsum(0) - counts - first)[queries_of]
    full = (keys >= whole_first[queries_of]) & (keys < whole_stop[queries_of])
    return torch.stack([queries_of, keys, full.long()])


def _outer(values: Sequence[Tensor]) -> list[Tensor]:
    """Each one-dimensional tensor along a dimension of its own."""
    return [
        value.view([-1 if dim == index else 1 for dim in range(len(values))])
        for index, value in enumerate(values)
    ]


def _tiled(values: Sequence[Tensor]) -> list[Tensor]:
    """Tables [tiles, extent] of each axis, to be broadcast to [tiles..., extents...]."""
    rank = len(values)
    shaped = []
    for index, value in enumerate(values):
        shape = [1] * (2 * rank)
        shape[index], shape[rank + index] = value.shape
        shaped.append(value.reshape(shape))
    return shaped


def _spread(values: Sequence[Tensor], index: int) -> Tensor:
    """One axis's table for every row of the grid, in tile order."""
    tables = _tiled(values)
    shape = torch.broadcast_shapes(*(table.shape for table in tables))
    return tables[index].expand(shape).flatten()


def _order(neighborhood: Neighborhood, cuts: Sequence[_Cut], global_rows: int) -> Tensor:
    """The token of each row, int64; -1 for padding."""
    order = torch.full((global_rows,), -1)
    tokens = neighborhood.tokens
    suffix = torch.arange(tokens - neighborhood.suffix, tokens)
    order[: neighborhood.prefix] = torch.arange(neighborhood.prefix)
    order[neighborhood.prefix : neighborhood.global_tokens] = suffix
    token, empty = torch.tensor(neighborhood.prefix), torch.tensor(False)
    strides = [math.prod(neighborhood.grid[index + 1 :]) for index in range(len(cuts))]
    for table, stride in zip(_tiled([cut.token for cut in cuts]), strides, strict=True):
        token = token + table * stride
        empty = empty | (table < 0)
    return torch.cat([order, token.masked_fill(empty, -1).flatten()])


def _tile_lists(
    cuts: Sequence[_Cut], order: Tensor, global_tiles: int, hides_keys: bool
) -> tuple[TileLists, TileLists]:
    """Key tiles of each query tile, and query tiles of each key tile."""
    queries = keys = torch.tensor(0)
    full = torch.tensor(1)
    columns = [_outer([cut.pairs[row] for cut in cuts]) for row in range(3)]
    for cut, query, key, is_full in zip(cuts, *columns, strict=True):
        queries = queries * len(cut.token) + query
        keys = keys * len(cut.token) + key
        full = full * is_full
    shape = full.shape
    queries, keys = (x.expand(shape).flatten() + global_tiles for x in (queries, keys))
    full = full.flatten() > 0
    tiles = len(order) // TILE
    if global_tiles:
        # A tile of global queries sees every tile of keys; a tile of the grid sees the global ones.
        whole = (order.view(tiles, TILE) >= 0).all(dim=1)
        if hides_keys:
            whole[:global_tiles] = False
        every, ours = torch.arange(tiles), torch.arange(global_tiles)
        others = every[global_tiles:]
        queries = torch.cat(
            [queries, ours.repeat_interleave(tiles), others.repeat_interleave(global_tiles)]
        )
        seen = torch.cat([every.repeat(global_tiles), ours.repeat(len(others))])
        keys, full = torch.cat([keys, seen]), torch.cat([full, whole[seen]])
    return _lists(queries, keys, full, tiles), _lists(keys, queries, full, tiles)


def _lists(rows: Tensor, entries: Tensor, full: Tensor, tiles: int) -> TileLists:
    sorting = (rows * tiles + entries).argsort()
    rows, entries, full = rows[sorting], entries[sorting], full[sorting]
    counts = [rows[kind].bincount(minlength=tiles) for kind in (~full, full)]
    # Both lists of one width: torch 2.11 reads the second by the strides of the first. A power of
    # two, so that similar problems share a kernel.
    longest = max(int(count.max()) for count in counts)
    width = min(1 << max(longest - 1, 0).bit_length(), tiles)
    lists = []
    for kind, count in zip((~full, full), counts, strict=True):
        starts = count.cumsum(0) - count
        place = torch.arange(int(count.sum())) - starts[rows[kind]]
        indices = torch.zeros(tiles, width, dtype=torch.int32)
        indices[rows[kind], place] = entries[kind].int()
        lists += [count.int(), indices]
    return TileLists(*lists)
