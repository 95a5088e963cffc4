"""What sums make of the cells behind their terms: pixels into patches, frames into their mean."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from gna_compile.graph.tokens.cells import (
    NONE,
    UNKNOWN,
    Cells,
    Coordinates,
    Source,
    Tokens,
    gathered,
    is_mixture,
    is_unknown,
    unknown,
)


def summed(
    source: Source, axis: int, array: Cells, dims: Sequence[int]
) -> tuple[Cells | None, bool]:
    """Coordinates of sums over `dims`, which keep size 1, and whether sums became new cells.

    An axis along which everything is summed has no coordinate any more. Where each sum takes a
    stretch of an axis and no two stretches overlap (pixels into patches), the first coordinate of
    its stretch stands for each. Where all sums take the same part of an axis, they are that mixture
    of cells. Any other mixture is unknown:

        [0 1 2 3] -> all          [0 1] [2 3] [4 5] -> 0  2  4
        [0 1] [0 1] -> {0, 1}     [0 1] [1 2] [2 3] -> unknown
    """
    dims = tuple(d for d in dims if array.shape[d] > 1)
    if not dims:
        return array, False
    left = [1 if d in dims else n for d, n in enumerate(array.shape)]
    if is_unknown(array):
        return (unknown(left) if prod(left) > 1 else _constant(source, axis, array, left)), False
    known = array > NONE
    high = array.max(dims, keepdims=True)
    low = np.where(known, array, np.int32(2**30)).min(dims, keepdims=True)
    spoiled = (array <= UNKNOWN).any(dims, keepdims=True)
    empty = (high <= NONE) & ~spoiled
    one = empty | ((low == high) & ~spoiled)
    if one.all():
        return np.where(empty, NONE, low), False
    if prod(left) == 1:
        return _constant(source, axis, array, left), False
    if not spoiled.any():
        full = ~empty
        starts = np.unique(low[full])
        width = int((high - low)[full].max())
        if len(starts) == 1 and len(np.unique(high[full])) == 1 and _are_alike(array, dims):
            return _constant(source, axis, array, left), False
        if len(starts) > 1 and int(np.diff(starts).min()) > width:
            return np.where(empty, NONE, low), True
    return unknown(left), False


def _constant(source: Source, axis: int, array: Cells, left: Sequence[int]) -> Cells | None:
    """The same mixture everywhere."""
    mixture = source.mixture(axis, array)
    return None if mixture is None else np.full((1,) * len(left), mixture)


def _are_alike(array: Cells, dims: Sequence[int]) -> bool:
    """Whether all sums over `dims` that take any cells take the same ones."""
    others = [d for d in range(array.ndim) if d not in dims]
    terms = array.transpose([*others, *dims]).reshape(prod(array.shape[d] for d in others), -1)
    terms = np.sort(terms[(terms > NONE).any(1)], axis=1)
    return bool((terms == terms[:1]).all())


def reduced(tokens: Tokens, dims: Sequence[int]) -> Tokens:
    """A tensor summed over dimensions, which stay with size 1; notes axes that became patches."""
    cells: dict[Source, Coordinates] = {}
    for source, axes in tokens.cells.items():
        result: list[Cells | None] = []
        patched: set[int] = set()
        for i, array in enumerate(axes):
            left, is_patched = (None, False) if array is None else summed(source, i, array, dims)
            if is_patched:
                patched.add(i)
            if source.kind == "table" and left is not None and (left == UNKNOWN).any():
                left = None  # positions that were mixed say nothing more
            result.append(left)
        batch = 0 if len(result) > 2 else None
        if all(a is None or a.size == 1 or i == batch for i, a in enumerate(result)):
            # It tells no tokens apart: pooled, as a condition of all of them is.
            result = [None if is_mixture(a) else a for a in result]
        cells[source] = tuple(result)
        if len(patched) > 1:  # along one alone: neighbors of a flattened image, channels
            source.spatial |= patched
    shape = tuple(1 if d in dims else n for d, n in enumerate(tokens.shape))
    return Tokens(shape, gathered(cells.items()))


def mixed(tokens: Tokens, dims: Sequence[int]) -> Tokens:
    """A tensor times weights, summed over dimensions; what comes in their place has no cells.

    Notes the sources of which it sums more than channels: rows of the result may be mixtures.
    """
    left = reduced(tokens, dims)
    for source, axes in tokens.cells.items():
        channels = {1, len(axes) - 1} if source.is_image else {len(axes) - 1}
        after = left.cells.get(source, (None,) * len(axes))
        lost = {
            i for i, a in enumerate(axes) if a is not None and a.size > 1 and is_mixture(after[i])
        }
        source.is_mixed |= bool(lost - channels)
    return left
