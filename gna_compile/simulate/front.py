"""Which windows and strides are worth having on a grid: the front of sparsity and speedup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gna_compile.geometry import Axis
from gna_compile.planner import Plan, Workload, plan, speedups
from gna_compile.planner.search import architecture_of, boxes


@dataclass(frozen=True)
class Point:
    """One window and stride.

    Attributes:
        plan: its plan.
        sparsity: share of dense attention's FLOPs that is left out.
        speedup: predicted, over dense attention.
    """

    plan: Plan
    sparsity: float
    speedup: float

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.plan.workload.neighborhood.axes


def pareto_front(workload: Workload, architecture: str) -> list[Point]:
    """The points that no other one beats: it would keep as much and be as fast; densest first.

    Windows are shares of each axis, rounded to multiples of 8 tokens (less on short axes). Strides
    are 1, and for each window a few query boxes of the kernel, since a stride that a query box
    divides is what makes a window block-sparse. The workload's own window and stride play no role.
    """
    points = [_point(cut, architecture) for cut in _candidates(workload, architecture)]
    # Of equal points the one with the smaller stride is nearer to a sliding window.
    points.sort(key=lambda p: (p.sparsity, -round(p.speedup, 9), _stride_size(p)))
    front: list[Point] = []
    for point in points:
        if point.speedup > max((p.speedup for p in front), default=1.0) * (1 + 1e-9):
            front.append(point)
    return front


def recommended(front: list[Point], sparsity: float) -> Point | None:
    """The fastest point that leaves out at most `sparsity`; None if there is none."""
    return max(
        (p for p in front if p.sparsity <= sparsity + 1e-9), key=lambda p: p.speedup, default=None
    )


def _stride_size(point: Point) -> tuple[int, int]:
    strides = [axis.stride for axis in point.axes]
    return math.prod(strides), max(strides)


def _candidates(workload: Workload, architecture: str) -> Iterator[Workload]:
    grid = workload.neighborhood.grid
    query_boxes = {
        box for tokens, _ in architecture_of(architecture).tiles for box in boxes(tokens, len(grid))
    }
    # Boxes that waste few rows at the grid's edges, the most cubic ones first.
    ordered = sorted(query_boxes, key=lambda box: (_covered(grid, box), max(box), box))
    for window in itertools.product(*map(_windows, grid)):
        if window == grid:
            continue
        sliding = [(1,) * len(grid)]
        strided = [box for box in ordered if all(map(int.__le__, box, window))][:4]
        for stride in dict.fromkeys(_along(grid, window, s) for s in sliding + strided):
            axes = tuple(map(Axis, grid, window, stride))
            yield replace(workload, neighborhood=replace(workload.neighborhood, axes=axes))


def _point(workload: Workload, architecture: str) -> Point:
    cut = plan(workload, architecture)
    share = workload.neighborhood.flop_share
    return Point(cut, 1 - share, speedups(cut).predicted)


def _windows(length: int) -> list[int]:
    unit = 8
    while unit > 1 and length < 4 * unit:
        unit //= 2
    shares = (length * eighths // 8 // unit * unit for eighths in (1, 2, 3, 4, 6))
    return sorted({max(unit, window) for window in shares} | {length})


def _along(
    grid: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[int, ...]:
    """A stride without effect, along a whole axis, is 1."""
    columns = zip(grid, window, stride, strict=True)
    return tuple(1 if keys == length else step for length, keys, step in columns)


def _covered(grid: tuple[int, ...], box: tuple[int, ...]) -> int:
    return math.prod(
        -(-length // extent) * extent for length, extent in zip(grid, box, strict=True)
    )


def rule_text(point: Point) -> str:
    """The point as a rule of a policy, in YAML."""
    windows = [str(a.window) if a.window < a.length else "full" for a in point.axes]
    strides = [str(axis.stride) for axis in point.axes]
    return f"  - window: [{', '.join(windows)}]\n    stride: [{', '.join(strides)}]"
