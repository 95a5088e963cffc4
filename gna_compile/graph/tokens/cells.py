"""The identity of tokens: which cell of which source stands behind every element of a tensor.

A `Source` is a lattice on which tokens are made: an input of the graph, what a strided convolution
makes of one, what an operator returns that is not understood. `Tokens` says, for a tensor, which
cell of which source each of its elements comes from: one array of coordinates for each axis of the
source, of size 1 along every dimension that it does not depend on. So an image [B, C, H, W] is
described by four small arrays, and a sequence made of it by arrays of its token count.

Everything here is exact: arrays are moved by the same operations as the tensors. What cannot be
told is UNKNOWN, and UNKNOWN never turns into something known again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import fx

Cells = npt.NDArray[np.int32]
"""Coordinates along one axis of a source, broadcastable to the tensor's shape."""

NONE = np.int32(-(2**30))
"""There is no token of the source here, or the whole axis was summed over: neutral."""
UNKNOWN = np.int32(NONE - 1)
"""Something of the source, but not known which cell, or a mixture of cells.

Smaller numbers are mixtures of known cells, a number for each set of cells (`Source.mixture`). So
`<= UNKNOWN` is what stands for no single cell.
"""

MOST_ELEMENTS = 2**26
_MOST_OF_MIXTURES = 2**20


@dataclass(eq=False)
class Source:
    """A lattice of tokens.

    Attributes:
        name: for messages.
        kind: "input" of the graph; "stem", a convolution or the like that makes a new lattice of
            an old one; "opaque", the result of an operator that is not understood; "table",
            numbers that count (`arange`).
        extents: length of each axis.
        roots: the inputs that it was computed from; itself if it is one.
        spatial: axes that were used as axes of space or time: a convolution, pooling or
            patch embedding ran along them.
        is_image: an input [B, C, axes...]; by convention its last two or three dimensions are axes.
        channels: the axis of an image's channels, where it has one for sure: no axis of space.
        is_mixed: a product with weights ran along an axis that holds no channels by convention.
        splits: for an axis, sizes into which it was split and that were then used as axes.
        node, values: of position ids, the graph's input and its values.
        part_of: the source of which this one is one sample's part, under `vmap`.
        counts: how many cells it has along each axis, where these are not its extents.
        mixtures: the number of each set of cells that were summed, by axis and cells.
        serial: sources that were made later have larger ones.
    """

    name: str
    kind: Literal["input", "stem", "opaque", "table"]
    extents: tuple[int, ...]
    roots: frozenset[Source] = frozenset()
    spatial: set[int] = field(default_factory=set)
    is_image: bool = False
    channels: int | None = None
    is_mixed: bool = False
    splits: dict[int, set[tuple[int, ...]]] = field(default_factory=dict)
    node: fx.Node | None = None
    values: Any = None
    part_of: Source | None = None
    counts: tuple[int, ...] | None = None
    mixtures: dict[tuple[int, bytes], np.int32] = field(default_factory=dict, init=False)
    serial: int = field(default_factory=count().__next__, init=False)

    @property
    def all_roots(self) -> frozenset[Source]:
        return frozenset({self}) if self.kind == "input" and not self.roots else self.roots

    @property
    def whole(self) -> Source:
        """The source that this one is a part of, itself if of none."""
        return self if self.part_of is None else self.part_of.whole

    def holds_channels(self, axis: int) -> bool:
        """Whether an axis holds channels, known or by convention: what is summed is one token."""
        is_last = axis == len(self.extents) - 1
        return axis == self.channels or (is_last and not self.is_image)

    def mixture(self, axis: int, cells: Cells) -> np.int32 | None:
        """The number that stands for a sum of cells of an axis; None if all of them are in it.

        A sum of all cells says nothing, and neither does one of channels, or of positions.
        """
        if self.holds_channels(axis) or self.kind == "table":
            return None
        distinct = np.unique(cells)
        if (distinct <= UNKNOWN).any():
            return UNKNOWN
        distinct = distinct[distinct > NONE]
        if len(distinct) == (self.counts or self.extents)[axis]:
            return None
        key = axis, distinct.tobytes()
        return self.mixtures.setdefault(key, np.int32(UNKNOWN - 1 - len(self.mixtures)))


Coordinates = tuple[Cells | None, ...]
"""One array for each axis of a source; None if no element has a coordinate along it."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What stands behind the elements of one tensor.

    Attributes:
        shape: of the tensor, in numbers.
        cells: the coordinates in each source that has any.
    """

    shape: tuple[int, ...]
    cells: Mapping[Source, Coordinates]

    def moved(self, shape: Sequence[int], move: Callable[[Cells], Cells | None]) -> Tokens:
        """The tokens of a tensor whose elements are this one's, moved."""
        return Tokens(
            tuple(shape), gathered((s, _each(axes, move)) for s, axes in self.cells.items())
        )

    @property
    def roots(self) -> frozenset[Source]:
        return frozenset(root for source in self.cells for root in source.all_roots)


def _each(axes: Coordinates, move: Callable[[Cells], Cells | None]) -> Coordinates:
    # Axes of one source often share an array (a merged dimension), and None stays None.
    return tuple(None if array is None else move(array) for array in axes)


def gathered(items: Any) -> dict[Source, Coordinates]:
    """A dict of coordinates without sources that have none left."""
    return {s: axes for s, axes in items if any(array is not None for array in axes)}


def lattice(source: Source) -> Tokens:
    """A tensor whose elements are the cells of a source."""
    rank = len(source.extents)
    cells = tuple(
        np.arange(n, dtype=np.int32).reshape((1,) * i + (n,) + (1,) * (rank - 1 - i))
        for i, n in enumerate(source.extents)
    )
    return Tokens(source.extents, gathered([(source, cells)]))


def aligned(array: Cells, rank: int) -> Cells:
    """The array with leading dimensions of size 1, as broadcasting adds them."""
    missing = rank - array.ndim
    return array if missing == 0 else array.reshape((1,) * missing + array.shape)


def compressed(array: Cells) -> Cells:
    """The array of size 1 along dimensions that it does not depend on."""
    for i, n in enumerate(array.shape):
        if n > 1:
            array = _narrowed(array, i)
    return array


def _narrowed(array: Cells, dim: int) -> Cells:
    """The array of size 1 along one dimension, if it does not depend on it.

    What is unknown keeps the dimensions that it came from.
    """
    if is_unknown(array):
        return array
    first, second = array.take([0], dim), array.take([1], dim)
    if not (first == second).all() or (first <= UNKNOWN).any():
        return array
    return first if (array == first).all() else array


def expanded(array: Cells, shape: Sequence[int], dims: Sequence[int]) -> Cells:
    """The array at full size along `dims` of the tensor's `shape`."""
    target = list(array.shape)
    for dim in dims:
        target[dim] = shape[dim]
    return np.broadcast_to(array, target)


def unknown(shape: Sequence[int]) -> Cells:
    """Unknown cells that depend on every dimension of the shape; takes no memory."""
    return np.broadcast_to(UNKNOWN, tuple(shape))


def is_unknown(array: Cells) -> bool:
    """Whether an array was made by `unknown`, or is a view of one."""
    is_one = all(s == 0 for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    return array.size > 1 and is_one and bool(array.flat[0] == UNKNOWN)


def is_mixture(array: Cells | None) -> bool:
    """Whether cells of an axis were summed and none is left: all of them, or the same everywhere."""
    return array is None or (array.size == 1 and bool((array <= UNKNOWN).all()))


# --- reshaping -----------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def groups_of(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[range, range]]:
    """The finest runs of dimensions whose sizes multiply up to the same, in order."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        left = right = 1
        while True:
            if left == right and left > 1:
                break
            if left <= right and i < len(before):
                left *= before[i]
                i += 1
            elif j < len(after):
                right *= after[j]
                j += 1
            elif i < len(before):
                left *= before[i]
                i += 1
            else:
                break
        groups.append((range(first_i, i), range(first_j, j)))
    return groups


def reshaped(array: Cells, shape: tuple[int, ...], new: tuple[int, ...]) -> Cells:
    """The array of a tensor of `shape` after a reshape to `new`."""
    if array.size == 1:
        return array.reshape((1,) * len(new))
    target: list[int] = []
    result: list[int] = []
    touched: list[int] = []
    for ins, outs in groups_of(shape, new):
        varies = any(array.shape[i] > 1 for i in ins)
        target.extend(shape[i] if varies else 1 for i in ins)
        if varies and len(outs) > 1:
            touched.extend(outs)
        result.extend(new[j] if varies else 1 for j in outs)
    if prod(target) > MOST_ELEMENTS or is_unknown(array):
        return unknown(result)
    array = np.broadcast_to(array, target).reshape(result)
    for j in touched:
        if array.shape[j] > 1:
            array = _narrowed(array, j)
    return array


# --- joining -------------------------------------------------------------------------------------


def merged(left: Cells | None, right: Cells | None) -> Cells | None:
    """Coordinates of what is computed element by element of two operands of equal rank."""
    if left is None or right is None or left is right:
        return right if left is None else left
    shape = np.broadcast_shapes(left.shape, right.shape)
    if is_unknown(left) or is_unknown(right):
        return unknown(shape)
    if left.shape == right.shape and (left == right).all():
        return left
    if prod(shape) > max(_MOST_OF_MIXTURES, left.size, right.size):
        return unknown(shape)
    joined = np.where(
        left == NONE,
        right,
        np.where((right == NONE) | (left == right), left, UNKNOWN),
    )
    return joined if (joined == UNKNOWN).any() else compressed(joined)


def elementwise(operands: Sequence[Tokens]) -> Tokens:
    """What an elementwise operator makes of operands that broadcast."""
    first, *others = operands
    if not others:
        return first
    shape = np.broadcast_shapes(*(tokens.shape for tokens in operands))
    rank = len(shape)
    cells: dict[Source, Coordinates] = {}
    for tokens in operands:
        for source, axes in tokens.cells.items():
            wide = tuple(None if array is None else aligned(array, rank) for array in axes)
            known = cells.get(source)
            if known is not None:
                wide = tuple(map(merged, known, wide))
            cells[source] = wide
    for tokens in operands:  # keep an operand that already says it all: fewer objects to compare
        if tokens.shape == shape and tokens.cells.keys() == cells.keys():
            same = (
                ours is theirs
                for source, axes in tokens.cells.items()
                for ours, theirs in zip(axes, cells[source], strict=True)
            )
            if all(same):
                return tokens
    return Tokens(shape, cells)


def concatenated(pieces: Sequence[Tokens], dim: int) -> Tokens:
    """Tensors of one rank joined along a dimension."""
    rank = len(pieces[0].shape)
    shape = list(pieces[0].shape)
    shape[dim] = sum(tokens.shape[dim] for tokens in pieces)
    sources = dict.fromkeys(source for tokens in pieces for source in tokens.cells)
    cells = {}
    for source in sources:
        axes = zip(
            *(tokens.cells.get(source, (None,) * len(source.extents)) for tokens in pieces),
            strict=True,
        )
        lengths = [tokens.shape[dim] for tokens in pieces]
        cells[source] = tuple(_joined(arrays, lengths, dim, rank) for arrays in axes)
    return Tokens(tuple(shape), gathered(cells.items()))


def _joined(
    arrays: Sequence[Cells | None], lengths: Sequence[int], dim: int, rank: int
) -> Cells | None:
    if all(array is None for array in arrays):
        return None
    first = arrays[0]
    if first is not None and all(
        array is not None
        and array.shape[dim] == 1
        and (array is first or (array.shape == first.shape and (array == first).all()))
        for array in arrays
    ):
        return first
    wide = [np.full((1,) * rank, NONE) if array is None else array for array in arrays]
    common = list(np.broadcast_shapes(*(_without(array.shape, dim) for array in wide)))
    if prod(common) * sum(lengths) > MOST_ELEMENTS:
        return unknown([sum(lengths) if d == dim else n for d, n in enumerate(common)])
    parts = []
    for array, length in zip(wide, lengths, strict=True):
        common[dim] = length
        parts.append(np.broadcast_to(array, common))
    return np.concatenate(parts, dim)


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], 1, *shape[dim + 1 :])


def affine(array: Cells, dim: int) -> tuple[Cells, int] | None:
    """First coordinate and step along a dimension where coordinates count up evenly, else None.

    Missing coordinates at either end, as padding leaves them, are continued.
    """
    n = array.shape[dim]
    if n == 1:
        return (array, 1) if (array > NONE).all() else None
    lines = np.moveaxis(array, dim, -1)
    known = lines > NONE
    if (lines <= UNKNOWN).any() or not known.any():
        return None
    where = np.nonzero(known.reshape(-1, n).all(0))[0]
    partly = known.reshape(-1, n).any(0)
    if len(where) == 0 or int(partly.sum()) != len(where):
        return None
    first, last = int(where[0]), int(where[-1])
    if last - first + 1 != len(where):
        return None
    if len(where) == 1:
        step = 1
    else:
        steps = np.diff(lines[..., first : last + 1], axis=-1)
        step = int(steps.flat[0])
        if step <= 0 or not (steps == step).all():
            return None
    start = lines[..., first] - np.int32(first * step)
    return np.expand_dims(start, dim), step


__all__ = [
    "NONE",
    "UNKNOWN",
    "Cells",
    "Coordinates",
    "Source",
    "Tokens",
    "affine",
    "aligned",
    "compressed",
    "concatenated",
    "elementwise",
    "expanded",
    "gathered",
    "groups_of",
    "is_mixture",
    "is_unknown",
    "lattice",
    "merged",
    "reshaped",
    "unknown",
]
