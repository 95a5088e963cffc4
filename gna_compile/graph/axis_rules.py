"""What each operator does to the dimensions of its operands: one rule per operator.

A rule takes the operands' dimensions and returns the result's, unifying what the operator aligns.
Operators are listed, not guessed: one without a rule yields dimensions of which nothing is known,
so `roll`, `flip`, `sort`, `gather` and whatever is not here end an identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import fx

from gna_compile.graph.align import Group, key_of, same_key
from gna_compile.graph.axes import Axes, Dim, Shape
from gna_compile.graph.values import Size, argument_of, is_known, tensor_of

Value: TypeAlias = "Shape | list[Value] | None"
"""The dimensions of a tensor, a list for a tuple of tensors, None for anything else."""


class Operands:
    """One call in the graph, with the dimensions of what it is called on."""

    def __init__(self, axes: Axes, node: fx.Node, known: Mapping[fx.Node, Value]) -> None:
        self.axes, self.node, self._known = axes, node, known

    def shape(self, argument: Any) -> Shape:
        """Dimensions of a tensor operand.

        Raises:
            Unruled: if it is no tensor, or not recorded.
        """
        value = self._known.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(value, tuple):
            raise Unruled
        return value

    def argument(self, index: int, *names: str, default: Any = None) -> Any:
        return argument_of(self.node, index, *names, default=default)

    @property
    def first(self) -> Shape:
        return self.shape(self.argument(0, "input", "self", "x"))

    def tensors(self) -> Iterator[Shape]:
        for node in self.node.all_input_nodes:
            value = self._known.get(node)
            if isinstance(value, tuple):
                yield value

    def rest(self, start: int, *names: str) -> tuple[Any, ...]:
        """Trailing arguments given one by one or as one sequence."""
        values = self.node.args[start:]
        if not values:
            found = next((self.node.kwargs[name] for name in names if name in self.node.kwargs), ())
            values = (found,)
        if len(values) == 1 and isinstance(values[0], list | tuple):
            values = tuple(values[0])
        return tuple(values)

    @property
    def first_sizes(self) -> Sequence[Size]:
        tensor = tensor_of(self.argument(0, "input", "self", "x"))
        if tensor is None:
            raise Unruled
        return tensor.shape

    @property
    def result_sizes(self) -> Sequence[Size]:
        tensor = tensor_of(self.node)
        if tensor is None:
            raise Unruled
        return tensor.shape

    def fresh(self, size: Size) -> Dim:
        return self.axes.new(size)

    def disordered(self, size: Size) -> Dim:
        """A dimension along which order may mean nothing."""
        return self.axes.new(size, opaque=True)


class Unruled(Exception):
    """The operator is called in a form that its rule does not cover."""


Rule = Callable[[Operands], Value]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def rule_for(name: str) -> Rule | None:
    """The rule of the operator that `operator_name` calls `name`."""
    rule = RULES.get(name)
    if rule is None and _is_pointwise(name):
        rule = RULES[name] = pointwise
    return rule


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def literal(argument: Any) -> int:
    """A plain int argument (a dimension's index, a count)."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("example_value")
    if isinstance(argument, bool) or not isinstance(argument, int):
        raise Unruled
    return argument


def size_of(argument: Any) -> Size:
    """An int argument that may be symbolic."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("example_value")
    if isinstance(argument, bool) or not isinstance(argument, int | torch.SymInt):
        raise Unruled
    return argument


def position(argument: Any, rank: int) -> int:
    """A dimension's index, counted from the front."""
    index = literal(argument)
    if not -rank <= index < max(rank, 1):
        raise Unruled
    return index % rank if rank else 0


def replaced(shape: Shape, index: int, dims: Sequence[Dim]) -> Shape:
    return (*shape[:index], *dims, *shape[index + 1 :])


def broadcast(axes: Axes, shapes: Sequence[Shape]) -> Shape:
    """The dimensions of an elementwise result; aligned operand dimensions become one."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = [axes.unit] * rank
    for shape in shapes:
        offset = rank - len(shape)
        for i, dim in enumerate(shape, offset):
            if not dim.is_unit:
                result[i] = dim if result[i].is_unit else axes.unify(result[i], dim)
    return tuple(result)


# Elementwise operators that carry no pointwise tag under this name.
@_rule(
    *("and", "or", "xor", "invert", "pos", "lshift", "rshift", "floordiv", "truediv", "mod"),
    *("float_power", "floor_divide", "polar", "complex", "real", "imag", "conj", "resolve_conj"),
    *("resolve_neg", "copy", "fill", "swapaxes_", "square", "__and__", "__or__", "__xor__"),
    *("logical_and", "logical_or", "logical_not", "imod", "ipow", "ifloordiv", "iand", "ior"),
)
def pointwise(call: Operands) -> Value:
    return broadcast(call.axes, list(call.tensors()))


# The result has the first operand's dimensions, whatever else is passed.
@_rule(
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool"),
    *("cpu", "cuda", "contiguous", "clone", "detach", "requires_grad", "alias", "view_as_self"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("native_dropout", "softmax", "log_softmax", "softmin", "gumbel_softmax"),
    *("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "normalize"),
    *("local_response_norm", "cumsum", "cumprod", "tril", "triu", "zero", "identity", "prelu"),
    *("masked_fill", "nan_to_num", "threshold", "dequantize", "fake_quantize_per_tensor_affine"),
)
def same(call: Operands) -> Value:
    return call.first


@_rule("view", "reshape", "view_as", "reshape_as", "_unsafe_view", "_reshape_alias")
def reshape(call: Operands) -> Value:
    return call.axes.reshaped(call.first, call.first_sizes, call.result_sizes, "reshape")


@_rule("flatten", "ravel")
def flatten(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    if not shape:
        return (call.axes.unit,)
    start = position(call.argument(1, "start_dim", default=0), len(shape))
    stop = position(call.argument(2, "end_dim", default=-1), len(shape))
    groups = _run(len(shape), start, stop + 1, start + 1)
    return call.axes.reshaped(shape, call.first_sizes, sizes, "flatten", groups)


@_rule("unflatten")
def unflatten(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    start = position(call.argument(1, "dim"), len(shape))
    stop = start + 1 + len(sizes) - len(shape)
    groups = _run(len(shape), start, start + 1, stop)
    return call.axes.reshaped(shape, call.first_sizes, sizes, "unflatten", groups)


def _run(rank: int, start: int, stop: int, new_stop: int) -> list[Group]:
    """Groups of a reshape that turns the dimensions start .. stop into start .. new_stop."""
    moved = new_stop - stop
    return [
        *(((i,), (i,)) for i in range(start)),
        (tuple(range(start, stop)), tuple(range(start, new_stop))),
        *(((i,), (i + moved,)) for i in range(stop, rank)),
    ]


@_rule("permute")
def permute(call: Operands) -> Value:
    shape = call.first
    return tuple(shape[position(i, len(shape))] for i in call.rest(1, "dims"))


@_rule("transpose")
def transpose(call: Operands) -> Value:
    shape = list(call.first)
    one = position(call.argument(1, "dim0", "axis0"), len(shape))
    other = position(call.argument(2, "dim1", "axis1"), len(shape))
    shape[one], shape[other] = shape[other], shape[one]
    return tuple(shape)


@_rule("t", "T", "numpy_T", "adjoint", "mT", "mH", "H")
def matrix_transpose(call: Operands) -> Value:
    shape = call.first
    return (*shape[:-2], *reversed(shape[-2:]))


@_rule("movedim", "moveaxis")
def movedim(call: Operands) -> Value:
    shape = call.first
    sources = _as_tuple(call.argument(1, "source"))
    targets = _as_tuple(call.argument(2, "destination"))
    rank = len(shape)
    moved = {
        position(target, rank): position(source, rank)
        for source, target in zip(sources, targets, strict=True)
    }
    rest = iter(i for i in range(rank) if i not in moved.values())
    return tuple(shape[moved[i] if i in moved else next(rest)] for i in range(rank))


def _as_tuple(argument: Any) -> tuple[Any, ...]:
    return tuple(argument) if isinstance(argument, list | tuple) else (argument,)


@_rule("unsqueeze")
def unsqueeze(call: Operands) -> Value:
    shape = call.first
    index = position(call.argument(1, "dim"), len(shape) + 1)
    return (*shape[:index], call.axes.unit, *shape[index:])


@_rule("squeeze")
def squeeze(call: Operands) -> Value:
    shape = call.first
    named = call.rest(1, "dim")
    chosen = {position(i, len(shape)) for i in named} if named else set(range(len(shape)))
    return tuple(dim for i, dim in enumerate(shape) if not (dim.is_unit and i in chosen))


@_rule("expand", "expand_as", "broadcast_to")
def expand(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    added = len(sizes) - len(shape)
    leading = tuple(call.fresh(size) for size in sizes[:added])
    return leading + tuple(
        call.fresh(size) if dim.is_unit else dim
        for dim, size in zip(shape, sizes[added:], strict=True)
    )


@_rule("repeat", "tile")
def repeat(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    counts = call.rest(1, "repeats", "dims")
    shape = (call.axes.unit,) * (len(sizes) - len(shape)) + shape
    counts = (1,) * (len(sizes) - len(counts)) + counts
    return tuple(
        dim
        if isinstance(count, int) and count == 1
        else (call.fresh(size) if dim.is_unit else call.disordered(size))
        for dim, size, count in zip(shape, sizes, counts, strict=True)
    )


@_rule("repeat_interleave")
def repeat_interleave(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    index = position(call.argument(2, "dim"), len(shape))
    return replaced(shape, index, [call.fresh(sizes[index])])


@_rule("cat", "concat", "concatenate")
def cat(call: Operands) -> Value:
    shapes = _shapes(call, call.argument(0, "tensors"))
    shapes = [shape for shape in shapes if not _is_legacy_empty(shape)]
    rank = len(shapes[0])
    index = position(call.argument(1, "dim", "axis", default=0), rank)
    whole = call.axes.concatenated([shape[index] for shape in shapes])
    others = broadcast(call.axes, [replaced(shape, index, [call.axes.unit]) for shape in shapes])
    return replaced(others, index, [whole])


@_rule("stack")
def stack(call: Operands) -> Value:
    shapes = _shapes(call, call.argument(0, "tensors"))
    index = position(call.argument(1, "dim", default=0), len(shapes[0]) + 1)
    shape = broadcast(call.axes, shapes)
    return (*shape[:index], call.disordered(len(shapes)), *shape[index:])


def _shapes(call: Operands, argument: Any) -> list[Shape]:
    if not isinstance(argument, list | tuple) or not argument:
        raise Unruled
    return [call.shape(item) for item in argument]


def _is_legacy_empty(shape: Shape) -> bool:
    return len(shape) == 1 and shape[0].key == 0  # `cat` ignores a tensor of shape (0,)


@_rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(call: Operands) -> Value:
    shape = call.first
    index = position(call.argument(2, "dim", default=0), len(shape))
    pieces = call.node.meta.get("example_value")
    if not isinstance(pieces, list | tuple):
        raise Unruled
    result: list[Value] = []
    start: Size = 0
    for piece in pieces:
        stop = start + piece.shape[index]
        result.append(replaced(shape, index, [call.axes.sliced(shape[index], start, stop)]))
        start = stop
    return result


@_rule("unbind")
def unbind(call: Operands) -> Value:
    shape = call.first
    index = position(call.argument(1, "dim", default=0), len(shape))
    pieces = call.node.meta.get("example_value")
    if not isinstance(pieces, list | tuple):
        raise Unruled
    return [replaced(shape, index, [])] * len(pieces)


@_rule("select")
def select(call: Operands) -> Value:
    shape = call.first
    return replaced(shape, position(call.argument(1, "dim"), len(shape)), [])


@_rule("narrow")
def narrow(call: Operands) -> Value:
    shape = call.first
    index = position(call.argument(1, "dim"), len(shape))
    start = _bound(size_of(call.argument(2, "start")), shape[index].size)
    length = size_of(call.argument(3, "length"))
    return replaced(shape, index, [call.axes.sliced(shape[index], start, start + length)])


@_rule("getitem", "__getitem__")
def getitem(call: Operands) -> Value:
    return indexed(call, call.first, call.argument(1))


@_rule("setitem", "__setitem__")
def setitem(call: Operands) -> Value:
    target = indexed(call, call.first, call.argument(1))
    value = call.argument(2)
    if isinstance(value, fx.Node):
        call.axes.unify_shapes(target, call.shape(value))
    return None


def indexed(call: Operands, shape: Shape, index: Any) -> Shape:
    """The dimensions of `tensor[index]` for ints, slices, None, Ellipsis and one tensor of ints.

    What a tensor of ints picks lies as the ints do, not as what it is picked from.
    """
    items = index if isinstance(index, tuple) else (index,)
    picks = [item for item in items if isinstance(item, int | fx.Node)]
    if len(picks) > 1 and any(_is_int_tensor(item) for item in picks):
        raise Unruled  # the picked dimensions may come first
    taken = sum(item is not None and item is not Ellipsis for item in items)
    result: list[Dim] = []
    at = 0
    for item in items:
        if item is None:
            result.append(call.axes.unit)
        elif item is Ellipsis:
            stop = len(shape) - (taken - at)
            result.extend(shape[at:stop])
            at = stop
        elif isinstance(item, slice):
            result.append(_sliced(call, shape[at], item))
            at += 1
        else:
            if _is_int_tensor(item):
                result.extend(call.shape(item))
            else:
                size_of(item)
            at += 1
    return (*result, *shape[at:])


def _is_int_tensor(item: Any) -> bool:
    tensor = tensor_of(item)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8)
    return tensor is not None and tensor.dtype in whole


def _sliced(call: Operands, dim: Dim, item: slice) -> Dim:
    if dim.is_unit and item == slice(None):
        return dim
    step = 1 if item.step is None else size_of(item.step)
    start = 0 if item.start is None else _bound(size_of(item.start), dim.size)
    stop = dim.size if item.stop is None else _bound(size_of(item.stop), dim.size)
    if isinstance(start, int) and isinstance(stop, int):
        stop = max(start, stop)
    return call.axes.sliced(dim, start, stop, step)


def _bound(bound: Size, size: Size) -> Size:
    """A slice's bound, counted from the front and within the dimension as far as can be told."""
    if is_known(bound < 0):
        bound = size + bound
    if isinstance(bound, int) and isinstance(size, int):
        return min(max(bound, 0), size)
    return bound


@_rule("linear")
def linear(call: Operands) -> Value:
    return (*call.first[:-1], call.fresh(call.result_sizes[-1]))


@_rule("matmul", "mm", "mv", "dot")
def matmul(call: Operands) -> Value:
    left = call.first
    right = call.shape(call.argument(1, "other", "mat2", "tensor2", "vec"))
    return _product(call, left, right)


@_rule("addmm", "baddbmm", "addbmm")
def addmm(call: Operands) -> Value:
    left = call.shape(call.argument(1, "mat1", "batch1"))
    right = call.shape(call.argument(2, "mat2", "batch2"))
    result = _product(call, left, right)
    call.axes.unify_shapes(result, call.first)
    return result


def _product(call: Operands, left: Shape, right: Shape) -> Shape:
    call.axes.unify(left[-1], right[-2] if len(right) > 1 else right[-1])
    batch = broadcast(call.axes, [left[:-2], right[:-2]])
    rows = (left[-2],) if len(left) > 1 else ()
    columns = (right[-1],) if len(right) > 1 else ()
    return (*batch, *rows, *columns)


@_rule("outer")
def outer(call: Operands) -> Value:
    return (*call.first, *call.shape(call.argument(1, "vec2")))


@_rule("einsum")
def einsum(call: Operands) -> Value:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation:
        raise Unruled
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters: dict[str, Dim] = {}
    terms = inputs.split(",")
    for term, operand in zip(terms, operands, strict=True):
        for letter, dim in zip(term, call.shape(operand), strict=True):
            known = letters.get(letter, call.axes.unit)
            letters[letter] = dim if known.is_unit else call.axes.unify(known, dim)
    if not arrow:
        output = "".join(sorted(letter for letter in letters if inputs.count(letter) == 1))
    return tuple(letters[letter] for letter in output)


@_rule("meshgrid")
def meshgrid(call: Operands) -> Value:
    tensors = call.rest(0, "tensors")
    dims = [shape[0] if (shape := call.shape(item)) else call.axes.unit for item in tensors]
    if call.node.kwargs.get("indexing", "ij") == "xy" and len(dims) > 1:
        dims[:2] = dims[1], dims[0]
    return [tuple(dims)] * len(tensors)


@_rule("embedding")
def embedding(call: Operands) -> Value:
    sizes = call.result_sizes
    operands = [call.argument(i, name) for i, name in enumerate(("input", "weight"))]
    for operand in operands:  # ids come first in one form of the call, the table in the other
        shape = call.shape(operand)
        tensor = tensor_of(operand)
        if tensor is not None and not tensor.dtype.is_floating_point:
            return (*shape, call.fresh(sizes[-1]))
    raise Unruled


@_rule("view_as_complex")
def view_as_complex(call: Operands) -> Value:
    return call.first[:-1]


@_rule("view_as_real")
def view_as_real(call: Operands) -> Value:
    return (*call.first, call.fresh(2))


@_rule("conv1d", "conv2d", "conv3d")
def conv(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    spatial = len(call.shape(call.argument(1, "weight"))) - 2
    stride = _as_tuple(call.argument(3, "stride", default=1))
    channel = len(shape) - spatial - 1
    result = [*shape[:channel], call.fresh(sizes[channel])]
    for dim, size in zip(shape[channel + 1 :], sizes[channel + 1 :], strict=True):
        # Padding is symmetric: with stride 1, an equal size means that no position moved.
        stays = set(stride) == {1} and same_key(dim.key, key_of(size))
        result.append(_spatial(call, dim if stays else call.fresh(size)))
        _spatial(call, dim)
    return tuple(result)


@_rule(
    *("interpolate", "upsample", "grid_sample", "pixel_shuffle", "pixel_unshuffle"),
    *("avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool3d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "conv_transpose2d", "conv_transpose3d"),
)
def resampled(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    for dim in shape[2:]:
        _spatial(call, dim)
    channel = shape[1] if shape[1].key == key_of(sizes[1]) else call.fresh(sizes[1])
    return (shape[0], channel, *(_spatial(call, call.fresh(size)) for size in sizes[2:]))


def _spatial(call: Operands, dim: Dim) -> Dim:
    dim = call.axes.find(dim)
    if not dim.is_unit:
        dim.is_spatial = True
    return dim


@_rule("pad")
def pad(call: Operands) -> Value:
    shape, sizes = call.first, call.result_sizes
    amounts = list(call.argument(1, "pad"))
    result = list(shape)
    is_constant = call.argument(2, "mode", default="constant") == "constant"
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i : 2 * i + 2]
        index = len(shape) - 1 - i
        if before == after == 0:
            continue
        if is_constant and all(isinstance(n, int) and n >= 0 for n in (before, after)):
            around = [call.fresh(before), shape[index], call.fresh(after)]
            result[index] = call.axes.concatenated(around)
        else:
            result[index] = call.disordered(sizes[index])
    return tuple(result)


@_rule(
    *("mean", "sum", "prod", "amax", "amin", "any", "all", "norm", "std", "var", "var_mean"),
    *("std_mean", "logsumexp", "argmax", "argmin", "nansum", "nanmean", "count_nonzero", "median"),
)
def reduction(call: Operands) -> Value:
    shape = call.first
    chosen = call.argument(1, "dim", "axis")
    reduced = (
        range(len(shape))
        if chosen is None
        else [position(i, len(shape)) for i in _as_tuple(chosen)]
    )
    result = call.node.meta.get("example_value")
    pieces = result if isinstance(result, list | tuple) else [result]
    keeps = isinstance(pieces[0], torch.Tensor) and pieces[0].dim() == len(shape)
    reducing = [call.axes.unit] if keeps else []
    left = tuple(
        dim for i, kept in enumerate(shape) for dim in (reducing if i in reduced else [kept])
    )
    return [left] * len(pieces) if isinstance(result, list | tuple) else left


@_rule("max", "min")
def extremum(call: Operands) -> Value:
    other = call.argument(1, "other", "dim")
    if isinstance(other, fx.Node) and tensor_of(other) is not None:
        return pointwise(call)
    return reduction(call)


@_rule("scaled_dot_product_attention")
def attention(call: Operands) -> Value:
    query = call.first
    key = call.shape(call.argument(1, "key"))
    value = call.shape(call.argument(2, "value"))
    axes = call.axes
    axes.unify(query[-1], key[-1])
    axes.unify(key[-2], value[-2])
    broadcast(axes, [query[:-3], key[:-3], value[:-3]])
    if len(key) > 2:
        axes.unify(key[-3], value[-3])
    return (*query[:-1], value[-1])


@_rule("getattr")
def attribute(call: Operands) -> Value:
    rule = RULES.get(str(call.argument(1)))
    if rule not in (matrix_transpose, pointwise):
        raise Unruled
    return rule(call) if rule is matrix_transpose else call.first
