"""The coordinates of an attention's operands by batch row and token, and whether they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from gna_compile.graph.tokens.cells import (
    NONE,
    UNKNOWN,
    Cells,
    Source,
    Tokens,
    is_mixture,
    reshaped,
)
from gna_compile.graph.tokens.position_ids import are_places

Relation = Literal["self", "cross", "unknown"]

_MOST_PATTERNS = 8


@dataclass(frozen=True, eq=False)
class Lines:
    """The coordinates of a source at a site: for each axis, its patterns [rows, tokens].

    An axis that only tells channels apart has no pattern; one that differs between channels (a
    table of positions: rows in some, columns in others) has several.
    """

    source: Source
    axes: tuple[tuple[Cells, ...], ...]
    columns: frozenset[int] | None = None
    """Which columns of position ids are there; None for all of them."""
    mixed: frozenset[int] = frozenset()
    """The axes along which cells were mixed, channels and batch left out."""

    def varies(self) -> bool:
        """Whether the source tells tokens of one row apart."""
        return any(pattern.shape[1] > 1 for axis in self.axes for pattern in axis)


Rows = dict[Source, Lines]


def is_own(lines: Lines) -> bool:
    return lines.source.kind != "table" and lines.varies()


def heads_are_rows(tokens: Tokens) -> bool:
    """Whether the tokens of one head are others than those of the next."""
    return len(tokens.shape) > 3 and any(
        array is not None
        and array.shape[-3] > 1
        and (array.shape[-1] == 1 or (source.kind != "table" and not _may_be_channels(source, i)))
        for source, axes in tokens.cells.items()
        for i, array in enumerate(axes)
    )


def _mixed(source: Source, axes: Sequence[Cells | None]) -> frozenset[int]:
    rank = len(source.extents)
    channels = source.channels
    if channels is None:
        channels = 1 if source.is_image else rank - 1
    lost = {i for i, array in enumerate(axes) if is_mixture(array) and source.extents[i] > 1}
    return frozenset(lost - {0, channels})


def _columns(array: Cells | None) -> frozenset[int] | None:
    """The coordinates along the last axis of position ids."""
    if array is None:
        return None
    return (
        frozenset()
        if (array <= UNKNOWN).any()
        else frozenset(map(int, np.unique(array[array > NONE])))
    )


def _may_be_channels(source: Source, axis: int) -> bool:
    return axis in (source.channels, len(source.extents) - 1)


def _hides_rows(array: Cells) -> bool:
    """Whether what tells channels and heads apart may be frames: some of it is unknown."""
    return array.shape[-1] > 1 and bool((array <= UNKNOWN).any())


def rows_of(tokens: Tokens, heads_are_rows: bool) -> Rows:
    shape = tokens.shape
    rank = len(shape)
    channels = [rank - 1, *([rank - 3] if rank > 3 and not heads_are_rows else [])]
    found: Rows = {}
    for source, axes in tokens.cells.items():
        lines = Lines(
            source,
            tuple(
                ()
                if array is None
                else _patterns(
                    source,
                    i,
                    array,
                    shape,
                    channels,
                    not _may_be_channels(source, i) and (heads_are_rows or _hides_rows(array)),
                )
                for i, array in enumerate(axes)
            ),
            None if source.values is None else _columns(axes[-1]),
            _mixed(source, axes),
        )
        if any(lines.axes):
            found[source] = lines
    return found


def _patterns(
    source: Source,
    axis: int,
    array: Cells,
    shape: tuple[int, ...],
    channels: Sequence[int],
    by_heads: bool,
) -> tuple[Cells, ...]:
    """What an axis' coordinates are at the tokens; `by_heads`: they may differ from head to head.

    What differs between channels alone is summed by the attention: a mixture, as any other sum.
    """
    rank = len(shape)
    others = [d for d in range(rank) if d not in channels]
    if any(array.shape[d] > 1 for d in channels):
        alone = [d for d in others if d != rank - 3 or by_heads]
        if all(array.shape[d] == 1 for d in alone) and array.shape[-1] > 1:
            rows = array.reshape(-1, *array.shape[-2:]) if rank == 3 else array[None]
            return _mixtures(source, axis, rows)  # it tells channels apart, and heads at most
        apart = array.transpose([*others, *channels])
        columns = apart.reshape(*apart.shape[: len(others)], -1)
        known = columns > NONE
        along = tuple(range(len(others)))
        high = columns.max(along)
        if (high == np.where(known, columns, np.int32(2**30)).min(along)).all() and not (
            columns <= UNKNOWN
        ).any():
            return _mixtures(source, axis, columns[None])  # the same for all tokens that have it
        change = (columns[..., 1:] != columns[..., :-1]).any(along)
        picks = [0, *(np.nonzero(change)[0] + 1)]
        distinct: list[Cells] = []
        for i in picks:
            column = columns[..., i]
            if not (column == NONE).all() and not any((column == d).all() for d in distinct):
                distinct.append(column)
            if len(distinct) > _MOST_PATTERNS:
                return (np.full((1, 1), UNKNOWN),)
        kept = tuple(distinct)
    else:
        kept = (array.squeeze(tuple(channels)),)
    outer = tuple(shape[d] for d in others)
    flat = (prod(outer[:-1]), outer[-1])
    return tuple(reshaped(pattern, outer, flat) for pattern in kept)


def _mixtures(source: Source, axis: int, rows: Cells) -> tuple[Cells, ...]:
    """The pattern of cells that are summed, row by row; none where all of them are."""
    numbers = [source.mixture(axis, row) for row in rows]
    if all(number is None for number in numbers):
        return ()
    return (np.array([[NONE if number is None else number] for number in numbers], np.int32),)


def is_summed(axis: Sequence[Cells]) -> bool:
    """Whether the coordinates of an axis, as `Lines` have them, are mixtures alone, or none."""
    return all(bool((pattern <= UNKNOWN).all()) for pattern in axis)


def relation_of(q: Rows, k: Rows, v: Rows, query: Tokens, key: Tokens) -> Relation:
    if query.shape[-2] != key.shape[-2]:
        return "cross"
    own = [source for source, lines in v.items() if is_own(lines)]
    if not own:
        return "unknown"
    extra = [
        source
        for rows in (q, k)
        for source, lines in rows.items()
        if source not in v and source.kind != "table" and lines.varies()
    ]
    answers = {_compare(rows.get(source), v[source]) for source in own for rows in (q, k)}
    # What is beside the tokens (positions) must be alike as far as it tells tokens apart.
    answers |= {_compare(_varying(q.get(source)), _varying(k.get(source))) for source in extra}
    return next((a for a in ("cross", "unknown") if a in answers), "self")


def _varying(lines: Lines | None) -> Lines | None:
    if lines is None:
        return None
    axes = tuple(a if any(p.shape[1] > 1 for p in a) else () for a in lines.axes)
    return replace(lines, axes=axes)


def _compare(one: Lines | None, other: Lines | None) -> Relation:
    if one is None or other is None:
        lines = one or other
        assert lines is not None
        source = lines.source
        # Two inputs may hold the same tokens; two images, or results of two stems, do not.
        is_plain = source.kind != "stem" and not source.spatial
        return "unknown" if is_plain else "cross"
    for ours, theirs in zip(one.axes, other.axes, strict=True):
        patterns = (*ours, *theirs)
        if any((pattern == UNKNOWN).any() for pattern in patterns):
            return "unknown"
        if len(ours) != len(theirs) or not all(
            bool((a == b).all()) for a, b in zip(ours, theirs, strict=True)
        ):
            return "unknown" if one.source.kind == "opaque" else "cross"
    return "self"


def presence(lines: Lines, n: int) -> npt.NDArray[np.int8]:
    """For each token 1 if the source stands behind it, 2 if in some rows of the batch only.

    Where only the batch row is known all tokens of the row were summed: that is none of them.
    """
    mask = np.zeros(n, np.int8)
    axes = lines.axes
    if len(axes) > 2 and any(p.shape[1] > 1 for axis in axes[1:] for p in axis):
        axes = axes[1:]
    for axis in axes:
        for pattern in axis:
            if pattern.shape[1] > 1:
                known = pattern != NONE
                here = np.where(known.all(0), 1, np.where(known.any(0), 2, 0))
                mask = np.maximum(mask, here).astype(np.int8)
            elif (pattern == UNKNOWN).any():
                mask = np.maximum(mask, 1).astype(np.int8)
    return mask


def is_lattice(lines: Lines) -> bool:
    """Whether a source's tokens lie on axes of space, in whatever order."""
    source = lines.source
    if source.kind == "stem":
        return True
    if source.kind == "opaque":
        return any(r.is_image or len(r.spatial) > 1 or is_plane(r) for r in source.all_roots)
    there = {i for i, axis in enumerate(lines.axes) if not is_summed(axis)}
    return len(source.spatial & there) > 1 or (len(source.extents) > 3 and len(there - {0}) > 1)


def is_plane(source: Source) -> bool:
    """Whether a source is position ids of places, which do not merely enumerate as those of text."""
    return source.values is not None and are_places(source.values)
