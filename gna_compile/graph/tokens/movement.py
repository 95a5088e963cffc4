"""Operators that move elements and compute nothing: executed on the coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gna_compile.graph.nodes import operator_name
from gna_compile.graph.tokens.call import Call, Unruled, Value, rule
from gna_compile.graph.tokens.cells import (
    NONE,
    Cells,
    Source,
    Tokens,
    aligned,
    compressed,
    concatenated,
    elementwise,
    lattice,
    reshaped,
)

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)


# The result has the first operand's elements where they were.
@rule(
    *("type", "float", "double", "half", "bfloat16", "int", "long", "bool"),
    *("cpu", "cuda", "contiguous", "clone", "detach", "requires_grad", "alias", "identity"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("native_dropout", "softmax", "log_softmax", "softmin", "layer_norm", "rms_norm"),
    *("group_norm", "instance_norm", "batch_norm", "normalize", "local_response_norm", "tril"),
    *("triu", "prelu", "nan_to_num", "threshold", "dequantize", "view_as_self"),
    *("data", "real", "imag", "detach_copy", "lift_fresh_copy"),
)
def same(call: Call) -> Value:
    tokens = call.first
    return tokens if tokens.shape == call.result else None


# Of another tensor, if one is given, only the type matters.
@rule("to", "type_as", partial=True)
def typed(call: Call) -> Value:
    return same(call)


# New tensors: what they are like says nothing of what stands in them.
@rule(
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "randint_like"),
    *("zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "eye", "zero"),
    *("empty_strided", "new_empty_strided"),
    partial=True,
)
def new(call: Call) -> Value:
    return Tokens(call.result, {})


@rule("tensor", "scalar_tensor", "new_tensor")
def of_numbers(call: Call) -> Value:
    return Tokens(call.result, {})


@rule("arange", "linspace")
def counted(call: Call) -> Value:
    call.makes_source = True
    return lattice(Source(call.node.name, "table", call.result))


@rule(
    *("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "_reshape_alias"),
    *("flatten", "ravel", "unflatten"),
    partial=True,
)
def reshape(call: Call) -> Value:
    tokens, shape = call.first, call.result
    if isinstance(call.argument(1), torch.dtype) and shape != tokens.shape:
        raise Unruled
    if tokens.shape == shape:
        return tokens
    if 0 in shape:
        return Tokens(shape, {})
    moved = tokens.moved(shape, lambda cells: reshaped(cells, tokens.shape, shape))
    if len(shape) < len(tokens.shape):
        note_patches(moved)
    return moved


def note_patches(tokens: Tokens) -> None:
    """Notes an axis whose cells stand in a tensor as the patches of an image do.

    That is what becomes of tokens at the end of a model: (h, w) with patches (p, q) turn into an
    image (h * p, w * q), in which each token has p rows and q columns. Frames may be single.
    """
    for source, axes in tokens.cells.items():
        for i, array in enumerate(axes):
            dims = [] if array is None else [d for d, n in enumerate(array.shape) if n > 1]
            if array is None or not 2 <= len(dims) <= 3:
                continue
            small = array.reshape([array.shape[d] for d in dims])
            lines = [
                small[(0,) * k + (slice(None),) + (0,) * (len(dims) - k - 1)]
                for k in range(len(dims))
            ]
            repeats = [int(np.argmax(line != line[0])) for line in lines]
            if 0 in repeats or 1 in repeats[1:] or sum(r > 1 for r in repeats) < 2:
                continue
            if any(n % r for n, r in zip(small.shape, repeats, strict=True)):
                continue
            tokens_alone = small[tuple(slice(None, None, r) for r in repeats)]
            again = tokens_alone
            for k, r in enumerate(repeats):
                again = again.repeat(r, k)
            if (again == small).all():
                note_split(source, i, tokens_alone, range(len(dims)))


def note_split(source: Source, axis: int, array: Cells, dims: Sequence[int]) -> None:
    """Notes that an axis is used as the axes `dims`, if it is their raster from end to end.

    tokens [B, 6, C]  ->  unflatten(1, (2, 3))  ->  a convolution or the model's output image

    0 1 2 3 4 5           0 1 2                     the axis holds 2 x 3
                          3 4 5
    """
    sizes = tuple(array.shape[d] for d in dims)
    whole = array.reshape(-1)
    if whole.size == source.extents[axis] and (whole == np.arange(whole.size)).all():
        source.splits.setdefault(axis, set()).add(sizes)


@rule("permute")
def permute(call: Call) -> Value:
    tokens = call.first
    order = call.dims(list(call.rest(1, "dims")), len(tokens.shape))
    return permuted(tokens, order)


def permuted(tokens: Tokens, order: Sequence[int]) -> Tokens:
    shape = tuple(tokens.shape[i] for i in order)
    return tokens.moved(shape, lambda cells: cells.transpose(order))


def swapped(call: Call, rank: int) -> list[int]:
    order = list(range(rank))
    one = call.dim(call.argument(1, "dim0", "axis0"), rank)
    other = call.dim(call.argument(2, "dim1", "axis1"), rank)
    order[one], order[other] = order[other], order[one]
    return order


@rule("transpose")
def transpose(call: Call) -> Value:
    tokens = call.first
    return permuted(tokens, swapped(call, len(tokens.shape)))


@rule("t", "T", "mT", "mH", "H")
def matrix_transpose(call: Call) -> Value:
    tokens = call.first
    rank = len(tokens.shape)
    kept = 0 if operator_name(call.node) == "T" else max(rank - 2, 0)
    result = permuted(tokens, [*range(kept), *reversed(range(kept, rank))])
    if result.shape != call.result:
        raise Unruled
    return result


@rule("movedim")
def movedim(call: Call) -> Value:
    tokens = call.first
    rank = len(tokens.shape)
    sources = call.dims(call.argument(1, "source"), rank)
    targets = call.dims(call.argument(2, "destination"), rank)
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(i for i in range(rank) if i not in sources)
    return permuted(tokens, [moved[i] if i in moved else next(rest) for i in range(rank)])


@rule("unsqueeze")
def unsqueeze(call: Call) -> Value:
    tokens = call.first
    at = call.dim(call.argument(1, "dim"), len(tokens.shape) + 1)
    return inserted(tokens, at)


def inserted(tokens: Tokens, at: int) -> Tokens:
    shape = (*tokens.shape[:at], 1, *tokens.shape[at:])
    return tokens.moved(shape, lambda cells: np.expand_dims(cells, at))


def removed(tokens: Tokens, dims: Sequence[int]) -> Tokens:
    shape = tuple(n for d, n in enumerate(tokens.shape) if d not in dims)
    return tokens.moved(shape, lambda cells: cells.squeeze(tuple(dims)))


@rule("squeeze")
def squeeze(call: Call) -> Value:
    tokens = call.first
    named = call.rest(1, "dim")
    rank = len(tokens.shape)
    chosen = set(call.dims(list(named), rank)) if named else set(range(rank))
    result = removed(tokens, [d for d in sorted(chosen) if tokens.shape[d] == 1])
    if result.shape != call.result:
        raise Unruled  # a symbolic size that is 1 at this point only
    return result


@rule("expand", "expand_as", "broadcast_to", partial=True)
def expand(call: Call) -> Value:
    return widened(call.first, call.result)


def widened(tokens: Tokens, shape: tuple[int, ...]) -> Tokens:
    if tokens.shape == shape:
        return tokens
    return tokens.moved(shape, lambda cells: aligned(cells, len(shape)))


@rule("broadcast_tensors")
def broadcast_tensors(call: Call) -> Value:
    return [
        widened(call.tokens(item), shape)
        for item, shape in zip(call.rest(0, "tensors"), call.results, strict=True)
    ]


@rule("repeat", "tile")
def repeat(call: Call) -> Value:
    tokens, shape = call.first, call.result
    counts = [call.number(n) for n in call.rest(1, "repeats", "dims")]
    counts = [1] * (len(shape) - len(counts)) + counts

    def move(cells: Cells) -> Cells:
        cells = aligned(cells, len(shape))
        return np.tile(cells, [n if cells.shape[d] > 1 else 1 for d, n in enumerate(counts)])

    return tokens.moved(shape, move)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Value:
    tokens = call.first
    count = call.number(call.argument(1, "repeats"))
    dim = call.dim(call.argument(2, "dim"), len(tokens.shape))
    return tokens.moved(
        call.result,
        lambda cells: cells.repeat(count, dim) if cells.shape[dim] > 1 else cells,
    )


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Value:
    pieces = _pieces(call, call.argument(0, "tensors"))
    pieces = [tokens for tokens in pieces if tokens.shape != (0,)] or pieces
    dim = call.dim(call.argument(1, "dim", "axis", default=0), len(pieces[0].shape))
    return concatenated(pieces, dim)


@rule("stack")
def stack(call: Call) -> Value:
    pieces = _pieces(call, call.argument(0, "tensors"))
    dim = call.dim(call.argument(1, "dim", default=0), len(pieces[0].shape) + 1)
    return concatenated([inserted(tokens, dim) for tokens in pieces], dim)


def _pieces(call: Call, argument: Any) -> list[Tokens]:
    if not isinstance(argument, list | tuple) or not argument:
        raise Unruled
    return [call.tokens(item) for item in argument]


def along(tokens: Tokens, dim: int, move: Any, length: int) -> Tokens:
    """The tokens with coordinates moved along one dimension, which then has another length."""
    shape = (*tokens.shape[:dim], length, *tokens.shape[dim + 1 :])
    if length == 0:
        return Tokens(shape, {})
    return tokens.moved(
        shape, lambda cells: without_none(move(cells)) if cells.shape[dim] > 1 else cells
    )


def without_none(cells: Cells) -> Cells | None:
    """None if no element has a coordinate, else the array of size 1 where it does not vary."""
    return None if (cells == NONE).all() else cells


def sliced(tokens: Tokens, dim: int, start: int, stop: int, step: int = 1) -> Tokens:
    """Positions start, start + step, ... before stop, with 0 <= start <= stop <= size."""
    part = slice(start, stop, step)
    length = len(range(start, stop, step))
    if length == tokens.shape[dim]:
        return tokens
    at = (slice(None),) * dim + (part,)
    return along(tokens, dim, lambda cells: compressed(cells[at]), length)


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(2, "dim", default=0), len(tokens.shape))
    result: list[Value] = []
    start = 0
    for shape in call.results:
        result.append(sliced(tokens, dim, start, start + shape[dim]))
        start += shape[dim]
    return result


@rule("unbind")
def unbind(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim", default=0), len(tokens.shape))
    return [selected(tokens, dim, i) for i in range(tokens.shape[dim])]


def selected(tokens: Tokens, dim: int, index: int) -> Tokens:
    if not -tokens.shape[dim] <= index < tokens.shape[dim]:
        raise Unruled
    index %= tokens.shape[dim]
    return removed(sliced(tokens, dim, index, index + 1), [dim])


@rule("select")
def select(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim"), len(tokens.shape))
    return selected(tokens, dim, call.number(call.argument(2, "index")))


@rule("narrow")
def narrow(call: Call) -> Value:
    tokens = call.first
    dim = call.dim(call.argument(1, "dim"), len(tokens.shape))
    start = call.number(call.argument(2, "start")) % max(tokens.shape[dim], 1)
    return sliced(tokens, dim, start, start + call.number(call.argument(3, "length")))


@rule("roll")
def roll(call: Call) -> Value:
    tokens = call.first
    shifts, dims = call.argument(1, "shifts"), call.argument(2, "dims", default=())
    places = call.dims(dims if isinstance(dims, list | tuple) else (dims,), len(tokens.shape))
    counts = shifts if isinstance(shifts, list | tuple) else (shifts,)
    if not places or len(places) != len(counts):
        raise Unruled
    for dim, argument in zip(places, counts, strict=True):
        count = call.number(argument)
        if count and count % max(tokens.shape[dim], 1) == 0:
            raise Unruled  # a whole turn, at this point of symbolic sizes perhaps
        tokens = _rolled(tokens, dim, count)
    return tokens


def _rolled(tokens: Tokens, dim: int, count: int) -> Tokens:
    return along(tokens, dim, lambda cells: np.roll(cells, count, dim), tokens.shape[dim])


@rule("flip", "fliplr", "flipud")
def flip(call: Call) -> Value:
    tokens = call.first
    name = str(getattr(call.node.target, "__name__", call.node.target))
    named = {"fliplr": (1,), "flipud": (0,)}.get(name)
    dims = named or call.dims(list(call.rest(1, "dims")), len(tokens.shape))
    return tokens.moved(tokens.shape, lambda cells: np.flip(cells, dims))


@rule("unfold")
def unfold(call: Call) -> Value:
    tokens, shape = call.first, call.result
    if len(shape) != len(tokens.shape) + 1:
        raise Unruled  # of images (im2col)
    dim = call.dim(call.argument(1, "dimension"), len(tokens.shape))
    size, step = (call.number(call.argument(i, name)) for i, name in ((2, "size"), (3, "step")))

    def move(cells: Cells) -> Cells:
        if cells.shape[dim] == 1:
            return np.expand_dims(cells, -1)
        windows = np.lib.stride_tricks.sliding_window_view(cells, size, dim)
        return windows[(slice(None),) * dim + (slice(None, None, step),)]

    return tokens.moved(shape, move)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Value:
    tokens, shape = call.first, call.result
    factor = call.number(call.argument(1, "upscale_factor", "downscale_factor"))
    *batch, channels, height, width = tokens.shape
    rank, back = len(batch), (len(batch) + i for i in range(5))
    a, b, c, d, e = back
    if shape[-1] > width:
        parts = (*batch, channels // factor**2, factor, factor, height, width)
        order = (*range(rank), a, d, b, e, c)
    else:
        parts = (*batch, channels, height // factor, factor, width // factor, factor)
        order = (*range(rank), a, c, e, b, d)
    apart = tokens.moved(parts, lambda cells: reshaped(cells, tokens.shape, parts))
    turned = permuted(apart, order)
    moved = turned.moved(shape, lambda cells: reshaped(cells, turned.shape, shape))
    note_patches(moved)
    return moved


@rule("pad")
def pad(call: Call) -> Value:
    tokens = call.first
    amounts = [call.number(n) for n in call.argument(1, "pad")]
    mode = call.argument(2, "mode", default="constant")
    for i in range(len(amounts) // 2):
        dim = len(tokens.shape) - 1 - i
        before, after = amounts[2 * i : 2 * i + 2]
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            length = tokens.shape[dim]
            tokens = sliced(tokens, dim, max(-before, 0), length - max(-after, 0))
            before, after = max(before, 0), max(after, 0)
        if mode == "constant":
            tokens = concatenated(
                [
                    Tokens((*tokens.shape[:dim], n, *tokens.shape[dim + 1 :]), cells)
                    for n, cells in ((before, {}), (tokens.shape[dim], tokens.cells), (after, {}))
                    if n
                ],
                dim,
            )
        else:
            tokens = _padded(tokens, dim, before, after, str(mode))
    return tokens


_NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _padded(tokens: Tokens, dim: int, before: int, after: int, mode: str) -> Tokens:
    if mode not in _NUMPY_MODES:
        raise Unruled
    kind: Any = _NUMPY_MODES[mode]

    def move(cells: Cells) -> Cells:
        widths = [(before, after) if d == dim else (0, 0) for d in range(cells.ndim)]
        return np.pad(cells, widths, mode=kind)

    return along(tokens, dim, move, tokens.shape[dim] + before + after)


@rule("view_as_complex")
def view_as_complex(call: Call) -> Value:
    tokens = call.first
    return elementwise([selected(tokens, len(tokens.shape) - 1, i) for i in range(2)])


@rule("view_as_real")
def view_as_real(call: Call) -> Value:
    tokens = call.first
    return widened(inserted(tokens, len(tokens.shape)), call.result)


@rule("meshgrid")
def meshgrid(call: Call) -> Value:
    tensors = [call.tokens(item) for item in call.rest(0, "tensors")]
    places = list(range(len(tensors)))
    if call.node.kwargs.get("indexing", "ij") == "xy" and len(places) > 1:
        places[:2] = 1, 0
    shapes = call.results

    def placed(tokens: Tokens, place: int, shape: tuple[int, ...]) -> Tokens:
        ones = [1] * len(shape)
        ones[place] = tokens.shape[0] if tokens.shape else 1
        return tokens.moved(
            shape,
            lambda cells: cells.reshape(ones) if cells.size > 1 else cells.reshape([1] * len(ones)),
        )

    return [placed(*item) for item in zip(tensors, places, shapes, strict=True)]
