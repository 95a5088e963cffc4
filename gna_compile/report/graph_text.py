"""Graphs as text that a person can read and a test can keep."""

from __future__ import annotations

import difflib
from typing import Any, cast

import torch
from torch import fx

from gna_compile.geometry import text_of_list

_PATTERN = 3
"""Where the op has its pattern: after query, key and value."""


def graph_text(gm: fx.GraphModule) -> str:
    """One line a node: name, type, and the call; bodies of higher-order operators indented."""
    return "\n".join(_lines(gm, ""))


def unified_diff(before: str, after: str, context: int = 2) -> str:
    """What a rewrite changed, as a unified diff; "" if nothing."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "before", "after", n=context, lineterm=""
    )
    return "\n".join(lines)


def _lines(gm: fx.GraphModule, indent: str) -> list[str]:
    lines = []
    for node in gm.graph.nodes:
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            lines.append(f"{indent}{node.name}:")
            lines.extend(_lines(body, indent + "  "))
        elif node.op == "output":
            lines.append(f"{indent}return {_argument(node.args[0])}")
        elif node.op == "placeholder":
            lines.append(f"{indent}{node.name}{_type(node)} = input")
        else:
            lines.append(f"{indent}{node.name}{_type(node)} = {_call(node)}")
    return lines


def _call(node: fx.Node) -> str:
    args = [_argument(a) for a in node.args]
    if str(node.target).startswith("gna.attention."):
        args[_PATTERN] = f"[{text_of_list([*map(_plain, cast(list[Any], node.args[_PATTERN]))])}]"
    args += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    target = node.target
    name = str(target) if hasattr(target, "overloadpacket") else None
    return f"{name or getattr(target, '__name__', target)}({', '.join(args)})"


def _plain(entry: Any) -> Any:
    return entry.name if isinstance(entry, fx.Node) else entry


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _type(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        short = str(value.dtype).removeprefix("torch.")
        return f": {short}[{', '.join(str(size) for size in value.shape)}]"
    return ""
