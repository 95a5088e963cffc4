"""Identities of tensor dimensions: which of them index the same things, and how they are made up.

Two dimensions are one `Dim` if position i along either is the same token. A `Dim` may be the
raster merge of others (`Grid`: time, height, width, slowest first) or their concatenation
(text, then image). `Axes` holds all that is known; facts only ever add to it:

- `unify` says that two dimensions are one, and so are their parts;
- `merged` and `split` are the two directions of a reshape. Merging the same parts again, or the
  parts of an earlier split, gives back the same dimension, so identities survive a window
  partition and its reversal;
- `concatenated` and `sliced` are `cat` and its inverse.

Nothing is ever concluded from sizes being equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from gna_compile.graph.align import (
    Group,
    Key,
    agree,
    align_products,
    align_sums,
    is_compound,
    is_zero,
    key_of,
    product,
    same_key,
)
from gna_compile.graph.values import Size

MAX_FACTORS = 16  # of one dimension; beyond it, parts are not looked into


@dataclass(eq=False)
class Grid:
    """One way in which a dimension is the raster merge of others, none of them of size 1.

    Attributes:
        factors: the merged dimensions, slowest first.
        is_merged: a merge was seen. A mere split is weaker evidence: a sequence may be split into
            blocks that mean nothing, so it counts only if its parts are then used as axes of space.
        source: the operator that showed it.
    """

    factors: tuple[Dim, ...]
    is_merged: bool
    source: str


@dataclass(eq=False)
class Dim:
    """A dimension. Compare what `Axes.find` returns, by identity.

    Attributes:
        size: its length.
        grids: every decomposition seen; those that agree are kept as one.
        units: how many leading axes of size 1 its grid has (a video of one frame).
        segments: what it is the concatenation of, in order; () if it is none.
        is_opaque: made by an operator that may reorder what lies along it, as far as is known.
        slice_of: the dimension that it is a slice of.
        is_spatial: a convolution or the like runs along it: an axis of space or time by itself.
        is_unpatched: merged, as the slower part, with something else, as (height, patch) are.
        ids: graph inputs of position ids that are indexed by it.
    """

    size: Size
    key: Key
    serial: int
    parent: Dim | None = None
    grids: list[Grid] = field(default_factory=list)
    units: int = 0
    segments: tuple[Dim, ...] = ()
    is_opaque: bool = False
    slice_of: Dim | None = None
    is_spatial: bool = False
    is_unpatched: bool = False
    ids: tuple[fx.Node, ...] = ()

    @property
    def is_unit(self) -> bool:
        return self.key == 1 if isinstance(self.key, int) else False


Shape = tuple[Dim, ...]


class Axes:
    """All dimensions of one graph, its subgraphs included."""

    def __init__(self) -> None:
        self._serial = 0
        self._merges: dict[tuple[int, ...], Dim] = {}
        self._concatenations: dict[tuple[int, ...], Dim] = {}
        self._slices: dict[tuple[int, Key, Key, Key], Dim] = {}
        self.unit = self.new(1)
        """The dimension of size 1. It has one position, so it identifies nothing and is shared."""

    def new(self, size: Size, *, opaque: bool = False) -> Dim:
        """A dimension of which nothing is known yet."""
        key = key_of(size)
        if isinstance(key, int):
            if key == 1 and self._serial:
                return self.unit
            size = key
        self._serial += 1
        return Dim(size, key, self._serial, is_opaque=opaque)

    @staticmethod
    def find(dim: Dim) -> Dim:
        """The representative of everything that `dim` has been unified with."""
        if dim.parent is None:
            return dim
        root = dim.parent
        while root.parent is not None:
            root = root.parent
        while dim is not root:
            dim.parent, dim = root, dim.parent
        return root

    def unify(self, left: Dim, right: Dim) -> Dim:
        """Says that both are one dimension, because an operator requires it of its operands.

        Does nothing if their sizes differ: an operator may also broadcast.
        """
        left, right = self.find(left), self.find(right)
        if left is right or left.is_unit or right.is_unit:
            return left
        if not agree(left.size, right.size):
            return left
        if right.serial < left.serial:
            left, right = right, left
        right.parent = left
        if is_compound(right.key) and not is_compound(left.key):
            # Sizes further on are written in terms of what the tokens were computed from.
            left.size, left.key = right.size, right.key
        left.units = max(left.units, right.units)
        left.is_opaque = left.is_opaque and right.is_opaque
        left.slice_of = left.slice_of or right.slice_of
        left.is_spatial = left.is_spatial or right.is_spatial
        left.is_unpatched = left.is_unpatched or right.is_unpatched
        left.ids += tuple(node for node in right.ids if node not in left.ids)
        for grid in right.grids:
            self._add_grid(left, grid.factors, grid.is_merged, grid.source)
        if right.segments:
            self._add_segments(self.find(left), right.segments)
        return self.find(left)

    def unify_shapes(self, left: Shape, right: Shape) -> None:
        """Unifies two shapes aligned at their last dimension, as broadcasting does."""
        for one, other in zip(reversed(left), reversed(right), strict=False):
            self.unify(one, other)

    def reshaped(
        self,
        shape: Shape,
        old_sizes: Sequence[Size],
        sizes: Sequence[Size],
        source: str,
        groups: Sequence[Group] | None = None,
    ) -> Shape:
        """The dimensions after a reshape from `old_sizes` to `sizes`.

        Args:
            groups: which dimensions make up which, if the operator says so itself.
        """
        keys = tuple(key_of(size) for size in sizes)
        before = tuple(key_of(size) for size in old_sizes)
        if any(is_zero(key) for key in (*before, *keys)):
            return tuple(self.new(size) for size in sizes)
        is_exact = groups is not None
        result: dict[int, Dim] = {}
        for ins, outs in groups if groups is not None else align_products(before, keys):
            result |= self._regrouped(shape, ins, sizes, keys, outs, source, is_exact)
        return tuple(result[i] if i in result else self.new(size) for i, size in enumerate(sizes))

    def merged(self, dims: Sequence[Dim], source: str) -> Dim:
        """The raster merge of dimensions, slowest first."""
        factors = tuple(self.find(dim) for dim in dims if not dim.is_unit)
        if not factors:
            return self.unit
        if len(factors) == 1:
            return factors[0]
        leaves = self._leaves(factors, merged_only=True)
        name = tuple(leaf.serial for leaf in leaves)
        known = self._merges.get(name)
        if known is not None:
            known = self.find(known)
            for grid in known.grids:
                if self._leaves(grid.factors, merged_only=True) == leaves:
                    return known
        size = product([factor.size for factor in factors])
        whole = self.new(size)
        whole.grids.append(Grid(factors, True, source))
        for factor in factors[:-1]:
            factor.is_unpatched = True
        self._merges[name] = whole
        return whole

    def split(self, dim: Dim, sizes: Sequence[Size], source: str) -> Shape:
        """The dimensions, none of size 1, of which `dim` is the raster merge."""
        dim = self.find(dim)
        keys = tuple(key_of(size) for size in sizes)
        for grid in dim.grids:
            for factors in (grid.factors, self._leaves(grid.factors)):
                parts = self._realigned(factors, sizes, keys, source)
                if parts is not None:
                    return parts
        parts = tuple(self.new(size, opaque=dim.is_opaque) for size in sizes)
        dim.grids.append(Grid(parts, False, source))
        self._merges.setdefault(tuple(part.serial for part in parts), dim)
        return parts

    def concatenated(self, dims: Sequence[Dim]) -> Dim:
        """The concatenation of dimensions, in order."""
        parts: list[Dim] = []
        for dim in dims:
            dim = self.find(dim)
            if not is_zero(dim.key):
                parts.extend(self._flat(dim))
        if not parts:
            return self.new(0)
        if len(parts) == 1:
            return parts[0]
        if all(part.is_unit for part in parts):
            return self.new(len(parts))
        name = tuple(part.serial for part in parts)
        known = self._concatenations.get(name)
        if known is not None:
            known = self.find(known)
            if self._flat(known) == tuple(parts):
                return known
        total: Size = 0
        for part in parts:
            total = total + part.size
        origins = [self.find(part.slice_of) for part in parts if part.slice_of is not None]
        # Pieces of one dimension, put together in another order: rolled by hand.
        whole = self.new(total, opaque=len(origins) > len(set(origins)))
        whole.segments = tuple(parts)
        self._concatenations[name] = whole
        return whole

    def sliced(self, dim: Dim, start: Size, stop: Size, step: Size = 1) -> Dim:
        """The positions start, start + step, ... before stop, with 0 <= start <= stop <= size.

        A slice between boundaries of a concatenation gives back what was concatenated; the same
        slice of the same dimension is the same dimension.
        """
        dim = self.find(dim)
        first, last, by = key_of(start), key_of(stop), key_of(step)
        whole = by == 1 and is_zero(first) and same_key(last, dim.key)
        if whole:
            return dim
        if by == 1 and dim.segments:
            parts = self._between(self._flat(dim), first, last)
            if parts is not None:
                return self.concatenated(parts)
        name = (dim.serial, first, last, by)
        known = self._slices.get(name)
        if known is None:
            length = stop - start if by == 1 else (stop - start + step - 1) // step
            known = self._slices[name] = self.new(length, opaque=dim.is_opaque)
            if not known.is_unit:
                known.slice_of = dim
        return known

    def flat_segments(self, dim: Dim) -> Shape:
        """What a dimension is the concatenation of, down to what is none; itself if it is none."""
        return self._flat(self.find(dim))

    # What follows compares and refines parts.

    def _flat(self, dim: Dim) -> Shape:
        if not dim.segments:
            return (dim,)
        return tuple(part for segment in dim.segments for part in self._flat(self.find(segment)))

    def _leaves(self, factors: Sequence[Dim], merged_only: bool = False) -> Shape:
        """The factors of the factors, and so on, along the first decomposition of each."""
        leaves: list[Dim] = []
        for factor in factors:
            factor = self.find(factor)
            grids = [grid for grid in factor.grids if grid.is_merged or not merged_only]
            if grids and len(leaves) < MAX_FACTORS:
                leaves.extend(self._leaves(grids[0].factors, merged_only))
            else:
                leaves.append(factor)
        return tuple(leaves)

    def _regrouped(
        self,
        shape: Shape,
        ins: Sequence[int],
        sizes: Sequence[Size],
        keys: Sequence[Key],
        outs: Sequence[int],
        source: str,
        is_exact: bool,
    ) -> dict[int, Dim]:
        """One group of a reshape: the new dimensions by position."""
        dims = [self.find(shape[i]) for i in ins if not shape[i].is_unit]
        wide = [j for j in outs if keys[j] != 1]
        targets = [sizes[j] for j in wide]
        result = dict.fromkeys(outs, self.unit)
        parts: Shape | None
        if len(wide) == 1 and dims:
            whole = self.merged(dims, source)
            if len(dims) > 1 or is_exact:
                whole.units = max(whole.units, _leading_units([shape[i].key for i in ins], ins))
            parts = (whole,)
        elif len(dims) == 1 and wide:
            parts = self.split(dims[0], targets, source)
            dims[0].units = max(dims[0].units, _leading_units([keys[j] for j in outs], outs))
        elif dims and wide:
            # A reshape to another shape of the same positions, perhaps to be undone later.
            parts = self._realigned(
                self._leaves(dims), targets, tuple(keys[j] for j in wide), source
            )
            if parts is None:
                parts = self.split(self.merged(dims, source), targets, source)
        else:
            parts = tuple(self.new(size) for size in targets)
        return result | dict(zip(wide, parts, strict=True))

    def _realigned(
        self, factors: Sequence[Dim], sizes: Sequence[Size], keys: tuple[Key, ...], source: str
    ) -> Shape | None:
        """`factors` regrouped into `sizes` by merging and splitting only; None if that fails."""
        factors = [self.find(factor) for factor in factors]
        if len(factors) > MAX_FACTORS:
            return None
        groups = align_products(tuple(factor.key for factor in factors), keys)
        if any(len(ins) > 1 and len(outs) > 1 for ins, outs in groups):
            return None
        result: list[Dim] = []
        for ins, outs in groups:
            if len(outs) == 1:
                result.append(self.merged([factors[i] for i in ins], source))
            else:
                result.extend(self.split(factors[ins[0]], [sizes[j] for j in outs], source))
        return tuple(result) if len(result) == len(sizes) else None

    def _add_grid(self, dim: Dim, factors: Shape, is_merged: bool, source: str) -> None:
        dim = self.find(dim)
        if any(self.find(factor) is dim for factor in factors):
            return
        for grid in dim.grids:
            if self._reconciled(grid, factors, is_merged, source):
                if is_merged and not grid.is_merged:
                    grid.is_merged, grid.source = True, source
                return
        dim.grids.append(Grid(factors, is_merged, source))
        name = tuple(leaf.serial for leaf in self._leaves(factors, merged_only=True))
        known = self.find(self._merges.setdefault(name, dim))
        if known is not dim:
            self.unify(known, dim)

    def _reconciled(self, grid: Grid, factors: Shape, is_merged: bool, source: str) -> bool:
        """Unifies two decompositions of one dimension if one refines the other."""
        ours, theirs = grid.factors, factors
        for deep in (False, True):
            if deep:
                ours, theirs = self._leaves(ours), self._leaves(theirs)
            ours = tuple(self.find(factor) for factor in ours)
            theirs = tuple(self.find(factor) for factor in theirs)
            groups = align_products(
                tuple(factor.key for factor in ours), tuple(factor.key for factor in theirs)
            )
            if all(len(ins) == 1 or len(outs) == 1 for ins, outs in groups):
                break
        else:
            return False
        for ins, outs in groups:
            if len(ins) == len(outs) == 1:
                self.unify(ours[ins[0]], theirs[outs[0]])
            elif len(ins) == 1:
                parts = tuple(theirs[j] for j in outs)
                self._add_grid(ours[ins[0]], parts, is_merged, source)
            else:
                parts = tuple(ours[i] for i in ins)
                self._add_grid(theirs[outs[0]], parts, grid.is_merged, grid.source)
        return True

    def _add_segments(self, dim: Dim, segments: Shape) -> None:
        if any(self.find(segment) is dim for segment in segments):
            return
        if not dim.segments:
            dim.segments = segments
            return
        ours = self._flat(dim)
        theirs = tuple(part for segment in segments for part in self._flat(self.find(segment)))
        groups = align_sums(tuple(part.key for part in ours), tuple(part.key for part in theirs))
        for ins, outs in groups:
            if len(ins) == len(outs) == 1:
                self.unify(ours[ins[0]], theirs[outs[0]])
            elif len(ins) == 1:
                self._add_segments(self.find(ours[ins[0]]), tuple(theirs[j] for j in outs))
            elif len(outs) == 1:
                self._add_segments(self.find(theirs[outs[0]]), tuple(ours[i] for i in ins))

    def _between(self, parts: Shape, start: Key, stop: Key) -> Shape | None:
        boundary: Key = 0
        first = 0 if same_key(boundary, start) else None
        for i, part in enumerate(parts):
            boundary = boundary + part.key
            if first is None:
                first = i + 1 if same_key(boundary, start) else None
            elif same_key(boundary, stop):
                return parts[first : i + 1]
        return None


def _leading_units(keys: Sequence[Key], positions: Sequence[int]) -> int:
    """How many axes of size 1 a group starts with; one at position 0 is taken to be the batch."""
    count = 0
    for key, position in zip(keys, positions, strict=True):
        if key != 1:
            break
        count += position > 0
    return count
