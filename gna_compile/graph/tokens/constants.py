"""The values of index tensors and masks that a graph makes of numbers, sizes and buffers.

`arange(n).view(h, w).T.flatten()` is known when compiling. A buffer is what it is now: whoever
rests a layout on its values has to compare them at every call, since nothing else guards them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from gna_compile.graph.mutation import shares_memory, written_by
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
# What these make of floating-point numbers may differ from device to device.
_ROUNDED = frozenset(
    {
        *("arange", "add", "sub", "rsub", "mul", "div", "mod", "remainder", "floordiv"),
        *("floor_divide", "sum", "prod", "cumsum", "outer", "eq", "ne", "lt", "le", "gt", "ge"),
    }
)
# Of their first operand only the shape and the dtype matter.
_FILLS = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})
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

    def value(self, node: fx.Node, evaluation: _Evaluation) -> Any:
        """The value of an input of a graph or subgraph."""
        if node in self._bound:
            return evaluation.value(self._bound[node])
        if node not in self._values or _is_written(node):
            raise Unknown
        self.used[node] = None
        return self._values[node].detach().cpu()


def index_values(node: fx.Node, sizes: Sizes, buffers: Buffers) -> npt.NDArray[np.int64] | None:
    """The values of an integer tensor at these sizes, or None if they depend on data."""
    value = _Evaluation(sizes, buffers).of(node)
    if value is None or value.dtype not in _WHOLE:
        return None
    return value.to(torch.int64).numpy()


def fixed_values(node: fx.Node) -> torch.Tensor | None:
    """The values of a tensor, on the CPU, that no input, buffer or symbolic size has a part in.

    Floating-point numbers are followed where they are filled in, moved and selected: what is rounded
    may be another number on another device.

    Returns:
        None if its values depend on anything else, or if it is too large to be looked at.
    """
    return FixedEvaluation().of(node)


class _Evaluation:
    """The values of tensors of whole numbers, and of what they are made of, at some sizes."""

    kinds: tuple[torch.dtype, ...] = _WHOLE
    most_elements = _MOST_ELEMENTS

    def __init__(self, sizes: Sizes, buffers: Buffers) -> None:
        self._sizes, self._buffers = sizes, buffers
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> torch.Tensor | None:
        try:
            value = self.value(node)
        except Exception:  # whatever an operator raises: nothing is known then
            return None
        return value if isinstance(value, torch.Tensor) else None

    def value(self, node: fx.Node) -> Any:
        if node in self._known:
            return self._known[node]
        example = node.meta.get("example_value")
        if isinstance(example, torch.SymInt | int):
            return self._sizes.of(example)
        if node.op == "placeholder":
            return self._buffers.value(node, self)
        if node.op not in ("call_function", "call_method"):
            raise Unknown
        name = operator_name(node)
        if name not in _NAMES | _LIKE:
            raise Unknown
        tensor = tensor_of(node)
        if tensor is not None and (
            tensor.dtype not in self.kinds
            or np.prod(self._sizes.shape(tensor)) > self.most_elements
        ):
            raise Unknown
        if self.is_written(node) or self.is_rounded(node, name):
            raise Unknown
        self._known[node] = value = self._computed(node, name, tensor)
        return value

    def is_written(self, node: fx.Node) -> bool:
        return _is_written(node)

    def is_rounded(self, node: fx.Node, name: str) -> bool:
        return False

    def _computed(self, node: fx.Node, name: str, tensor: torch.Tensor | None) -> Any:
        if name in _LIKE and tensor is not None:
            first = node.args[0]
            if not isinstance(first, fx.Node):
                raise Unknown
            value, shape = self.value(first), self._sizes.shape(tensor)
            return value.expand(shape) if name == "expand_as" else value.reshape(shape)
        args = tuple(map(self._argument, node.args[name in _FILLS :]))
        if name in _FILLS:
            first = tensor_of(node.args[0]) if node.args else None
            if first is None:
                raise Unknown
            args = (torch.empty(1, dtype=first.dtype).expand(self._sizes.shape(first)), *args)
        kwargs = {key: self._argument(item) for key, item in node.kwargs.items()}
        if "device" in kwargs or name in ("arange", "zeros", "ones", "full", "eye"):
            kwargs["device"] = torch.device("cpu")
        if name in ("sort", "argsort"):
            _hold_distinct(*args, **kwargs)
        if node.op == "call_method":
            owner, *rest = args
            return getattr(owner, str(node.target))(*rest, **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _argument(self, item: Any) -> Any:
        if isinstance(item, fx.Node):
            return self.value(item)
        if isinstance(item, torch.SymInt):
            return self._sizes.of(item)
        if isinstance(item, slice):
            return slice(*map(self._argument, (item.start, item.stop, item.step)))
        if isinstance(item, list | tuple):
            return type(item)(map(self._argument, item))
        return torch.device("cpu") if isinstance(item, torch.device) else item


class FixedEvaluation(_Evaluation):
    """The values of tensors that are made of numbers alone."""

    kinds = (*_WHOLE, torch.float32, torch.float64, torch.float16, torch.bfloat16)
    most_elements = 2**26

    def __init__(self) -> None:
        super().__init__(_FixedSizes(), Buffers())
        self._written: dict[fx.Graph, list[fx.Node]] = {}

    def is_written(self, node: fx.Node) -> bool:
        if node.graph not in self._written:
            self._written[node.graph] = [t for user in node.graph.nodes for t in written_by(user)]
        return any(shares_memory(target, node) for target in self._written[node.graph])

    def is_rounded(self, node: fx.Node, name: str) -> bool:
        tensors = [t for link in (node, *node.all_input_nodes) for t in _tensors_of(link)]
        return name in _ROUNDED and any(t.dtype not in _WHOLE for t in tensors)


class _FixedSizes(Sizes):
    def of(self, size: Any) -> int:
        if not isinstance(size, int):
            raise Unknown
        return size


def _hold_distinct(values: torch.Tensor, dim: Any = -1, *_: Any, **kwargs: Any) -> None:
    """Refuses to sort equal numbers: what comes first of them may differ from device to device."""
    along = kwargs.get("dim", dim)
    if not kwargs.get("stable") and bool(
        (values.sort(dim=along).values.diff(dim=along) == 0).any()
    ):
        raise Unknown


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
