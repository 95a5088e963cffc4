"""Where tokens lie in a sequence, and the view of a tensor that has them."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from gna_compile.providers.portable.pieces import TokenGrid


class Place(NamedTuple):
    """A range of tokens, or a box of a grid of them.

    Attributes:
        start: the first token of the range or of the grid.
        length: tokens of the range or of the grid.
        shape: of the grid; () for a range.
        box: slices of the grid's axes.
        tokens: how many.
    """

    start: int
    length: int
    shape: tuple[int, ...]
    box: tuple[slice, ...]
    tokens: int

    @classmethod
    def of_range(cls, tokens: range) -> Place:
        return cls(tokens.start, len(tokens), (), (), len(tokens))

    @classmethod
    def of_box(cls, grid: TokenGrid, box: list[range]) -> Place:
        slices = tuple(slice(side.start, side.stop, side.step) for side in box)
        tokens = math.prod(map(len, box))
        return cls(grid.start, math.prod(grid.shape), grid.shape, slices, tokens)

    @property
    def rank(self) -> int:
        """Dimensions of the view's tokens."""
        return len(self.shape) or 1

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """The view of `tensor`, whose tokens lie along `dim`."""
        tokens = tensor.narrow(dim, self.start, self.length)
        if not self.shape:
            return tokens
        return tokens.unflatten(dim, self.shape)[(slice(None),) * dim + self.box]


def is_row(view: Tensor, last: int) -> bool:
    """Whether the dimensions 2 .. last are one evenly strided dimension."""
    stride = None
    for size, step in zip(view.shape[last:1:-1], view.stride()[last:1:-1], strict=True):
        if size == 1:
            continue
        if stride is not None and step != stride:
            return False
        stride = step * size
    return True
