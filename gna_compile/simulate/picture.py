"""A picture of a plan: one query tile's key tiles on the grid, and speedup against the window."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gna_compile.geometry import Axis
from gna_compile.planner import Plan, Workload, plan, speedups
from gna_compile.simulate.problems import SimulateError

_COLORS = {"full": "#4c8eda", "partial": "#f2b25c", "visible": "#1b3f73"}
_SHARES = range(1, 8)  # eighths of each axis


def draw(cut: Plan, path: Path, query: tuple[int, ...] | None = None) -> None:
    """Writes a picture of two panels; its format is that of the file's ending.

    Left, the plane of the last two axes through `query` (default: the middle of the grid): keys
    that it sees, and the full and partial blocks that its query tile visits. Right, speedup
    for windows of a number of eighths of each axis, with stride 1 and with the plan's own strides.

    Raises:
        SimulateError: if matplotlib is missing, the query is not on the grid, or the file cannot
            be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SimulateError("a picture needs matplotlib: pip install 'gna-compile[plot]'") from None
    grid = cut.workload.neighborhood.grid
    query = query or tuple(length // 2 for length in grid)
    on_grid = len(query) == len(grid) and all(map(int.__lt__, query, grid))
    if not on_grid:
        raise SimulateError(f"--query {query} is not a place on the grid {grid}")
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_tiles(left, cut, query)
    _draw_speedups(right, cut)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise SimulateError(f"--plot {path}: {error}") from None


def key_tiles(
    axis: Axis, query: int, query_extent: int, key_extent: int, tiling: str
) -> list[tuple[int, int, bool]]:
    """Key tiles on one axis for the query tile that `query` is in: start, stop and whether it is a full block.

    In positions of the query's dilation group; a tile may stick out beyond the group.
    """
    group = axis.group(query % axis.dilation)
    start = query // axis.dilation // query_extent * query_extent
    queries = range(start, min(start + query_extent, group.length))
    union, common = group.union(queries), group.intersection(queries)
    first = union.start if tiling == "dynamic" else union.start // key_extent * key_extent
    return [
        (at, at + key_extent, common.start <= at and at + key_extent <= common.stop)
        for at in range(first, union.stop, key_extent)
    ]


def _draw_tiles(panel: Any, cut: Plan, query: tuple[int, ...]) -> None:
    from matplotlib.patches import Rectangle

    axes = cut.workload.neighborhood.axes
    tiles = [
        key_tiles(*values, cut.tiling)
        for values in zip(axes, query, cut.query_box, cut.key_box, strict=True)
    ]
    # Of the axes that the plane cuts, the key tile that holds the query's own place decides.
    off_plane = all(
        any(start <= at // axis.dilation < stop and inner for start, stop, inner in found)
        for axis, at, found in zip(axes[:-2], query, tiles, strict=False)
    )
    rows = tiles[-2] if len(axes) > 1 else [(0, 1, True)]
    for top, bottom, row_inner in rows:
        for start, stop, inner in tiles[-1]:
            kind = "full" if off_plane and row_inner and inner else "partial"
            box = Rectangle(
                (start - 0.5, top - 0.5), stop - start, bottom - top, facecolor=_COLORS[kind]
            )
            box.set_edgecolor("white")
            panel.add_patch(box)
    row_axis, row = (axes[-2], query[-2]) if len(axes) > 1 else (Axis(1, 1), 0)
    seen_rows, seen = _seen(row_axis, row), _seen(axes[-1], query[-1])
    window = Rectangle(
        (seen.start - 0.5, seen_rows.start - 0.5), len(seen), len(seen_rows), fill=False
    )
    window.set(edgecolor=_COLORS["visible"], linewidth=2)
    panel.add_patch(window)
    panel.plot(query[-1] // axes[-1].dilation, row // row_axis.dilation, "k*")
    panel.set_xlim(-0.5, axes[-1].group(query[-1] % axes[-1].dilation).length - 0.5)
    panel.set_ylim(row_axis.group(row % row_axis.dilation).length - 0.5, -0.5)
    if len(axes) == 1:
        panel.set_yticks([])
    panel.set_title(
        f"query {query}: window (outline), key tiles that need\n"
        "no mask (blue) and a mask (orange), in the query's dilation group"
    )


def _seen(axis: Axis, query: int) -> range:
    keys = axis.keys(query)
    start = keys.start // axis.dilation
    return range(start, start + len(keys))


def _draw_speedups(panel: Any, cut: Plan) -> None:
    axes = cut.workload.neighborhood.axes
    for stride in dict.fromkeys([(1,) * len(axes), tuple(axis.stride for axis in axes)]):
        points = [_scaled(cut, share, stride) for share in _SHARES]
        label = f"predicted, stride {'x'.join(map(str, stride))}"
        panel.plot(*zip(*points, strict=True), "o-", label=label)
    bounds = [_scaled(cut, share, (1,) * len(axes), bound=True) for share in _SHARES]
    panel.plot(*zip(*bounds, strict=True), "k--", label="FLOP bound")
    panel.set(xlabel="window, share of each axis", ylabel="speedup", yscale="log")
    panel.set_title(f"speedup over dense attention, {cut.architecture}")
    panel.legend()


def _scaled(
    cut: Plan, eighths: int, stride: tuple[int, ...], bound: bool = False
) -> tuple[float, float]:
    workload: Workload = cut.workload
    axes = []
    for axis, step in zip(workload.neighborhood.axes, stride, strict=True):
        window = max(1, math.ceil(axis.length * eighths / 8))
        axes.append(Axis(axis.length, window, min(step, window), 1, axis.causal))
    neighborhood = replace(workload.neighborhood, axes=tuple(axes))
    found = speedups(
        plan(replace(workload, neighborhood=neighborhood), cut.architecture, cut.tiling)
    )
    return eighths / 8, found.flop_bound if bound else found.predicted
