"""The values of index tensors that a graph makes of numbers, sizes and buffers.

`arange(n).view(h, w).T.flatten()` is known when compiling. A buffer is what it is now: whoever
rests a layout on its values has to compare them at every call, since nothing else guards them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from gna_compile.graph.mutation import written_by
from gna_compile.graph.nodes import operator_name, tensor_of
from gna_compile.graph.tokens.sizes import Sizes

_MOST_ELEMENTS = 2**22
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_NAMES = frozenset(
    {
        *("arange", "zeros", "ones", "full", "tensor", "eye", "meshgrid", "scalar_tensor"),
        *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
        *("add", "sub", "rsub", "mul", "floordiv", "floor_divide", "div", "mod", "remainder"),
        *("neg", "abs", "min", "max", "minimum", "maximum", "clamp", "where", "bitwise_and"),
        *("bitwise_or", "bitwise_xor", "bitwise_not", "and", "or", "xor", "invert", "lshift"),
        *("rshift", "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and"),
        *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze"),
        *("squeeze", "expand", "repeat", "repeat_interleave", "cat", "stack", "chunk"),
        *(
            "split",
            "unbind",
            "getitem",
            "index_select",
            "gather",
            "roll",
            "flip",
            "sort",
            "argsort",
        ),
        *("cumsum", "contiguous", "clone", "long", "int", "to", "movedim", "select", "narrow"),
        *("tile", "masked_fill", "sum", "prod", "outer", "nonzero", "ravel", "triu", "tril"),
    }
)
# Of their second operand only the shape matters, whatever its values are.
_LIKE = frozenset({"expand_as", "view_as", "reshape_as"})


class Unknown(Exception):
    """A value that depends on data."""


class Buffers:
    """The integer tensors among a graph's inputs that belong to its modules.

    Attributes:
        used: those whose values were looked at.
    """

    def __init__(self) -> None:
        self._values: dict[fx.Node, torch.Tensor] = {}
        self._bound: dict[fx.Node, fx.Node] = {}
        self.used: dict[fx.Node, None] = {}

    def add(self, node: fx.Node, value: torch.Tensor) -> None:
        """Notes an input of the whole graph and its value."""
        if value.dtype in _WHOLE and value.numel() <= _MOST_ELEMENTS:
            self._values[node] = value

    def bind(self, node: fx.Node, operand: fx.Node) -> None:
        """Notes what an input of a subgraph is in the graph that calls it."""
        self._bound[node] = operand

    def value(self, node: fx.Node, sizes: Sizes, known: dict[fx.Node, Any]) -> Any:
        """The value of an input of a graph or subgraph."""
        if node in self._bound:
            return _value(self._bound[node], sizes, self, known)
        if node not in self._values or _is_written(node):
            raise Unknown
        self.used[node] = None
        return self._values[node].detach().cpu()


def index_values(node: fx.Node, sizes: Sizes, buffers: Buffers) -> npt.NDArray[np.int64] | None:
    """The values of an integer tensor at these sizes, or None if they depend on data."""
    try:
        value = _value(node, sizes, buffers, {})
    except Exception:  # whatever an operator raises: nothing is known then
        return None
    if not isinstance(value, torch.Tensor) or value.dtype not in _WHOLE:
        return None
    return value.to(torch.int64).numpy()


def _value(node: fx.Node, sizes: Sizes, buffers: Buffers, known: dict[fx.Node, Any]) -> Any:
    if node in known:
        return known[node]
    example = node.meta.get("example_value")
    if isinstance(example, torch.SymInt | int):
        return sizes.of(example)
    if node.op == "placeholder":
        return buffers.value(node, sizes, known)
    if node.op not in ("call_function", "call_method") or operator_name(node) not in _NAMES | _LIKE:
        raise Unknown
    tensor = tensor_of(node)
    if tensor is not None and (
        tensor.dtype not in _WHOLE or np.prod(sizes.shape(tensor)) > _MOST_ELEMENTS
    ):
        raise Unknown
    if _is_written(node):
        raise Unknown

    if operator_name(node) in _LIKE and tensor is not None:
        first = node.args[0]
        if not isinstance(first, fx.Node):
            raise Unknown
        value = _value(first, sizes, buffers, known)
        shape = sizes.shape(tensor)
        return value.expand(shape) if operator_name(node) == "expand_as" else value.reshape(shape)

    def argument(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return _value(item, sizes, buffers, known)
        if isinstance(item, torch.SymInt):
            return sizes.of(item)
        if isinstance(item, slice):
            return slice(argument(item.start), argument(item.stop), argument(item.step))
        if isinstance(item, list | tuple):
            return type(item)(argument(part) for part in item)
        return torch.device("cpu") if isinstance(item, torch.device) else item

    args = tuple(argument(item) for item in node.args)
    kwargs = {name: argument(item) for name, item in node.kwargs.items()}
    if "device" in kwargs or operator_name(node) in ("arange", "zeros", "ones", "full", "eye"):
        kwargs["device"] = torch.device("cpu")
    if node.op == "call_method":
        owner, *rest = args
        value = getattr(owner, str(node.target))(*rest, **kwargs)
    else:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    known[node] = value
    return value


def _is_written(node: fx.Node) -> bool:
    """Whether anything in the graph writes to the memory of an integer tensor, or to a view of it."""
    same = {node}
    pending = [node]
    while pending:
        link = pending.pop()
        for user in (link, *link.users):
            if not same.isdisjoint(written_by(user)):
                return True
            if user not in same and any(value.dtype in _WHOLE for value in _tensors_of(user)):
                same.add(user)
                pending.append(user)
    return False


def _tensors_of(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("example_value")
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]
