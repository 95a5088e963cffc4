"""Scalars of a graph that are known when it is compiled."""

from __future__ import annotations

import math
from typing import Any

import torch

from gna_compile.graph.mutation import written_by
from gna_compile.graph.nodes import argument_of, operator_name, tensor_of
from gna_compile.graph.symbols import number


def constant(argument: Any, *, pin: bool = True) -> float | None:
    """Like `number`, and also the value of a one-element tensor that the graph makes of a literal."""
    value = number(argument, pin=pin)
    tensor = tensor_of(argument)
    if value is not None or tensor is None or tensor.dim() != 0:
        return value
    if any(operator_name(user) not in ("mul", "div", "sqrt") for user in argument.users):
        return None  # it may be changed, or seen through a view
    if any(argument in written_by(user) for user in argument.users):
        return None
    name = operator_name(argument)
    if name == "full":
        value = number(argument_of(argument, 1, "fill_value"), pin=pin)
    elif name in ("tensor", "scalar_tensor"):
        value = number(argument_of(argument, 0, "data", "s"), pin=pin)
    elif name == "sqrt":
        value = constant(argument_of(argument, 0, "input", "self"), pin=pin)
        value = math.sqrt(value) if value is not None and value >= 0 else None
    if value is None or tensor.dtype in (torch.float32, torch.float64):
        return value
    # A half-precision constant is rounded; take it only where eight bits of mantissa hold it.
    exact = (math.frexp(value)[0] * 256).is_integer()
    return value if exact and tensor.dtype in (torch.float16, torch.bfloat16) else None
