"""Predicted speedup of a provider on a problem, by the costs of what that provider really does."""

from __future__ import annotations

from gna_compile.planner import ARCHITECTURES, Workload, better_stride, plan, speedups
from gna_compile.providers import boxes
from gna_compile.providers.problem import Problem


def predicted_speedup(problem: Problem, provider: str) -> float | None:
    """Speedup of `provider` over dense attention on the problem's device.

    The native kernels are planned, and timed by the cost table of their architecture. On a CPU it
    is the portable provider's own cut of the grid, by its own costs.

    Returns:
        None where nothing was measured, such as the portable provider on a GPU.
    """
    if provider in ARCHITECTURES:
        return speedups(plan(workload_of(problem), provider)).predicted
    if problem.device == "cpu":
        group = problem.heads // problem.kv_heads
        return boxes.predicted_speedup(problem.neighborhood, group)
    return None


def stride_hint(problem: Problem, provider: str) -> str:
    """The nearest stride with which `provider` would need no mask, in words; "" if there is none."""
    if provider not in ARCHITECTURES:
        return ""
    stride = better_stride(workload_of(problem), provider)
    if stride is None:
        return ""
    return f"hint: with stride {'x'.join(map(str, stride))} no key tile would need a mask"


def workload_of(problem: Problem) -> Workload:
    """What the planner needs of a problem."""
    return Workload(
        problem.neighborhood,
        heads=problem.batch * problem.heads,
        head_dim=problem.head_dim,
        element_bytes=problem.dtype.itemsize,
        key_mask=problem.has_key_mask,
    )
