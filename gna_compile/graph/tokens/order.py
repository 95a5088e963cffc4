"""How the tokens of one source lie in a run: whether they are the raster of a box of its lattice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gna_compile.graph.tokens.cells import NONE, UNKNOWN, Cells, Source
from gna_compile.graph.tokens.rows import Lines, is_summed


@dataclass(frozen=True)
class Order:
    """How the tokens of one source lie in a run.

    Attributes:
        source: the source.
        axes, lengths: its axes that vary in the run, slowest first, and how many cells of each.
        grid: the lengths, with those of size 1 put in, if the axes are known to be of space.
        trouble: why there is no such order.
        is_known: the order is known, and is another one.
    """

    source: Source
    axes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    grid: tuple[int, ...] | None = None
    trouble: str = ""
    is_known: bool = False


def order_of(lines: Lines, start: int, stop: int) -> Order:
    source = lines.source
    vectors: dict[int, npt.NDArray[np.int64]] = {}
    for i, axis in enumerate(lines.axes):
        for pattern in axis:
            part = pattern[:, start:stop] if pattern.shape[1] > 1 else pattern
            if (part < UNKNOWN).all() and (part == part[:, :1]).all():
                continue  # the same mixture behind all of them
            if (part <= UNKNOWN).any():
                return Order(source, trouble="some tokens are mixtures of others")
            if (part == NONE).any() and not (part == NONE).all():
                return Order(
                    source, trouble="special tokens lie between them, or other ones in each row"
                )
            vector = relative(part, stop - start)
            if vector is None:
                return Order(
                    source, trouble="their order differs between rows of the batch", is_known=True
                )
            if not vector.any():
                continue
            if i in vectors and not (vectors[i] == vector).all():
                return Order(source, trouble="some tokens are mixtures of others")
            vectors[i] = vector
    if not vectors and stop - start > 1:
        return Order(source)  # the same for all of them: a timestep, pooled text
    raster = raster_of(list(vectors.values()), stop - start)
    if raster is None:
        return Order(
            source,
            trouble="they are not in raster order: moved, left out or repeated",
            is_known=True,
        )
    axes = tuple(list(vectors)[i] for i, _ in raster)
    lengths = tuple(length for _, length in raster)
    return Order(source, axes, lengths, _grid(lines, axes, lengths))


def relative(part: Cells, n: int) -> npt.NDArray[np.int64] | None:
    """Coordinates from the first token's on, if they are the same in every row."""
    local = part.astype(np.int64) - part[:, :1]
    if not (local == local[:1]).all():
        return None
    return np.broadcast_to(local[0], (n,))


def raster_of(vectors: Sequence[npt.NDArray[np.int64]], n: int) -> list[tuple[int, int]] | None:
    """Which vector is which axis of a raster of n cells, slowest first, and its length.

    Each axis repeats its steps with a period of its own; periods must divide up the run:

        rows      0 0 0 0 | 2 2 2 2      period 4: 8 / 4 = 2 rows
        columns   0 1 2 3 | 0 1 2 3      period 1: 4 / 1 = 4 columns
    """
    if not vectors:
        return [] if n == 1 else None
    periods = [int(np.argmax(vector != 0)) for vector in vectors]
    order = sorted(range(len(vectors)), key=lambda i: -periods[i])
    inner = n
    found = []
    index = np.arange(n)
    for i in order:
        period = periods[i]
        if inner % period:
            return None
        length = inner // period
        step = int(vectors[i][period])
        if step <= 0 or not (vectors[i] == step * (index // period % length)).all():
            return None
        found.append((i, length))
        inner = period
    return found if inner == 1 else None


def _grid(lines: Lines, axes: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...] | None:
    """The lengths if the axes are known to be axes of space and time, else None.

    They are if an operator ran along each; if they are all those of an input [B, C, axes...]; and
    the slowest one beside two such is time, unless it is the batch's dimension.
    """
    source = lines.source
    if not axes or source.kind == "opaque":
        return None
    rank = len(source.extents)
    # The first dimension of an input is the batch's: other samples, whatever runs along it.
    space = source.spatial - ({0} if rank > 2 else set())
    if source.channels is not None:
        space -= {source.channels}
    if source.is_image and rank == 5 and is_summed(lines.axes[2]) and _are_there(lines.axes[3:]):
        space |= {3, 4}  # [B, T, C, H, W]
    elif source.is_image and is_summed(lines.axes[1]) and _are_there(lines.axes[2:]):
        space |= set(range(2, rank))
    known = space & set(axes)
    single = sorted(
        (i for i in _single(lines) if i in space or (i > 0 and len(known) > 1)),
        key=lambda i: (i not in space, i),
    )[: max(rank - 2 - len(axes), 0)]
    if len(axes) + len(single) < 2:
        return None
    rest = set(axes) - space
    if rest and not (rest == {axes[0]} and axes[0] not in (0, source.channels) and len(known) > 1):
        return None
    result = list(zip(axes, lengths, strict=True))
    for i in sorted(single):
        at = next((place for place, (axis, _) in enumerate(result) if axis > i), len(result))
        result.insert(at, (i, 1))
    return tuple(length for _, length in result)


def _are_there(axes: Sequence[Sequence[Cells]]) -> bool:
    return not any(map(is_summed, axes))


def _single(lines: Lines) -> set[int]:
    """Axes of size 1, but for those that were summed over."""
    return {i for i, n in enumerate(lines.source.extents) if n == 1 and lines.axes[i]}
