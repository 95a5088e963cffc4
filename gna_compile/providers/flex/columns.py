"""What the mask of a kernel is made of: a few numbers for each row of queries and of keys.

A *column* is an axis of the grids under one dilation: a position for each key, and a range of
positions for each query. A query sees a key iff the key lies within its range in every column, but
for the columns that do not limit this part of the keys for this part of the queries. Which those
are, the mask knows in one of two ways:

- The same for all queries that a column limits, and all parts are linked: `shown` marks the keys that
  no column limits. So it is where there is one grid, with global tokens or without.
- Any other way: a table of links says it for each pair of parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gna_compile.geometry import AttentionPattern, Axis
from gna_compile.providers.flex.cuts import windows
from gna_compile.providers.flex.parts import Part
from gna_compile.providers.flex.sights import Sight, Sights

MOST_COLUMNS = 30  # the bits of a link
_EVERYWHERE = 2**31 - 1  # past any position


class Column(NamedTuple):
    """One axis under one dilation.

    Attributes:
        position: int32 [key rows]; -1 where no grid's token is.
        first, stop: int32 [query rows], the positions that a query sees: all where it is not limited,
            none for padding.
    """

    position: Tensor
    first: Tensor
    stop: Tensor


class Links(NamedTuple):
    """What each part of the queries sees of each part of the keys.

    Attributes:
        query_part: int32 [query rows].
        key_part: int32 [key rows]; the last one of the table for padding, which nobody sees.
        table: int32 [query parts, key parts], sizes that are powers of two. Bit n: column n does not
            limit these keys. The bit after the last column: the parts are linked.
    """

    query_part: Tensor
    key_part: Tensor
    table: Tensor


_Name = tuple[int, int]
"""Which axis, and which dilation."""


def columns_of(
    queries: Sequence[Part], keys: Sequence[Part], sights: Sights
) -> tuple[list[Column], Tensor | Links]:
    """The columns, and `shown` or the links.

    Args:
        queries: the parts of the queries.
        keys: the parts of the keys.
        sights: what each part of the queries sees of each part of the keys.

    Returns:
        the columns, and bool [key rows], which keys no column limits, or the links.
    """
    names = sorted({name for row in sights for sight in row for name in _names(sight)})
    unlimited = _unlimited_parts(sights, names)
    columns = []
    for name in names:
        first, stop = zip(
            *(_range(part, row, name) for part, row in zip(queries, sights, strict=True)),
            strict=True,
        )
        position = [
            _position(part, name, shown=unlimited is not None and number in unlimited)
            for number, part in enumerate(keys)
        ]
        columns.append(Column(*(torch.cat(parts).int() for parts in (position, first, stop))))
    if unlimited is None:
        return columns, _links(queries, keys, sights, names)
    shown = [(part.tokens >= 0) & (number in unlimited) for number, part in enumerate(keys)]
    return columns, torch.cat(shown)


def most_columns(pattern: AttentionPattern) -> int:
    """How many columns there are at most."""
    windows_of = pattern.head_groups[0].windows
    if 3 * len(windows_of) <= MOST_COLUMNS:
        return 3 * len(windows_of)
    return len({name for window in windows_of if window for name in enumerate(window.dilation)})


def _names(sight: Sight) -> Iterable[_Name]:
    """The columns that limit the keys."""
    return [(number, axis.dilation) for number, axis in enumerate(sight or ()) if axis is not None]


def _unlimited_parts(sights: Sights, names: Sequence[_Name]) -> frozenset[int] | None:
    """The parts of the keys that no column limits; None if that depends on the queries."""
    if any(sight is None for row in sights for sight in row):
        return None
    found = set()
    for row in sights:
        for name in names:
            limited = {key for key, sight in enumerate(row) if name in _names(sight)}
            if limited:
                found.add(frozenset(range(len(row))) - limited)
    if not found:
        return frozenset(range(len(sights[0])))
    return found.pop() if len(found) == 1 else None


def _range(part: Part, row: Sequence[Sight], name: _Name) -> tuple[Tensor, Tensor]:
    """First and stop of the positions that the queries of a part see."""
    number, _ = name
    axes: set[Axis | None] = {sight[number] for sight in row if sight and name in _names(sight)}
    if not axes:
        is_token = part.tokens >= 0
        return torch.zeros_like(part.tokens), is_token * _EVERYWHERE
    (axis,) = axes
    assert axis is not None
    first, stop = windows(axis)[:, part.cuts[number].coordinates]
    return part.spread(number, first, padding=0), part.spread(number, stop, padding=0)


def _position(part: Part, name: _Name, shown: bool) -> Tensor:
    number, dilation = name
    if shown or number >= len(part.cuts):
        return torch.full_like(part.tokens, -1)
    return part.spread(number, part.cuts[number].positions(dilation), padding=-1)


def _links(
    queries: Sequence[Part], keys: Sequence[Part], sights: Sights, names: Sequence[_Name]
) -> Links:
    table = torch.zeros(
        _power_of_two(len(queries)), _power_of_two(len(keys) + 1), dtype=torch.int32
    )
    linked = 1 << len(names)
    for query, row in enumerate(sights):
        for key, sight in enumerate(row):
            if sight is not None:
                limiting = _names(sight)
                free = sum(1 << bit for bit, name in enumerate(names) if name not in limiting)
                table[query, key] = linked + free
    query_part = torch.cat([torch.full_like(part.tokens, n) for n, part in enumerate(queries)])
    key_part = torch.cat(
        [
            torch.full_like(part.tokens, n).masked_fill(part.tokens < 0, table.shape[1] - 1)
            for n, part in enumerate(keys)
        ]
    )
    return Links(query_part.int(), key_part.int(), table)


def _power_of_two(count: int) -> int:
    """The next one, so that similar problems share a kernel."""
    return 1 << (count - 1).bit_length()
