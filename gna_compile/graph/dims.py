"""Identities of tensor dimensions, found by unification.

Every dimension of every value in a graph is a `Dim`: unknown inside, a concatenation of other
dimensions (text tokens, then image tokens), or the raster merge of several (T, H, W; slowest
first). Operators unify dimensions; a reshape reveals a merge in either direction. So what one end
of a graph knows about the tokens (patchify, unpatchify, a RoPE table) reaches every attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = Any  # int or torch.SymInt


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are provably equal; never installs a guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return left is right or statically_known_true(left == right)


class Dim:
    """One dimension; `find` gives its representative, which alone holds the structure."""

    __slots__ = ("_parent", "conflict", "parts", "raster", "size")

    def __init__(
        self,
        size: Size,
        *,
        parts: Sequence[Dim] | None = None,
        raster: Sequence[Dim] | None = None,
    ) -> None:
        self._parent: Dim | None = None
        self.size = size
        self.parts = list(parts) if parts else None
        self.raster = list(raster) if raster else None
        self.conflict = ""

    def find(self) -> Dim:
        root = self
        while root._parent is not None:
            root = root._parent
        while self._parent is not None:
            self._parent, self = root, self._parent
        return root

    @property
    def is_atom(self) -> bool:
        return self.parts is None and self.raster is None

    def segments(self) -> list[Dim]:
        """Representatives of the parts of a concatenation, or the dimension itself."""
        root = self.find()
        if root.parts is None:
            return [root]
        return [segment for part in root.parts for segment in part.segments()]

    def factors(self) -> list[Dim]:
        """Representatives of the axes of a raster merge, slowest first, or the dimension itself."""
        root = self.find()
        if root.raster is None:
            return [root]
        return [factor for axis in root.raster for factor in axis.factors()]


def unify(left: Dim, right: Dim) -> None:
    """Records that position i of one dimension is position i of the other."""
    left, right = left.find(), right.find()
    if left is right or not same_size(left.size, right.size):
        return
    if left.is_atom:
        left, right = right, left
    if right.is_atom:
        if any(right is piece for piece in (*left.segments(), *left.factors())):
            return
        left.conflict = left.conflict or right.conflict
        right._parent = left
    elif left.raster and right.raster:
        _unify_rasters(left, right)
    elif left.parts and right.parts:
        ours, theirs = left.segments(), right.segments()
        if len(ours) == len(theirs) and all(
            same_size(a.size, b.size) for a, b in zip(ours, theirs, strict=True)
        ):
            for a, b in zip(ours, theirs, strict=True):
                unify(a, b)
            right.find()._parent = left.find() if right.find() is not left.find() else None


def _unify_rasters(left: Dim, right: Dim) -> None:
    ours, theirs = left.factors(), right.factors()
    groups = align([d.size for d in ours], [d.size for d in theirs])
    if groups is None or any(len(a) > 1 and len(b) > 1 for a, b in groups):
        shapes = "x".join(str(d.size) for d in ours), "x".join(str(d.size) for d in theirs)
        left.conflict = f"the same tokens appear as {shapes[0]} and as {shapes[1]}"
        right.conflict = left.conflict
        return
    for a, b in groups:
        link([ours[i] for i in a], [theirs[i] for i in b])
    if right.find() is not left.find():
        right.find()._parent = left.find()


def link(before: Sequence[Dim], after: Sequence[Dim]) -> None:
    """Records one group of a reshape: the raster merge of `before` is that of `after`."""
    if len(before) == 1 and len(after) == 1:
        unify(before[0], after[0])
    elif len(after) == 1:
        unify(after[0], Dim(after[0].size, raster=before))
    elif len(before) == 1:
        unify(before[0], Dim(before[0].size, raster=after))


def align(
    before: Sequence[Size], after: Sequence[Size]
) -> list[tuple[list[int], list[int]]] | None:
    """Splits two shapes of equal volume into the finest groups of equal volume, or None.

    Reshape is row-major, so wherever the products of leading sizes agree, so do the positions.
    Dimensions of size 1 carry no position and are left out.
    """
    ours = [i for i, size in enumerate(before) if not same_size(size, 1)]
    theirs = [i for i, size in enumerate(after) if not same_size(size, 1)]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        a, b = [ours[i]], [theirs[j]]
        left, right = before[ours[i]], after[theirs[j]]
        i, j = i + 1, j + 1
        while not same_size(left, right):
            less = _hint(left) < _hint(right)
            if less and i < len(ours):
                left, a, i = left * before[ours[i]], [*a, ours[i]], i + 1
            elif not less and j < len(theirs):
                right, b, j = right * after[theirs[j]], [*b, theirs[j]], j + 1
            else:
                return None
        groups.append((a, b))
    return groups if i == len(ours) and j == len(theirs) else None


def _hint(size: Size) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return hint if isinstance(hint, int) else math.prod([1])
