"""Handing a finished graph to the compiler that lowers it: Inductor, unless a debug option says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Lowered = Callable[..., Any]


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    inner: str = "inductor",
    mode: str | None = None,
    inductor: dict[str, Any] | None = None,
) -> Lowered:
    """Compiles `gm` as `torch.compile(backend=inner, mode=mode, options=inductor)` would.

    For Inductor this is the very object that `backend="inductor"` uses, so an untouched graph gets
    an untouched result.
    """
    if inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, inductor, None)(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(gm, list(example_inputs))
