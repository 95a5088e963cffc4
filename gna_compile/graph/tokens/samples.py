"""What `vmap` does to identities: inside of it a tensor holds the tokens of one sample.

Which sample is not known there, so a coordinate that depends on it is known up to an offset that
does. The offset, as a function of the sample, becomes part of the source: two tensors have one
source only if they are the same part of each sample. Outside, the offsets are added again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from gna_compile.graph.functorch import ADD_BATCH_DIM, REMOVE_BATCH_DIM, SAME, UNPACK_DUAL, Levels
from gna_compile.graph.tokens.call import Call, Unruled, Value
from gna_compile.graph.tokens.cells import (
    MOST_ELEMENTS,
    NONE,
    UNKNOWN,
    Cells,
    Coordinates,
    Source,
    Tokens,
    compressed,
    elementwise,
    gathered,
    is_unknown,
    unknown,
)

Offsets = tuple[tuple[int, npt.NDArray[np.int64]], ...]
"""For some axes of a source, how far the cells of each sample are from those of the first."""


class Transforms:
    """The transforms of `torch.func` that are open as a graph is walked in order."""

    def __init__(self) -> None:
        self._levels = Levels()
        self._open: list[Samples] = []

    def visit(self, node: fx.Node) -> str | None:
        """The name of a call of `torch.func`, whose value `value` knows; None for any other node."""
        name = self._levels.visit(node)
        # One for each level; those of `grad` and `jvp` hide no dimension.
        while len(self._open) < len(self._levels.kinds):
            self._open.append(Samples())
        del self._open[len(self._levels.kinds) :]
        return name

    def value(self, name: str, call: Call) -> Value:
        """What is known of the result of a call of `torch.func`; None if nothing."""
        try:
            return None if self._levels.is_odd else self._ruled(name, call)
        except (Unruled, ValueError, MemoryError):
            return None

    def _ruled(self, name: str, call: Call) -> Value:
        if name in SAME:
            return call.first
        if name == UNPACK_DUAL:
            return [call.first, None]
        if name == ADD_BATCH_DIM:
            dim = call.dim(call.argument(1, "batch_dim"), len(call.first.shape))
            return self._open[-1].one(call.first, dim)
        if name == REMOVE_BATCH_DIM:
            count = call.number(call.argument(2, "batch_size"))
            dim = call.dim(call.argument(3, "out_dim"), len(call.first.shape) + 1)
            return self._open[-1].all(call.first, dim, count)
        return None


class Samples:
    """One `vmap`, while it is open."""

    def __init__(self) -> None:
        self._begin = Source("", "table", ()).serial
        self._parts: dict[Any, Source] = {}
        self._wholes: dict[Source, tuple[Source, Offsets]] = {}
        self._families: dict[Source, Source] = {}

    def one(self, tokens: Tokens, dim: int) -> Tokens | None:
        """One sample of a tensor of which `dim` counts samples; None if they lie differently."""
        shape = (*tokens.shape[:dim], *tokens.shape[dim + 1 :])
        cells: dict[Source, Coordinates] = {}
        for source, axes in tokens.cells.items():
            parts = [None if array is None else _one(array, dim) for array in axes]
            if any(part is None and axes[i] is not None for i, part in enumerate(parts)):
                return None
            offsets = tuple(
                (i, part[1]) for i, part in enumerate(parts) if part is not None and part[1].any()
            )
            if source.values is not None and any(i == len(axes) - 1 for i, _ in offsets):
                return None  # the columns of position ids
            own = tuple(None if part is None else part[0] for part in parts)
            cells[self._part(source, offsets) if offsets else source] = own
        return Tokens(shape, gathered(cells.items()))

    def _part(self, source: Source, offsets: Offsets) -> Source:
        key = source, tuple((i, steps.tobytes()) for i, steps in offsets)
        if key not in self._parts:
            part = replace(source, roots=source.all_roots, part_of=source)
            self._parts[key] = part
            self._wholes[part] = source, offsets
        return self._parts[key]

    def all(self, tokens: Tokens, dim: int, count: int) -> Tokens:
        """The tensor of all samples, side by side along `dim`, of what is known of one."""
        shape = (*tokens.shape[:dim], count, *tokens.shape[dim:])
        pieces = [
            Tokens(shape, gathered([self._all(source, axes, dim, count)]))
            for source, axes in tokens.cells.items()
        ]
        return elementwise(pieces) if pieces else Tokens(shape, {})

    def _all(
        self, source: Source, axes: Coordinates, dim: int, count: int
    ) -> tuple[Source, Coordinates]:
        wide = [None if array is None else np.expand_dims(array, dim) for array in axes]
        if source in self._wholes or source.serial >= self._begin:
            # It is another source outside, and mixtures are numbered source by source.
            wide = [a if a is None or is_unknown(a) else np.maximum(a, UNKNOWN) for a in wide]
        if source in self._wholes:
            whole, offsets = self._wholes[source]
            for i, steps in offsets:
                array = wide[i]
                if array is not None:
                    wide[i] = _each_sample(array, dim, steps, lambda cells, own: cells + own)
            return whole, tuple(wide)
        # Numbers that count are the same for all samples, and so is what was there before.
        if source.serial < self._begin or source.kind == "table":
            return source, tuple(wide)
        # Made inside: a cell of one sample's is no cell of another one's.
        there = _anywhere([array for array in wide if array is not None])
        number = np.arange(count)
        beside = _each_sample(there, dim, number, lambda _, own: own)
        return self._family(source, count), (beside, *wide)

    def _family(self, source: Source, count: int) -> Source:
        if source not in self._families:
            self._families[source] = Source(
                source.name,
                "opaque" if source.kind == "input" else source.kind,
                (count, *source.extents),
                source.all_roots,
                {axis + 1 for axis in source.spatial},
                is_mixed=source.is_mixed,
                counts=(count, *(source.counts or source.extents)),
                splits={axis + 1: set(sizes) for axis, sizes in source.splits.items()},
            )
        return self._families[source]


def _one(array: Cells, dim: int) -> tuple[Cells, npt.NDArray[np.int64]] | None:
    """The first sample's coordinates, and how far those of each sample are from them."""
    count = array.shape[dim]
    lines = np.moveaxis(array, dim, 0)
    if is_unknown(array):
        return unknown(lines.shape[1:]), np.zeros(count, np.int64)
    spoiled = (lines <= UNKNOWN).any(0)
    missing = lines == NONE
    if (missing.any(0) & ~missing.all(0) & ~spoiled).any():
        return None  # some samples have a token there, and others none
    first = lines[0]
    away = (lines.astype(np.int64) - first)[:, ~spoiled & ~missing[0]]
    if away.shape[1] and (away != away[:, :1]).any():
        return None
    steps = away[:, 0] if away.shape[1] else np.zeros(count, np.int64)
    return np.where(spoiled, UNKNOWN, first), steps


def _each_sample(
    array: Cells,
    dim: int,
    steps: npt.NDArray[np.int64],
    join: Callable[[Cells, Cells], Cells],
) -> Cells:
    """Coordinates with those of each sample along `dim`, where there are any."""
    shape = list(array.shape)
    shape[dim] = len(steps)
    if is_unknown(array) or np.prod(shape) > MOST_ELEMENTS:
        return unknown(shape)
    own = steps.astype(np.int32).reshape([-1 if d == dim else 1 for d in range(array.ndim)])
    return compressed(np.where(array > NONE, join(array, own), array))


def _anywhere(arrays: Sequence[Cells]) -> Cells:
    """Zero wherever any of the arrays has a coordinate, known or not; else NONE."""
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    if any(not (array == NONE).any() for array in arrays if not is_unknown(array)) or any(
        map(is_unknown, arrays)
    ):
        return np.zeros((1,) * len(shape), np.int32)
    if np.prod(shape) > MOST_ELEMENTS:
        return unknown(shape)
    is_there = np.zeros(shape, bool)
    for array in arrays:
        is_there |= array != NONE
    return np.where(is_there, np.int32(0), NONE)
