"""The figures of `gna simulate` as rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from gna_compile.geometry import Neighborhood
from gna_compile.planner import Plan, better_stride, end_to_end, speedups
from gna_compile.simulate.flat import flat_counts
from gna_compile.simulate.front import Point
from gna_compile.simulate.problems import Entry


def plans_table(entries: Sequence[tuple[Entry, Plan]]) -> Table:
    """One row an entry: its tiles, what they visit, and the speedups."""
    table = _table(
        "", "grid", "window / stride", "query box", "key box", "visited (most)", "masked"
    )
    for name in ("FLOP bound", "mean tile", "simulator", "predicted", "ms (dense)", "whole run"):
        table.add_column(name, justify="right", overflow="fold")
    for entry, cut in entries:
        found = speedups(cut)
        run = "-"
        if entry.attention_share is not None:
            run = _speedup(end_to_end(found.predicted, entry.attention_share, *entry.dense_steps))
        table.add_row(
            entry.name,
            *_geometry(cut.workload.neighborhood),
            times(cut.query_box),
            times(cut.key_box),
            f"{cut.grid.visited.mean:.1f} ({cut.grid.visited.max})",
            f"{cut.boundary / cut.visited:.0%}",
            *map(_speedup, (found.flop_bound, found.mean_tile, found.simulator, found.predicted)),
            f"{cut.milliseconds:.2f} ({found.dense_milliseconds:.1f})",
            run,
        )
    return table


def cpu_table(entries: Iterable[tuple[Entry, Neighborhood, float]]) -> Table:
    """One row an entry: the CPU's predicted speedup against the FLOP bound."""
    table = _table("cpu", "grid", "window / stride", "FLOP bound", "predicted")
    for entry, neighborhood, predicted in entries:
        bound = neighborhood.tokens**2 / neighborhood.pairs
        table.add_row(entry.name, *_geometry(neighborhood), _speedup(bound), _speedup(predicted))
    return table


def flat_table(entries: Sequence[tuple[Entry, Plan]], query_tile: int, key_tile: int) -> Table:
    """One row an entry: flattened tiles of so many tokens in place of boxes."""
    table = _table(f"flattened {query_tile}x{key_tile}", "visited (most)", "masked", "mean tile")
    table.add_column("simulator")
    for entry, cut in entries:
        neighborhood = cut.workload.neighborhood
        counts = flat_counts(neighborhood, query_tile, key_tile, cut.tiling)
        tokens = neighborhood.grid_tokens
        table.add_row(
            entry.name,
            f"{counts.visited.mean:.1f} ({counts.visited.max})",
            f"{counts.boundary.sum / counts.visited.sum:.0%}",
            _speedup(tokens**2 / (counts.visited.sum * query_tile * key_tile)),
            _speedup(-(-tokens // key_tile) / counts.visited.max),
        )
    return table


def front_table(front: Sequence[Point]) -> Table:
    """One row a point, densest first."""
    table = _table("left out", "window", "stride", "FLOP bound", "predicted", "block-sparse")
    for point in front:
        table.add_row(
            f"{point.sparsity:.1%}",
            times(axis.window for axis in point.axes),
            times(axis.stride for axis in point.axes),
            _speedup(1 / (1 - point.sparsity)),
            _speedup(point.speedup),
            "yes" if point.plan.is_block_sparse else "",
        )
    return table


def hints(entries: Sequence[tuple[Entry, Plan]]) -> list[str]:
    """A line for every entry that one change of stride would make block-sparse."""
    lines = []
    for entry, cut in entries:
        stride = better_stride(cut.workload, cut.architecture, cut.tiling)
        if stride is not None:
            lines.append(
                f"hint: {entry.name}: with stride {times(stride)} no key tile would need a mask"
            )
    return lines


def times(sizes: Iterable[Any]) -> str:
    """E.g. `18x24x24`."""
    return "x".join(map(str, sizes))


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _speedup(value: float) -> str:
    return f"{value:.2f}x"


def _geometry(neighborhood: Neighborhood) -> tuple[str, str]:
    axes = neighborhood.axes
    parts = [neighborhood.prefix, times(neighborhood.grid), neighborhood.suffix]
    text = f"{times(axis.window for axis in axes)} / {times(axis.stride for axis in axes)}"
    if any(axis.dilation > 1 for axis in axes):
        text += f" dilation {times(axis.dilation for axis in axes)}"
    if any(axis.causal for axis in axes):
        text += " causal " + " ".join("yes" if axis.causal else "no" for axis in axes)
    return " + ".join(str(part) for part in parts if part), text
