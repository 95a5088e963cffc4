"""Symbolic sizes: what holds for all of them, for these, and which guards that costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from gna_compile import _torch

Size = int | torch.SymInt


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether the condition holds for all sizes that the graph serves; adds no guard."""
    if isinstance(condition, bool):
        return condition
    return bool(_torch.statically_known_true(condition))


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether the condition holds for these sizes; a guard makes Dynamo recompile for others.

    A condition on data-dependent sizes counts as false.
    """
    if isinstance(condition, bool):
        return condition
    if _torch.free_unbacked_symbols(condition):
        return bool(_torch.statically_known_true(condition))
    return bool(condition)


def hint(size: Size) -> int:
    """The size of the example input that a symbol stands for; for reports and choices, not graphs."""
    return size if isinstance(size, int) else _torch.hint(size)


def entry_of(
    symbol: sympy.Expr, placeholders: Iterable[fx.Node]
) -> tuple[fx.Node, int | None] | None:
    """The input that is this symbol, or the tensor and its axis of that size; None if none is."""
    tensors = []
    for node in placeholders:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and _torch.expression(value) == symbol:
            return node, None
        if isinstance(value, torch.Tensor):
            tensors.append((node, value))
    for node, tensor in tensors:
        for axis, length in enumerate(tensor.shape):
            if isinstance(length, torch.SymInt) and _torch.expression(length) == symbol:
                return node, axis
    return None


def enters(size: Size, graph: fx.Graph) -> bool:
    """Whether a size can be computed from what enters a graph."""
    if isinstance(size, int):
        return True
    placeholders = graph.find_nodes(op="placeholder")
    return all(entry_of(symbol, placeholders) for symbol in _torch.expression(size).free_symbols)


def same_shape(left: Any, right: Any) -> bool:
    """Whether two shapes are equal for all sizes that the graph serves; adds no guard."""
    return len(left) == len(right) and all(
        is_known(one == other) for one, other in zip(left, right, strict=True)
    )


def is_unbacked(value: torch.Tensor) -> bool:
    """Whether a size of the tensor depends on data."""
    symbols = [size for size in value.shape if not isinstance(size, int)]
    return bool(symbols and _torch.free_unbacked_symbols(symbols))


def number(argument: Any, *, pin: bool = True) -> float | None:
    """The one value of a scalar argument, or None if it has none at compile time.

    A Python number is itself. A float that Dynamo keeps symbolic (an argument or attribute under
    `dynamic=True`) is pinned, if `pin` allows: the guard makes another value recompile. A value
    computed from symbolic sizes is None, since pinning it would pin those sizes.
    """
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("example_value")
    if isinstance(argument, bool):
        return None
    if isinstance(argument, int | float):
        return float(argument)
    if not isinstance(argument, torch.SymInt | torch.SymFloat):
        return None
    expression = _torch.expression(argument)
    if expression.is_number:
        return float(expression)
    if pin and isinstance(argument, torch.SymFloat) and _is_float_input(expression):
        return float(argument)
    return None


def _is_float_input(expression: Any) -> bool:
    return all(
        _torch.symbol_is_type(symbol, _torch.SymT.FLOAT) for symbol in expression.free_symbols
    )
