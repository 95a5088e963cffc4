"""Operators that pick elements by an index: executed on the coordinates, where the index is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from gna_compile.graph.nodes import tensor_of
from gna_compile.graph.tokens.call import Call, Unruled, Value, rule
from gna_compile.graph.tokens.cells import (
    Cells,
    Tokens,
    compressed,
    elementwise,
    expanded,
)
from gna_compile.graph.tokens.movement import _WHOLE, inserted, selected, sliced


@rule("getitem", "__getitem__")
def getitem(call: Call) -> Value:
    return indexed(call, call.first, call.argument(1))


def indexed(call: Call, tokens: Tokens, index: Any) -> Tokens:
    """`tensor[index]` for ints, slices, None, Ellipsis and at most one tensor of ints."""
    items = spelled_out(index, len(tokens.shape))
    tensors = sum(tensor_of(item) is not None for item in items)
    if tensors > 1 or (tensors and any(_is_number(item) for item in items)):
        raise Unruled  # the picked dimensions may come first
    dim = 0
    for item in items:
        if item is None:
            tokens = inserted(tokens, dim)
            dim += 1
        elif isinstance(item, slice):
            tokens = sliced(tokens, dim, *bounds(call, item, tokens.shape[dim]))
            dim += 1
        elif tensor_of(item) is not None:
            tokens = picked(call, tokens, dim, item)
            dim += len(call.tokens(item).shape)
        else:
            tokens = selected(tokens, dim, call.number(item))
    return tokens


def spelled_out(index: Any, rank: int) -> list[Any]:
    """An index with slices for what `...` and its end leave out."""
    items = list(index) if isinstance(index, tuple) else [index]
    missing = rank - sum(item is not None and item is not Ellipsis for item in items)
    at = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    items[at : at + 1] = [slice(None)] * missing
    return items


def _is_number(item: Any) -> bool:
    return isinstance(item, int) or (isinstance(item, fx.Node) and tensor_of(item) is None)


def bounds(call: Call, item: slice, length: int) -> tuple[int, int, int]:
    """A slice's bounds within a dimension, as numbers."""
    numbers = [None if n is None else call.number(n) for n in (item.start, item.stop, item.step)]
    start, stop, step = slice(*numbers).indices(length)
    if step < 1:
        raise Unruled
    return start, max(start, stop), step


def picked(call: Call, tokens: Tokens, dim: int, index: fx.Node) -> Tokens:
    """The positions along a dimension that a tensor of ints names.

    Where its values are not known, what is picked is not, either; but it lies as the ints do.
    """
    tensor = tensor_of(index)
    if tensor is None or tensor.dtype not in _WHOLE:
        raise Unruled
    where = call.tokens(index)
    shape = (*tokens.shape[:dim], *where.shape, *tokens.shape[dim + 1 :])
    if 0 in shape:
        return Tokens(shape, {})
    rank = len(where.shape)
    values = call.index(index)
    if values is not None:
        values = within(values, tokens.shape[dim])

        def move(cells: Cells) -> Cells:
            if cells.shape[dim] == 1:
                return cells.reshape((*cells.shape[:dim], *(1,) * rank, *cells.shape[dim + 1 :]))
            return cells.take(values, dim)

        return tokens.moved(shape, move)
    taken = (
        call.opaque([tokens], shape)
        if _depends_on(tokens, dim)
        else _stretched(tokens, dim, rank, shape)
    )
    after = len(tokens.shape) - dim - 1
    lies = where.moved(
        (*where.shape, *(1,) * after), lambda cells: cells.reshape(*cells.shape, *(1,) * after)
    )
    return elementwise([taken, lies])


def _depends_on(tokens: Tokens, dim: int) -> bool:
    return any(
        array is not None and array.shape[dim] > 1
        for axes in tokens.cells.values()
        for array in axes
    )


def _stretched(tokens: Tokens, dim: int, rank: int, shape: tuple[int, ...]) -> Tokens:
    return tokens.moved(
        shape,
        lambda cells: cells.reshape((*cells.shape[:dim], *(1,) * rank, *cells.shape[dim + 1 :])),
    )


def within(values: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    if ((values < -length) | (values >= length)).any():
        raise Unruled
    return values % length


@rule("index_select")
def index_select(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim"), len(tokens.shape))
    return picked(call, tokens, dim, call.argument(2, "index"))


@rule("gather", "take_along_dim")
def gather(call: Call) -> Value:
    tokens = call.first
    if call.node.target is torch.take_along_dim or call.node.target == "take_along_dim":
        index, dim = call.argument(1, "indices"), call.argument(2, "dim")
    else:
        dim, index = call.argument(1, "dim"), call.argument(2, "index")
    values = call.index(index)
    at = call.dim(dim, len(tokens.shape))
    shape = call.result
    if values is None or values.ndim != len(shape):
        raise Unruled
    where = compressed(within(values, tokens.shape[at]).astype(np.int32))

    if where.shape[at] == 1 and shape[at] > 1:  # one position, picked again and again
        where = expanded(where, shape, [at])
    return tokens.moved(shape, gathering(where, at, shape))


def gathering(where: Cells, at: int, shape: tuple[int, ...]) -> Callable[[Cells], Cells]:
    """Picks along dimension `at` what `where` says; other dimensions broadcast."""

    def move(cells: Cells) -> Cells:
        if cells.shape[at] == 1:
            return cells
        # Those of the operand may be longer than the index's.
        short = cells[
            tuple(
                slice(None) if d == at or cells.shape[d] == 1 else slice(0, n)
                for d, n in enumerate(shape)
            )
        ]
        common = np.broadcast_shapes(
            *((*a.shape[:at], 1, *a.shape[at + 1 :]) for a in (short, where))
        )
        return np.take_along_axis(
            np.broadcast_to(short, (*common[:at], short.shape[at], *common[at + 1 :])),
            np.broadcast_to(where, (*common[:at], where.shape[at], *common[at + 1 :])),
            at,
        )

    return move
