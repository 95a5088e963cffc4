"""Writes in place: what the tensor that is written to holds afterwards, and what it is a view of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from gna_compile.graph.nodes import operator_name, tensor_of
from gna_compile.graph.tokens.call import Call, Unruled, Value, rule
from gna_compile.graph.tokens.cells import (
    NONE,
    Cells,
    Tokens,
    compressed,
    concatenated,
    gathered,
    reshaped,
)
from gna_compile.graph.tokens.movement import (
    along,
    inserted,
    permuted,
    swapped,
    widened,
    without_none,
)
from gna_compile.graph.tokens.picking import bounds, gathering, spelled_out, within


@rule("setitem", "__setitem__")
def setitem(call: Call) -> Value:
    """The tokens of the tensor that is written to, after it."""
    tokens, index, value = call.first, call.argument(1), call.argument(2)
    written = (
        call.tokens(value)
        if isinstance(value, fx.Node) and tensor_of(value) is not None
        else Tokens((), {})
    )
    items = spelled_out(index, len(tokens.shape))
    if any(item is None or item is Ellipsis for item in items):
        raise Unruled
    if any(tensor_of(item) is not None for item in items):
        return _set_by_tensor(call, tokens, items, written)
    where = [
        slice(*bounds(call, item, n)) if isinstance(item, slice) else call.number(item) % max(n, 1)
        for item, n in zip(items, tokens.shape, strict=True)
    ]
    return overwritten(tokens, where, written)


def overwritten(tokens: Tokens, where: Sequence[Any], value: Tokens) -> Tokens:
    """A tensor after `tensor[where] = value`; `where` has an int or a slice for each dimension."""
    shape = tokens.shape
    spans = [
        range(w, w + 1) if isinstance(w, int) else range(w.start, w.stop, w.step) for w in where
    ]
    if any(len(span) == 0 for span in spans):
        return tokens
    partial = [d for d, span in enumerate(spans) if len(span) != shape[d]]
    kept = [d for d, w in enumerate(where) if not isinstance(w, int)]
    inner = tuple(len(spans[d]) for d in kept)
    value = widened(value, inner) if value.shape != inner else value
    # As a tensor of the target's rank.
    full = [1] * len(shape)

    def spread(cells: Cells) -> Cells:
        target = list(full)
        for d, n in zip(kept, cells.shape, strict=True):
            target[d] = n
        return cells.reshape(target)

    placed = value.moved([len(span) for span in spans], spread)
    if not partial:
        return placed
    sources = dict.fromkeys([*tokens.cells, *placed.cells])
    at = tuple(
        slice(span.start, span.stop, span.step) if d in partial else slice(None)
        for d, span in enumerate(spans)
    )
    cells = {}
    for source in sources:
        nothing = (None,) * len(source.extents)
        old, fresh = tokens.cells.get(source, nothing), placed.cells.get(source, nothing)
        cells[source] = tuple(
            _overwritten(one, other, shape, partial, at)
            for one, other in zip(old, fresh, strict=True)
        )
    return Tokens(shape, gathered(cells.items()))


def _overwritten(
    old: Cells | None, fresh: Cells | None, shape: tuple[int, ...], partial: list[int], at: Any
) -> Cells | None:
    if old is None and fresh is None:
        return None
    if old is not None and fresh is not None and old.shape == fresh.shape and (old == fresh).all():
        return old
    none = np.full((1,) * len(shape), NONE)
    old, fresh = (none if array is None else array for array in (old, fresh))
    common = list(
        np.broadcast_shapes(
            *(tuple(1 if d in partial else n for d, n in enumerate(a.shape)) for a in (old, fresh))
        )
    )
    for d in partial:
        common[d] = shape[d]
    result = np.array(np.broadcast_to(old, common))
    result[at] = fresh
    return without_none(compressed(result))


def _set_by_tensor(call: Call, tokens: Tokens, items: list[Any], value: Tokens) -> Tokens:
    """`tensor[:, index] = value`: executed if the index's values are known and all different."""
    at = next(i for i, item in enumerate(items) if tensor_of(item) is not None)
    if any(item != slice(None) for i, item in enumerate(items) if i != at):
        raise Unruled
    return _copied(call, tokens, at, items[at], value)


def _copied(call: Call, tokens: Tokens, dim: int, index: Any, value: Tokens) -> Tokens:
    values = call.index(index)
    if values is None or values.ndim != 1 or len(value.shape) > len(tokens.shape):
        raise Unruled
    values = within(values, tokens.shape[dim])
    if len(np.unique(values)) != len(values):
        raise Unruled
    target = (*tokens.shape[:dim], len(values), *tokens.shape[dim + 1 :])
    value = widened(value, target)
    # Written into the places that were not written before, then put in order.
    others = np.setdiff1d(np.arange(tokens.shape[dim]), values)
    rest = tokens.moved(
        (*tokens.shape[:dim], len(others), *tokens.shape[dim + 1 :]),
        lambda cells: cells.take(others, dim) if cells.shape[dim] > 1 else cells,
    )
    both = concatenated([value, rest], dim) if len(others) else value
    order = np.argsort(np.concatenate([values, others]))
    return along(both, dim, lambda cells: compressed(cells.take(order, dim)), tokens.shape[dim])


@rule("index_copy")
def index_copy(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim"), len(tokens.shape))
    return _copied(
        call, tokens, dim, call.argument(2, "index"), call.tokens(call.argument(3, "source"))
    )


@rule("scatter")
def scatter(call: Call) -> Value:
    """Values put where an index says, if it puts one on every place of a dimension."""
    tokens, index = call.first, call.argument(2, "index")
    if call.argument(4, "reduce") is not None:
        raise Unruled
    dim = call.dim(call.argument(1, "dim"), len(tokens.shape))
    values = call.index(index)
    if values is None or values.shape != tokens.shape:
        raise Unruled
    where = within(values, tokens.shape[dim])
    order = np.argsort(where, dim)
    if (np.take_along_axis(where, order, dim) != _counting(where.shape, dim)).any():
        raise Unruled
    source = call.tokens(call.argument(3, "src", "value"))
    return source.moved(
        tokens.shape, gathering(compressed(order.astype(np.int32)), dim, tokens.shape)
    )


def _counting(shape: tuple[int, ...], dim: int) -> npt.NDArray[np.int64]:
    return np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])


@rule("copy")
def copy(call: Call) -> Value:
    tokens = call.first
    return widened(call.tokens(call.argument(1, "src", "other")), tokens.shape)


@rule("slice_scatter")
def slice_scatter(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(2, "dim", default=0), len(tokens.shape))
    part = slice(*(call.argument(i, name) for i, name in ((3, "start"), (4, "end"), (5, "step"))))
    where: list[Any] = [slice(0, n, 1) for n in tokens.shape]
    where[dim] = slice(*bounds(call, part, tokens.shape[dim]))
    return overwritten(tokens, where, call.tokens(call.argument(1, "src")))


@rule("select_scatter")
def select_scatter(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(2, "dim"), len(tokens.shape))
    where: list[Any] = [slice(0, n, 1) for n in tokens.shape]
    where[dim] = call.number(call.argument(3, "index")) % max(tokens.shape[dim], 1)
    return overwritten(tokens, where, call.tokens(call.argument(1, "src")))


def written_through(call: Call, held: Value, base: Value) -> Value:
    """What a tensor, or a tuple of views of one, holds once a view of it holds `held`.

    Args:
        call: the call that made the view.
        held: what the view holds now.
        base: what it was a view of holds otherwise.

    Returns:
        None if that is not known.
    """
    name = operator_name(call.node)
    try:
        if isinstance(base, list):
            index = call.argument(1)
            if not isinstance(index, int) or not isinstance(held, Tokens):
                return None
            return [held if i == index else item for i, item in enumerate(base)]
        if not isinstance(base, Tokens):
            return None
        if isinstance(held, list):
            return _joined_again(call, name, held, base)
        if isinstance(held, Tokens):
            return _lifted(call, name, held, base)
    except (Unruled, ValueError, IndexError, TypeError):
        pass
    return None


def _joined_again(call: Call, name: str, held: Sequence[Value], base: Tokens) -> Value:
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split", "unbind"):
        return None
    pieces = [item for item in held if isinstance(item, Tokens)]
    at = 1 if name == "unbind" else 2
    dim = call.dim(call.argument(at, "dim", default=0), len(base.shape))
    if name == "unbind":
        pieces = [inserted(tokens, dim) for tokens in pieces]
    whole = concatenated(pieces, dim)
    return whole if whole.shape == base.shape else None


def _lifted(call: Call, name: str, held: Tokens, base: Tokens) -> Value:
    if name in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "detach"):
        return base if held is base else _reshaped_back(held, base)
    if name in ("transpose", "permute"):
        cells = np.arange(len(base.shape))
        order = (
            call.dims(list(call.rest(1, "dims")), len(cells))
            if name == "permute"
            else swapped(call, len(cells))
        )
        return permuted(held, [int(i) for i in np.argsort(order)])
    if name == "getitem":
        items = spelled_out(call.argument(1), len(base.shape))
        if any(item is None or tensor_of(item) is not None for item in items):
            return None
        where = [
            slice(*bounds(call, item, n))
            if isinstance(item, slice)
            else call.number(item) % max(n, 1)
            for item, n in zip(items, base.shape, strict=True)
        ]
        return overwritten(base, where, held)
    return None


def _reshaped_back(held: Tokens, base: Tokens) -> Tokens:
    return held.moved(base.shape, lambda cells: reshaped(cells, held.shape, base.shape))
