"""Follows dimensions through a Dynamo graph, operator by operator, subgraphs included.

Only operators that are known to keep a dimension's positions unify anything. Any other operator
(roll, flip, sort, gather, indexing by a tensor, convolution ...) gives new dimensions: identity is
lost there, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from gna_compile.graph.dims import Dim, align, link, same_size, unify

Dims = list[Dim]

_POINTWISE = frozenset(
    """
    add sub mul truediv div true_divide floordiv floor_divide pow neg abs exp log sqrt rsqrt
    reciprocal square sin cos tanh sigmoid silu gelu relu leaky_relu elu softplus mish hardswish
    iadd isub imul itruediv radd rsub rmul where clamp clip nan_to_num maximum minimum addcmul lerp
    masked_fill eq ne lt le gt ge logical_and logical_or logical_not and_ or_ xor invert
    to float half bfloat16 double type type_as contiguous clone detach alias copy dropout
    softmax log_softmax empty_like zeros_like ones_like full_like rand_like randn_like
    polar real imag conj normalize expand expand_as broadcast_to repeat _to_copy pos positive
    """.split()
)
_FIRST_OPERAND = frozenset(
    """
    layer_norm rms_norm group_norm instance_norm batch_norm linear embedding view_as_complex
    view_as_real repeat_interleave
    """.split()
)
_RESHAPES = frozenset("reshape view flatten unflatten squeeze unsqueeze ravel view_as".split())
_SPLITS = frozenset("chunk split tensor_split split_with_sizes unsafe_chunk unsafe_split".split())


def shape_of(node: Any) -> Sequence[Any] | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, torch.Tensor) else None


class DimFlow:
    """The dimensions of every tensor in `gm`; `dims(node)` gives them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._known: dict[fx.Node, Any] = {}
        self._visit(gm)

    def dims(self, node: fx.Node) -> Dims:
        """One `Dim` for each dimension of a tensor-valued node."""
        if node not in self._known:
            self._known[node] = _new(node.meta.get("example_value"))
        return self._known[node]

    def _visit(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self._apply(gm, node)

    def _apply(self, gm: fx.GraphModule, node: fx.Node) -> None:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        name = str(name).removesuffix(".default")
        bodies = _bodies(gm, node)
        if bodies:
            self._subgraphs(node, bodies)
        elif name == "getitem":
            self._getitem(node)
        elif name == "setitem":
            target, index, value = node.args
            if isinstance(target, fx.Node) and shape_of(value) is not None:
                self._broadcast(self._indexed(self.dims(target), index), self.dims(value))  # type: ignore[arg-type]
        elif name in ("cat", "concat", "concatenate", "stack"):
            self._join(node, stacked=name == "stack")
        elif name in _SPLITS:
            self._split(node)
        elif name == "unbind":
            dim = _dim_argument(node, 1, 0)
            source = self._first(node)
            if source:
                kept = [d for i, d in enumerate(source) if i != dim % len(source)]
                self._known[node] = [kept for _ in node.meta["example_value"]]
        elif shape_of(node) is not None:
            self._tensor(node, name if name in _POINTWISE else name.strip("_"))

    def _tensor(self, node: fx.Node, name: str) -> None:
        first = self._first(node)
        out = self.dims(node)
        if name in _POINTWISE:
            for operand in node.all_input_nodes:
                if shape_of(operand) is not None:
                    self._broadcast(out, self.dims(operand))
        elif name in ("matmul", "bmm"):
            self._matmul(out, first, self._argument(node, 1, "other", "mat2"))
        elif name == "baddbmm":
            batch1, batch2 = self._argument(node, 1, "batch1"), self._argument(node, 2, "batch2")
            self._matmul(out, batch1, batch2)
        elif name == "einsum":
            self._einsum(node, out)
        elif name == "scaled_dot_product_attention":
            self._attention(node, out)
        elif first is None:
            return
        elif name in _FIRST_OPERAND:
            for ours, theirs in zip(out, first, strict=False):
                unify(ours, theirs)
        elif name in _RESHAPES:
            self._reshape(node, name, first, out)
        elif name in ("transpose", "swapaxes", "swapdims"):
            order = list(range(len(first)))
            a, b = _ints(node, ("dim0", "dim1"))
            order[a], order[b] = order[b], order[a]
            self._known[node] = [first[i] for i in order]
        elif name == "permute":
            order = _ints(node, ("dims",))
            self._known[node] = [first[i] for i in order]
        elif name == "t" or (name == "getattr" and node.args[1] in ("T", "mT")):
            self._known[node] = [*first[:-2], first[-1], first[-2]] if len(first) > 1 else first
        elif name == "narrow":
            dim, start, length = _ints(node, ("dim", "start", "length"))
            index: list[Any] = [slice(None)] * len(first)
            index[dim] = slice(start, start + length)
            self._known[node] = self._indexed(first, tuple(index), out)
        elif name == "select":
            dim = _dim_argument(node, 1, 0) % len(first)
            self._known[node] = [d for i, d in enumerate(first) if i != dim]

    def _first(self, node: fx.Node) -> Dims | None:
        return self._argument(node, 0, "input", "self", "tensor")

    def _argument(self, node: fx.Node, index: int, *names: str) -> Dims | None:
        value = node.args[index] if len(node.args) > index else None
        for name in names:
            value = node.kwargs.get(name, value)
        return self.dims(value) if isinstance(value, fx.Node) and shape_of(value) is not None else None

    @staticmethod
    def _broadcast(out: Dims, operand: Dims) -> None:
        for ours, theirs in zip(reversed(out), reversed(operand), strict=False):
            unify(ours, theirs)

    def _matmul(self, out: Dims, left: Dims | None, right: Dims | None) -> None:
        if left is None or right is None or min(len(left), len(right)) < 2:
            return
        unify(left[-1], right[-2])
        unify(out[-2], left[-2])
        unify(out[-1], right[-1])
        self._broadcast(out[:-2], left[:-2])
        self._broadcast(out[:-2], right[:-2])

    def _einsum(self, node: fx.Node, out: Dims) -> None:
        equation = node.args[0]
        operands = node.args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or "..." in equation or "->" not in equation:
            return
        inputs, result = equation.replace(" ", "").split("->")
        letters: dict[str, Dim] = {}
        tensors = [(term, self.dims(x)) for term, x in zip(inputs.split(","), operands, strict=True) if isinstance(x, fx.Node)]
        for term, dims in [*tensors, (result, out)]:
            for letter, dim in zip(term, dims, strict=True):
                unify(letters.setdefault(letter, dim), dim)

    def _attention(self, node: fx.Node, out: Dims) -> None:
        query = self._argument(node, 0, "query")
        key = self._argument(node, 1, "key")
        value = self._argument(node, 2, "value")
        if query is None or key is None or value is None:
            return
        for ours, theirs in zip(out[:-1], query[:-1], strict=False):
            unify(ours, theirs)
        unify(out[-1], value[-1])
        unify(key[-2], value[-2])

    def _reshape(self, node: fx.Node, name: str, before: Dims, after: Dims) -> None:
        old, new = shape_of(node.args[0] if node.args else node.kwargs.get("input")), shape_of(node)
        if old is None or new is None:
            return
        if name == "flatten" and len(old) > len(new):
            start, stop = _flatten_range(node, len(old))
            if len(new) == len(old) - (stop - start):
                for i in range(start):
                    unify(before[i], after[i])
                link(before[start : stop + 1], [after[start]])
                for i in range(stop + 1, len(old)):
                    unify(before[i], after[i - (stop - start)])
                return
        for ours, theirs in align(old, new) or ():
            link([before[i] for i in ours], [after[i] for i in theirs])

    def _join(self, node: fx.Node, stacked: bool) -> None:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        if not isinstance(tensors, (list, tuple)):
            return
        operands = [self.dims(x) for x in tensors if isinstance(x, fx.Node)]
        if shape_of(node) is None or len(operands) != len(tensors) or not operands:
            return
        out = self.dims(node)
        dim = _dim_argument(node, 1, 0) % len(out)
        if stacked:
            for dims in operands:
                for ours, theirs in zip([*out[:dim], *out[dim + 1 :]], dims, strict=True):
                    unify(ours, theirs)
            return
        operands = [dims for dims in operands if len(dims) == len(out)]
        for dims in operands:
            for i, (ours, theirs) in enumerate(zip(out, dims, strict=True)):
                if i != dim:
                    unify(ours, theirs)
        parts = [part for dims in operands for part in dims[dim].segments() if not same_size(part.size, 0)]
        unify(out[dim], Dim(out[dim].size, parts=parts) if len(parts) > 1 else parts[0])

    def _split(self, node: fx.Node) -> None:
        source = self._first(node)
        if source is None:
            return
        dim = _dim_argument(node, 2, 0) % len(source)
        start: Any = 0
        results = []
        for piece in node.meta["example_value"]:
            index: list[Any] = [slice(None)] * len(source)
            stop = start + piece.shape[dim]
            index[dim] = slice(start, stop)
            results.append(self._indexed(source, tuple(index), _new(piece)))
            start = stop
        self._known[node] = results

    def _getitem(self, node: fx.Node) -> None:
        source, index = node.args
        if not isinstance(source, fx.Node):
            return
        if shape_of(source) is None:
            known = self._known.get(source)
            if isinstance(known, list) and isinstance(index, int) and index < len(known):
                self._known[node] = known[index]
        elif shape_of(node) is not None:
            out = _new(node.meta["example_value"])
            self._known[node] = self._indexed(self.dims(source), index, out)

    def _indexed(self, source: Dims, index: Any, out: Dims | None = None) -> Dims:
        """The dimensions of `tensor[index]`; `out` gives new ones of the right sizes."""
        items = list(index) if isinstance(index, tuple) else [index]
        consumed = sum(item is not None and item is not Ellipsis for item in items)
        if Ellipsis not in items:
            items.append(Ellipsis)
        result: list[Dim | None] = []
        position = 0
        for item in items:
            if item is None:
                result.append(None)
            elif item is Ellipsis:
                rest = len(source) - consumed
                result.extend(source[position : position + rest])
                position += rest
            elif isinstance(item, slice):
                result.append(_sliced(source[position], item))
                position += 1
            elif isinstance(item, (int, torch.SymInt)) or (
                isinstance(item, fx.Node) and shape_of(item) is None
            ):
                position += 1
            else:
                return out if out is not None else []
        if out is None:
            return [d if d is not None else Dim(1) for d in result]
        if len(result) != len(out):
            return out
        return [
            d if d is not None and same_size(d.size, o.size) else o
            for d, o in zip(result, out, strict=True)
        ]

    def _subgraphs(self, node: fx.Node, bodies: list[fx.GraphModule]) -> None:
        operands = [a for a in _flat((node.args, node.kwargs)) if _is_value(a)]
        results = []
        for body in bodies:
            inputs = body.graph.find_nodes(op="placeholder")
            passed = operands[len(operands) - len(inputs) :]
            for placeholder, operand in zip(inputs, passed, strict=False):
                shape, outer = shape_of(placeholder), shape_of(operand)
                if shape is not None and outer is not None and len(shape) == len(outer):
                    for ours, theirs in zip(self.dims(placeholder), self.dims(operand), strict=True):
                        unify(ours, theirs)
            self._visit(body)
            (output,) = body.graph.find_nodes(op="output")
            results.append(output.args[0])
        if len(results) != 1:
            return
        result = results[0]
        if isinstance(result, (list, tuple)):
            self._known[node] = [
                self.dims(r) if isinstance(r, fx.Node) and shape_of(r) is not None else None
                for r in result
            ]
        elif isinstance(result, fx.Node) and shape_of(result) is not None:
            self._known[node] = self.dims(result)


def _sliced(dim: Dim, index: slice) -> Dim | None:
    """The dimension `dim[index]` if it is all of `dim`, or whole parts of a concatenation."""
    if index.step not in (None, 1):
        return None
    root = dim.find()
    start, stop = _position(index.start, 0, root.size), _position(index.stop, root.size, root.size)
    if start is None or stop is None:
        return None
    if same_size(start, 0) and same_size(stop, root.size):
        return dim
    offset: Any = 0
    chosen: Dims = []
    for part in root.segments():
        if chosen or same_size(offset, start):
            chosen.append(part)
        offset = offset + part.size
        if chosen and same_size(offset, stop):
            return chosen[0] if len(chosen) == 1 else Dim(stop - start, parts=chosen)
    return None


def _position(value: Any, default: Any, size: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value")
        if not isinstance(value, (int, torch.SymInt)):
            return None
    if value is None:
        return default
    if isinstance(value, int):
        if value < 0:
            return size + value
        return min(value, size) if isinstance(size, int) else value
    return value


def _new(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [Dim(size) for size in value.shape]
    if isinstance(value, (list, tuple)):
        return [_new(item) for item in value]
    return []


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _is_value(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op != "get_attr"


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    modules = []
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            found = getattr(gm, str(argument.target), None)
            if isinstance(found, fx.GraphModule):
                modules.append(found)
    return modules


def _number(value: Any) -> Any:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _dim_argument(node: fx.Node, index: int, default: int) -> int:
    value = node.kwargs.get("dim", node.args[index] if len(node.args) > index else default)
    return value if isinstance(value, int) else default


def _ints(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    values = list(_flat(node.args[1:]))
    values += [v for n in names if n in node.kwargs for v in _flat(node.kwargs[n])]
    return [_number(value) for value in values]


def _flatten_range(node: fx.Node, rank: int) -> tuple[int, int]:
    args = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    start, stop = args.get("start_dim", 0), args.get("end_dim", -1)
    return int(start) % rank, int(stop) % rank  # type: ignore[arg-type]


__all__ = ["DimFlow", "shape_of"]
