"""gna-compile: neighborhood attention for unmodified models, as a `torch.compile` backend.

model = torch.compile(model, backend="gna", options={"policy": "flux-4k"})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gna_compile.ops import neighborhood_attention
    from gna_compile.phases import PhaseSchedule, current_phase, phase, set_phase
    from gna_compile.policy import Policy, PolicyError, load_policy
    from gna_compile.prepared.annotations import prepare, unprepare
    from gna_compile.report.explain import Explanation, explain, graph_diff
    from gna_compile.verify.layouts import LayoutError

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LayoutError",
    "PhaseSchedule",
    "Policy",
    "PolicyError",
    "current_phase",
    "explain",
    "graph_diff",
    "load_policy",
    "neighborhood_attention",
    "phase",
    "prepare",
    "set_phase",
    "unprepare",
]

_HOME = {
    "neighborhood_attention": "gna_compile.ops",
    **dict.fromkeys(["PhaseSchedule", "current_phase", "phase", "set_phase"], "gna_compile.phases"),
    **dict.fromkeys(["Policy", "PolicyError", "load_policy"], "gna_compile.policy"),
    "LayoutError": "gna_compile.verify.layouts",
    **dict.fromkeys(["prepare", "unprepare"], "gna_compile.prepared.annotations"),
    **dict.fromkeys(["Explanation", "explain", "graph_diff"], "gna_compile.report.explain"),
}


def __getattr__(name: str) -> Any:
    # The entry point imports this package at every torch.compile call: nothing loads before use.
    if name not in _HOME:
        raise AttributeError(f"module 'gna_compile' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
