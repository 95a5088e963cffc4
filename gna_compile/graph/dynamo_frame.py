"""The frame that Dynamo is tracing while a backend runs: its root module, and guards on it.

A module that is compiled by itself (`block.compile()`) is not on its own nodes' module stack, and
its own forward hooks are traced apart from its forward. So what is annotated on it is read from the
frame, and the guard on the annotation is installed here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from gna_compile import _torch
from gna_compile.graph.tokens.position_ids import may_be_ids


def root_module() -> torch.nn.Module | None:
    """The module whose method is being compiled, or None (a free function, a resumed frame)."""
    root = _locals().get("self")
    return root if isinstance(root, torch.nn.Module) else None


def frame_modules() -> list[torch.nn.Module]:
    """The modules that the compiled code can name: its variables, and attributes of its `self`."""
    found = [*_locals().values()]
    owner = _locals().get("self")
    if not isinstance(owner, torch.nn.Module):
        found += vars(owner).values() if hasattr(owner, "__dict__") else []
    translator = _translator()
    if translator is not None:
        found += [translator.f_globals.get(name) for name in translator.f_code.co_names]
    return [value for value in found if isinstance(value, torch.nn.Module)]


def local_modules() -> list[torch.nn.Module]:
    """The modules that are variables of the compiled code."""
    return [value for value in _locals().values() if isinstance(value, torch.nn.Module)]


def is_resumed() -> bool:
    """Whether the compiled code goes on after a graph break."""
    translator = _translator()
    return translator is not None and translator.f_code.co_name.startswith("torch_dynamo_resume_in")


def position_ids_outside() -> str | None:
    """Name of a variable of the code around the compiled graph that holds position ids, if any.

    A graph that is one part of a model (a block, or what follows a graph break) need not have the
    position ids among its inputs, though their values decide on which grid its tokens lie.
    """
    frame = sys._getframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        names = frame.f_code.co_varnames
        # Looking at a frame's variables keeps them alive until it returns: only where it matters.
        if package not in ("torch", "gna_compile") and any("ids" in name for name in names):
            for name, value in frame.f_locals.items():
                if isinstance(value, torch.Tensor) and may_be_ids(name, value):
                    return name
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _locals() -> Mapping[str, Any]:
    translator = _translator()
    return {} if translator is None else translator.f_locals


def _translator() -> Any:
    if _torch.why_not("prepare"):
        return None
    try:
        return _torch.InstructionTranslator.current_tx()
    except AttributeError:  # called outside Dynamo
        return None


def guard_root_attribute(*names: str) -> None:
    """Makes the graph being compiled valid only while the root module's `a.b...` is equal.

    Args:
        names: attributes, each of the one before; the last one's value is a string, or nested
            tuples of ints and None.
    """
    source: Any = _torch.LocalSource("self")
    for name in names:
        source = _torch.AttrSource(source, name)
    _torch.install_guard(source.make_guard(_torch.GuardBuilder.EQUALS_MATCH))


def compilations_left() -> int | None:
    """How often this frame may still recompile before Dynamo runs it eagerly; None if unknown."""
    limit = _torch.recompile_limit()
    compile_id = None if limit is None else _torch.CompileContext.current_compile_id()
    if limit is None or compile_id is None or compile_id.frame_compile_id is None:
        return None
    return limit - int(compile_id.frame_compile_id) - 1
