"""The tokens of a sequence in tile order: parts, each in tiles of its own.

A part is a grid that a window limits, cut into equal boxes of 128 tokens that are taken one after
another, on a dilated axis within one dilation group. Or it is all tokens off such grids that see, or
are seen, alike. Rows left over in the last tile of a part, or at the edges of a grid, are padding.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gna_compile.geometry import AttentionPattern, GlobalTokens, Segment
from gna_compile.geometry.segments import ranges_of
from gna_compile.providers.flex.boxes import TILE, Cuts, cuts_of
from gna_compile.providers.flex.sights import Sights


@dataclass(frozen=True, eq=False)
class Part:
    """Some tokens of a sequence, in tiles of their own.

    Args:
        segment: one of the segments that are in it; they see, and are seen, alike.
        tokens: int64 [rows], which token each row holds; -1 for padding.
        are_global: whether a key mask may hide them.
        cuts: of the grid, if a window limits it; else none.
    """

    segment: int
    tokens: Tensor
    are_global: bool
    cuts: Cuts = ()

    @property
    def tiles(self) -> int:
        return len(self.tokens) // TILE

    @property
    def whole(self) -> Tensor:
        """Whether a tile has no padding, bool [tiles]."""
        return (self.tokens.view(-1, TILE) >= 0).all(dim=1)

    def spread(self, number: int, table: Tensor, padding: int) -> Tensor:
        """What a table [runs, extent] says of one axis, for every row."""
        return _spread(self.cuts, number, table).masked_fill(self.tokens < 0, padding)


def parts_of(
    pattern: AttentionPattern, sights: Sights
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of the queries and those of the keys; tokens off the grids come first.

    Args:
        pattern: in its canonical form, of one head group.
        sights: what its query segments see of its key segments.
    """
    queries: dict[Hashable, list[int]] = {}
    query_grids = {}
    for number, row in enumerate(sights):
        if any(row):
            limited = [(number, key) for key, sight in enumerate(row) if sight]
            query_grids[number] = cuts_of(pattern, sights, limited)[0]
        else:
            queries.setdefault(tuple(row), []).append(number)
    keys: dict[Hashable, list[int]] = {}
    key_grids = {}
    for number, column in enumerate(zip(*sights, strict=True)):
        if any(column):
            limited = [(query, number) for query, sight in enumerate(column) if sight]
            key_grids[number] = cuts_of(pattern, sights, limited)[1]
        else:
            are_global = isinstance(pattern.keys[number], GlobalTokens)
            keys.setdefault((column, are_global), []).append(number)
    return (
        _parts(pattern.queries, list(queries.values()), query_grids),
        _parts(pattern.keys, list(keys.values()), key_grids),
    )


def _parts(
    segments: Sequence[Segment],
    groups: Sequence[Sequence[int]],
    grids: dict[int, Cuts],
) -> tuple[Part, ...]:
    places = list(ranges_of(segments))
    parts = []
    for numbers in groups:
        tokens = torch.cat([torch.arange(places[n].start, places[n].stop) for n in numbers])
        rows = torch.nn.functional.pad(tokens, (0, -len(tokens) % TILE), value=-1)
        first = numbers[0]
        parts.append(Part(first, rows, isinstance(segments[first], GlobalTokens)))
    for number, cuts in grids.items():
        parts.append(Part(number, _grid_rows(places[number].start, cuts), False, cuts))
    return tuple(parts)


def _grid_rows(start: int, cuts: Cuts) -> Tensor:
    """The token of each row, int64; -1 for padding."""
    tokens, empty, stride = torch.tensor(start), torch.tensor(False), 1
    for number in reversed(range(len(cuts))):
        at = _tiled(cuts, number, cuts[number].coordinates)
        tokens = tokens + (at - cuts[number].box.start) * stride
        empty = empty | (at < 0)
        stride *= len(cuts[number].box)
    return tokens.masked_fill(empty, -1).flatten()


def _tiled(cuts: Cuts, number: int, table: Tensor) -> Tensor:
    """A table [runs, extent] of one axis, to be broadcast to [runs..., extents...]."""
    shape = [1] * (2 * len(cuts))
    shape[number], shape[len(cuts) + number] = table.shape
    return table.reshape(shape)


def _spread(cuts: Cuts, number: int, table: Tensor) -> Tensor:
    shape = [*(cut.runs for cut in cuts), *(cut.extent for cut in cuts)]
    return _tiled(cuts, number, table).expand(shape).flatten()
