"""Forecasts of the native GPU kernels, which run as the planner plans."""

from __future__ import annotations

from gna_compile.planner import Workload, better_stride, plan, speedups
from gna_compile.providers.problem import Forecast, Problem

_HEAD_DIMS = (64, 128)


def forecast(problem: Problem, architecture: str) -> Forecast:
    """What the planner says of `problem` on an architecture of its cost table."""
    workload = workload_of(problem)
    stride = better_stride(workload, architecture)
    hint = ""
    if stride is not None:
        hint = f"hint: with stride {'x'.join(map(str, stride))} no key tile would need a mask"
    return Forecast(speedups(plan(workload, architecture)).predicted, hint)


def workload_of(problem: Problem) -> Workload:
    """What the planner needs of a problem."""
    return Workload(
        problem.neighborhood.merged,
        heads=problem.batch * problem.heads,
        # The kernels compute the columns up to the next of their head sizes, too.
        head_dim=next((size for size in _HEAD_DIMS if size >= problem.head_dim), problem.head_dim),
        element_bytes=problem.dtype.itemsize,
        key_mask=problem.has_key_mask,
    )
