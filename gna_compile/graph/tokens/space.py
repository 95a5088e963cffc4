"""Operators that run along axes of space or time: convolutions, pooling, resampling.

They are the strongest evidence of axes. A patch embedding of 2 x 2 pixels has a kernel along two
dimensions, so it shows two axes; its stem keeps the places of its first pixels:

    image [1, C, 4, 6]          stem [1, C, 2, 3]: row, column

      a b | c d | e f             0,0  0,2  0,4        flatten(2)
      g h | i j | k l     ->      2,0  2,2  2,4        0,0 0,2 0,4 2,0 2,2 2,4
     -----+-----+-----
      m n | o p | q r           rows 0, 2 and columns 0, 2, 4: a raster of 2 x 3
      s t | u v | w x

A kernel of (3, 1) over [frames, height * width] is used along the frames alone: it shows no axes,
as a flattened image may lie along the other dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gna_compile.graph.tokens.call import Call, Unruled, Value, rule
from gna_compile.graph.tokens.cells import (
    NONE,
    UNKNOWN,
    Cells,
    Coordinates,
    Source,
    Tokens,
    affine,
    gathered,
)
from gna_compile.graph.tokens.movement import note_split
from gna_compile.graph.tokens.sums import mixed


@dataclass(frozen=True)
class _Along:
    """What happens along one dimension of space.

    Attributes:
        dim: the dimension.
        is_used: positions are mixed or left out; else the dimension could as well be a batch.
        size: its new length.
        stride: input positions from one result to the next; None if resampled.
        keeps: every position stays where it was.
    """

    dim: int
    is_used: bool
    size: int
    stride: int | None
    keeps: bool


@rule("conv1d", "conv2d", "conv3d")
def conv(call: Call) -> Value:
    tokens, shape = call.first, call.result
    spatial = len(call.tokens(call.argument(1, "weight")).shape) - 2
    kernel = call.tokens(call.argument(1, "weight")).shape[2:]
    stride = _each(call, call.argument(3, "stride", default=1), spatial)
    steps = _strided(tokens, shape, kernel, stride)
    return ran_along(call, _without_channels(tokens, steps[0].dim - 1), steps, shape)


@rule(
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("lp_pool2d",),
)
def pool(call: Call) -> Value:
    tokens, shape = call.first, call.result
    name = str(getattr(call.node.target, "__name__", call.node.target))
    spatial = int(name[name.index("pool") + 4])
    kernel = _each(call, call.argument(1, "kernel_size"), spatial)
    given = call.argument(2, "stride")
    stride = kernel if given is None or given == [] else _each(call, given, spatial)
    steps = _strided(tokens, shape, kernel, stride)
    return ran_along(call, tokens, steps, shape)


def _strided(
    tokens: Tokens, shape: tuple[int, ...], kernel: Sequence[int], stride: Sequence[int]
) -> list[_Along]:
    first = len(shape) - len(kernel)
    return [
        _Along(
            d,
            k > 1 or s > 1,
            shape[d],
            s,
            # Padding is symmetric: with stride 1, an equal size means that no position moved.
            s == 1 and tokens.shape[d] == shape[d],
        )
        for d, k, s in zip(range(first, len(shape)), kernel, stride, strict=True)
    ]


@rule(
    *("interpolate", "upsample", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "adaptive_max_pool2d", "conv_transpose1d", "conv_transpose2d"),
    *("conv_transpose3d",),
)
def resample(call: Call) -> Value:
    tokens, shape = call.first, call.result
    if len(shape) < 3 or len(shape) != len(tokens.shape):
        raise Unruled
    steps = [
        _Along(d, True, shape[d], None, tokens.shape[d] == shape[d]) for d in range(2, len(shape))
    ]
    if shape[1] != tokens.shape[1]:
        tokens = _without_channels(tokens, 1)
    return ran_along(call, tokens, steps, shape)


def _each(call: Call, argument: object, count: int) -> list[int]:
    items = list(argument) if isinstance(argument, list | tuple) else [argument]
    return [call.number(item) for item in (items * count if len(items) == 1 else items)]


def _without_channels(tokens: Tokens, dim: int) -> Tokens:
    return mixed(tokens, [dim])


def ran_along(call: Call, tokens: Tokens, steps: Sequence[_Along], shape: tuple[int, ...]) -> Value:
    """The result of an operator along dimensions: the same lattice, or a new one of this call.

    A new lattice is made only of one that lies in order along every dimension that is used.
    """
    is_space = _axes_of_space(steps)
    for source, axes in tokens.cells.items():
        _note_space(source, axes, steps, is_space)
    if all(step.keeps for step in steps):
        return Tokens(shape, tokens.cells)
    cells: dict[Source, Coordinates] = {}
    is_lost = False
    for source, axes in tokens.cells.items():
        varies = any(
            array is not None and array.shape[step.dim] > 1 for step in steps for array in axes
        )
        if not varies:
            cells[source] = axes
            continue
        moved = [_moved(array, steps, tokens.shape) for array in axes]
        if any(array is _LOST for array in moved):
            is_lost = True
            continue
        stem = call.stem(source, source.extents)
        stem.channels = source.channels
        stem.counts = tuple(
            n if array is None else len(np.unique(array[array > NONE]))
            for array, n in zip(moved, source.extents, strict=True)
        )
        cells[stem] = tuple(moved)
        stem.spatial |= source.spatial
        _note_space(stem, cells[stem], steps, is_space)
        if source.is_image:
            _note_image(stem, source, axes, steps, is_space)
    if is_lost:
        return call.opaque([tokens], shape)
    return Tokens(shape, gathered(cells.items()))


def _axes_of_space(steps: Sequence[_Along]) -> set[int]:
    """The dimensions that an operator shows to be axes.

    One that it does not use is an axis only beside others, of a volume. A convolution (3, 1) over
    frames and flattened images uses frames alone, one of size 1 none.
    """
    used = {step.dim for step in steps if step.is_used}
    return {step.dim for step in steps} if len(steps) == 3 and used else used


def _note_space(
    source: Source, axes: Coordinates, steps: Sequence[_Along], is_space: set[int]
) -> None:
    for step in steps:
        there = [i for i, a in enumerate(axes) if a is not None and a.shape[step.dim] > 1]
        if step.dim in is_space and len(there) == 1:
            array = axes[there[0]]
            assert array is not None
            along = [s.dim for s in steps if array.shape[s.dim] > 1]
            if along == [step.dim]:
                if affine(array, step.dim) is not None:
                    source.spatial.add(there[0])
            elif set(along) <= is_space and all(
                array.shape[d] == 1 for d in range(array.ndim) if d not in along
            ):
                note_split(source, there[0], array, along)


def _note_image(
    stem: Source,
    source: Source,
    axes: Coordinates,
    steps: Sequence[_Along],
    is_space: set[int],
) -> None:
    """Axes of an input image that are of size 1, and so nowhere seen to vary."""
    rank = len(source.extents)
    if len(steps) == rank - 2:
        stem.spatial |= {
            2 + i
            for i, step in enumerate(steps)
            if source.extents[2 + i] == 1 and step.dim in is_space
        }


_LOST = np.full((1,), UNKNOWN)


def _moved(array: Cells | None, steps: Sequence[_Along], shape: tuple[int, ...]) -> Cells | None:
    """Coordinates of the results along the dimensions that are used; _LOST if not in order."""
    if array is None:
        return None
    varying = [step for step in steps if array.shape[step.dim] > 1]
    if not varying:
        return array
    changed = [step for step in varying if not step.keeps]
    if not changed:
        return array
    if len(varying) > 1:
        return _LOST  # a flattened image along several dimensions
    (step,) = changed
    found = affine(array, step.dim)
    if found is None:
        return _LOST
    start, by = found
    old, new = shape[step.dim], step.size
    if step.stride is not None:
        by *= step.stride
    elif old % new == 0:
        by *= old // new
    elif new % old == 0:
        start = start * np.int32(new // old)
    elif start.size > 1:
        return _LOST
    along = np.arange(new, dtype=np.int32) * np.int32(by)
    ones = [1] * array.ndim
    ones[step.dim] = new
    return start + along.reshape(ones)
