"""The frame that Dynamo is tracing while a backend runs: its root module, and guards on it.

A module that is compiled by itself (`block.compile()`) is not on its own nodes' module stack, and
its own forward hooks are traced apart from its forward. So what is stamped on it is read from the
frame, and the guard on the stamp is installed here.
"""

from __future__ import annotations

import torch


def root_module() -> torch.nn.Module | None:
    """The module whose method is being compiled, or None (a free function, a resumed frame)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        root = InstructionTranslator.current_tx().f_locals.get("self")
    except AttributeError:  # called outside Dynamo
        return None
    return root if isinstance(root, torch.nn.Module) else None


def guard_root_attribute(name: str) -> None:
    """Makes the graph being compiled valid only while the root module's string `name` is equal."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, LocalSource

    source = AttrSource(LocalSource("self"), name)
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))


def compilations_left() -> int | None:
    """How often this frame may still recompile before Dynamo runs it eagerly; None if unknown."""
    from torch._dynamo import config
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_compile_id is None:
        return None
    return config.recompile_limit - compile_id.frame_compile_id - 1
