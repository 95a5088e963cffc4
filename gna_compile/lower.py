"""Handing a finished graph to the compiler that lowers it: Inductor, unless a debug option says otherwise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from gna_compile import _torch

log = logging.getLogger("gna_compile")

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
        why = _torch.why_not("Inductor's options")
        if why is None:
            lowered: Lowered = _torch.InductorWrapper(mode, inductor, None)(gm, example_inputs)
            return lowered
        if mode or inductor:
            log.warning("%s, so the options 'mode' and 'inductor' are not taken", why)
    why = _torch.why_not("inner")
    if why is not None:
        log.warning("%s, so the graph runs as it is, not through %r", why, inner)
        return gm.forward
    run: Lowered = _torch.lookup_backend(inner)(gm, list(example_inputs))
    return run


class LoweredWhenCalled:
    """A graph that its first call lowers, so that one that is never called costs nothing.

    Dynamo is not tracing then, so no guard can come of it: the graph must be static, and Dynamo's
    own guards, with those of a variant of the graph that was lowered at once, must be all it needs.
    """

    def __init__(
        self, gm: fx.GraphModule, lowered: Callable[[fx.GraphModule, Sequence[Any]], Lowered]
    ) -> None:
        self._gm: fx.GraphModule | None = gm
        self._lowered = lowered
        self._run: Lowered | None = None
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        run = self._run
        return (run if run is not None else self._first(inputs))(*inputs)

    @torch.compiler.disable
    def _first(self, inputs: Sequence[Any]) -> Lowered:
        with self._lock:
            if self._run is None:
                assert self._gm is not None
                # As Dynamo does while it compiles: the caller's random numbers stay the same.
                with _torch.random_numbers_kept():
                    self._run = self._lowered(self._gm, inputs)
                self._gm = None
            return self._run


def is_static(gm: fx.GraphModule) -> bool:
    """Whether no size in a graph of Dynamo is a symbol."""
    for node in gm.graph.nodes:
        if "unbacked_bindings" in node.meta:
            return False
        if node.op == "placeholder":
            value = node.meta.get("example_value")
            sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(size, (torch.SymInt, torch.SymFloat)) for size in sizes):
                return False
    return True
