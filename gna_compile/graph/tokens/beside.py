"""What stands beside the tokens of a run: position ids and tables, which may show or deny a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np
import numpy.typing as npt

from gna_compile.graph.tokens.cells import NONE, UNKNOWN, Cells
from gna_compile.graph.tokens.order import Order, raster_of, relative
from gna_compile.graph.tokens.position_ids import (
    ReadIds,
    counting_columns,
    images_in,
    name_of,
    one_grid,
    pieces_together,
    tokens_of,
)
from gna_compile.graph.tokens.rows import Lines, is_plane
from gna_compile.graph.tokens.run import Run, times

MAX_AXES = 3
NO_IMAGE = "the position ids are not the raster of an image"


def shown_beside(
    run: Run, order: Order, start: int, stop: int, beside: Sequence[Lines]
) -> tuple[Run, ...]:
    """The run with the grid that something beside its tokens shows; the runs, if it is several."""
    reads = [read_ids(lines, start, stop) for lines in beside]
    found = list(dict.fromkeys(read for read in reads if read is not None))
    ids = next((lines.source.node for lines in beside if lines.source.values is not None), None)
    if len({read.pieces for read in found}) > 1:
        return (replace(run, doubt="position ids of the same tokens differ", ids=ids),)
    if any(is_partly_placed(lines, start, stop) for lines in beside):
        # All rows in their order, or some of them.
        is_own = any(
            lines.source.values is not None and covers(lines, start, stop) for lines in beside
        )
        doubt = NO_IMAGE if is_own else "position ids are of other tokens, too"
        return (replace(run, doubt=doubt, ids=ids),)
    if found:
        read, *also = found
        run = replace(run, ids=ids, also=tuple(also))
        if not images_in(read.pieces):
            text, *rest = (replace(other, pieces=()) for other in found)
            return (replace(run, doubt=NO_IMAGE, read=text, also=tuple(rest)),)
        why = f"values of {name_of(read.tables[0][0])}"
        image = one_grid(read.pieces)
        if image is not None:
            return (replace(run, grid=image, axes=image, why=why, read=read),)
        if sum(tokens_of(piece) for piece in read.pieces) != run.size:
            return (replace(run, doubt="position ids are those of other sizes"),)
        return tuple(
            replace(run, size=tokens_of(piece), grid=piece, axes=piece, why=why, read=read)
            if isinstance(piece, tuple)
            else replace(run, size=piece, axes=(piece,), read=read)
            for piece in read.pieces
        )
    return (_shown_by_tables(run, order, start, stop, beside),)


def read_ids(lines: Lines, start: int, stop: int) -> ReadIds | None:
    """What position ids show of a run, if each of its tokens has a row of them, one after another.

    All columns that count have to be there, or the model put other positions in their place.
    """
    values, node = lines.source.values, lines.source.node
    if values is None or node is None or is_replaced(lines):
        return None
    axis = len(lines.source.extents) - 2
    patterns = lines.axes[axis]
    if len(patterns) != 1 or patterns[0].shape[1] == 1:
        return None
    part = patterns[0][:, start:stop]
    first, count = int(part[0, 0]), lines.source.extents[axis]
    if first <= NONE or not (part == first + np.arange(stop - start)).all():
        return None
    rows = None if (first, stop - start) == (0, count) else (first, first + stop - start)
    if rows is not None and values.shape[-2] != count:
        return None  # the values are those of other sizes
    pieces = pieces_together([(values, rows)])
    return ReadIds(((node, rows),), pieces) if pieces else None


def covers(lines: Lines, start: int, stop: int) -> bool:
    """Whether the tokens of a run have all rows of position ids, one after another."""
    patterns = lines.axes[len(lines.source.extents) - 2]
    if len(patterns) != 1 or patterns[0].shape[1] == 1:
        return False
    part = patterns[0][:, start:stop]
    count = lines.source.extents[len(lines.source.extents) - 2]
    return stop - start == count and bool((part == np.arange(count)).all())


def on_a_plane(beside: Sequence[Lines], start: int, stop: int) -> bool:
    """Whether tables tell the tokens of a run apart on more than one axis, in whatever order.

    tokens              x0  x1  x2  x3  x4  x5
    channels 0 .. 7      0   0   1   1   0   0     two rows, twice
    channels 8 .. 15     0   1   0   1   2   3     four columns: more places than either counts
    """
    vectors = []
    for lines in beside:
        if lines.source.kind in ("table", "input") and lines.source.values is None:
            patterns = (p for axis in lines.axes for p in axis if p.shape[1] > 1)
            vectors += [p[0, start:stop] for p in patterns if _counts(p[:, start:stop])]
    # One that counts all tokens one by one, as that of text does, is no axis of a plane.
    vectors = [vector for vector in vectors if len(np.unique(np.diff(vector))) > 1]
    if len(vectors) < 2:
        return False
    places = np.stack(vectors)
    return len(np.unique(places, axis=1).T) > max(len(np.unique(row)) for row in places)


def is_replaced(lines: Lines) -> bool:
    """Whether some column of position ids that tells tokens apart is missing."""
    return lines.columns is not None and not counting_columns(lines.source.values) <= lines.columns


def _shown_by_tables(run: Run, order: Order, start: int, stop: int, beside: Sequence[Lines]) -> Run:
    shown: dict[tuple[int, ...], str] = {}
    (axis,) = order.axes
    own = next((lines for lines in beside if lines.source is order.source), None)
    # Of a lattice of several axes the tokens are a line.
    is_flat = own is not None and not any(a for i, a in enumerate(own.axes) if i not in (0, axis))
    if is_flat and order.source.kind != "opaque":
        grid = grid_of_tables(beside, start, stop)
        if grid is not None:
            shown[grid] = "graph: a table of positions"
        if run.size == order.source.extents[axis]:
            for split in order.source.splits.get(axis, ()):
                shown.setdefault(split, "graph: reshape")
    if len(shown) > 1:
        both = " and as ".join(sorted(map(times, shown)))
        return replace(run, doubt=f"the tokens are used as {both}")
    for grid, why in shown.items():
        return replace(run, grid=grid, why=why)
    return run


def is_partly_placed(lines: Lines, start: int, stop: int) -> bool:
    """Whether position ids of places stand beside a run that are not its own, one for each token."""
    if not is_plane(lines.source) or read_ids(lines, start, stop) is not None:
        return False
    return any(
        (p[:, start:stop] > NONE).any() for axis in lines.axes for p in axis if p.shape[1] > 1
    )


def grid_of_tables(beside: Sequence[Lines], start: int, stop: int) -> tuple[int, ...] | None:
    """The grid that counted positions show: rows in one table, columns in another.

    tokens              x0  x1  x2  x3  x4  x5
    channels 0 .. 7      0   0   0   1   1   1     rows: 2
    channels 8 .. 15     0   1   2   0   1   2     columns: 3

    A table that counts all tokens one by one, as that of text does, shows nothing.
    """
    n = stop - start
    vectors: list[npt.NDArray[np.int64]] = []
    for pattern in _positions(beside, start, stop):
        vector = relative(pattern, n)
        if vector is None or not vector.any() or (np.diff(vector) == vector[1]).all():
            continue
        if not any((vector == other).all() for other in vectors):
            vectors.append(vector)
    raster = raster_of(vectors, n) if 2 <= len(vectors) <= MAX_AXES else None
    return None if raster is None else tuple(length for _, length in raster)


def _positions(beside: Sequence[Lines], start: int, stop: int) -> Iterator[Cells]:
    """The rows of tables that stand beside the tokens of a run, one pattern after another.

    A table may end where another begins (positions below zero, and from zero on): then the rows of
    the first count up to zero.
    """
    partial: list[tuple[Cells, int, int]] = []
    for lines in beside:
        if lines.source.kind not in ("table", "input") or lines.source.values is not None:
            continue
        if sum(any(map(_counts, axis)) for axis in lines.axes) > 1:
            continue  # a lattice of its own, not a table of positions
        for i, axis in enumerate(lines.axes):
            for pattern in axis:
                part = pattern[:, start:stop] if pattern.shape[1] > 1 else pattern
                if (part > NONE).all():
                    yield part
                elif not (part <= UNKNOWN).any() and (part > NONE).any():
                    partial.append((part, i, lines.source.extents[i]))
    for first, i, extent in partial:
        for second, j, _ in partial:
            apart = first.shape == second.shape and ((first > NONE) != (second > NONE)).all()
            if apart and i == j and first.max() == extent - 1 and second[second > NONE].min() == 0:
                yield np.where(first > NONE, first - np.int32(extent), second)


def _counts(pattern: Cells) -> bool:
    known = pattern[pattern > NONE]
    return bool((known != known[:1]).any())


def fits(lines: Lines, grid: Sequence[int], start: int, stop: int) -> bool:
    """Whether a source beside the tokens counts along the grid's axes, or along some as one."""
    n = stop - start
    index = np.arange(n)
    periods = [prod(grid[i:]) for i in range(len(grid) + 1)]
    for axis in lines.axes:
        for pattern in axis:
            if pattern.shape[1] == 1:
                continue
            part = pattern[:, start:stop]
            if (part == NONE).all():
                continue
            if (part <= NONE).any():
                return False
            vector = relative(part, n)
            if vector is None:
                return False
            if not vector.any():
                continue
            period = int(np.argmax(vector != 0))
            step = int(vector[period])
            wide = [p for p in periods if p % period == 0 and p > period]
            if (
                step <= 0
                or period not in periods
                or not any((vector == step * (index // period % (p // period))).all() for p in wide)
            ):
                return False
    return True
