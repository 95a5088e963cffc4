"""The nodes of a Dynamo graph: their values, arguments, and one name for each operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gna_compile import _torch


def tensor_of(node: Any) -> torch.Tensor | None:
    """The (fake) tensor that `node` evaluates to, or None if it is no tensor or not recorded."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def argument_of(node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
    """An argument of a call by position or by any of its names, else `default`."""
    if index < len(node.args):
        return node.args[index]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return default


# Operators whose Python name is not their name in torch, and synonyms: what the rest of this
# package calls them.
_NAMES = {
    "bmm": "matmul",
    "linalg_matmul": "matmul",
    "__matmul__": "matmul",
    "multiply": "mul",
    "imul": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "true_divide": "div",
    "divide": "div",
    "truediv": "div",
    "itruediv": "div",
    "__truediv__": "div",
    "iadd": "add",
    "__add__": "add",
    "__radd__": "add",
    "isub": "sub",
    "subtract": "sub",
    "__sub__": "sub",
    "_softmax": "softmax",
    "special_softmax": "softmax",
    "_to_copy": "to",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "adjoint": "mH",
    "numpy_T": "T",
    "matrix_H": "H",
    "_get_data_attr": "data",
    # The same elements in the same places, only in memory of their own.
    "transpose_copy": "transpose",
    "permute_copy": "permute",
    "t_copy": "t",
    "view_copy": "view",
    "expand_copy": "expand",
    "unsqueeze_copy": "unsqueeze",
    "squeeze_copy": "squeeze",
}

# Attributes that are tensors. Which of them Dynamo writes as `getattr`, and which as a call of an
# `aten` operator, differs from version to version.
_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})


def operator_name(node: fx.Node) -> str:
    """One name for a torch operator however it is called; "" for anything else.

    A function (`torch.softmax`, `torch.nn.functional.softmax`), a Tensor method, a Python operator,
    an attribute (`x.mT`) and an `aten` overload share their name; so do in-place forms (`add_`),
    which `written_by` tells apart. An attribute that is no tensor (`x.shape`) is a "getattr".
    """
    name = ""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, _torch.OpOverload):
            target = target.overloadpacket
        if isinstance(target, _torch.OpOverloadPacket):
            namespace, _, aten = _torch.qualified_name(target).partition("::")
            name = aten if namespace == "aten" else ""
        elif (getattr(target, "__module__", None) or "").split(".")[0] in (
            "torch",
            "_operator",
            "builtins",
        ):
            name = getattr(target, "__name__", "")
        if target is getattr and node.args[1:2] and node.args[1] in _ATTRIBUTES:
            name = str(node.args[1])
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _NAMES.get(name, name)
