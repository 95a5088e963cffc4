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


def plans_table(
    entries: Sequence[tuple[Entry, Plan]], flat: tuple[int, int] | None = None
) -> Table:
    """One column an entry: its tiles, what they visit, and the speedups.

    Args:
        entries: what to show; at least one.
        flat: tokens of a flattened query and key tile, whose figures are then shown too.
    """
    columns = [
        _geometry(cut.workload.neighborhood) | _figures(entry, cut) for entry, cut in entries
    ]
    if flat is not None:
        for column, (_, cut) in zip(columns, entries, strict=True):
            column |= _flat_figures(cut, *flat)
    return _by_column(entries[0][1].architecture, [entry.name for entry, _ in entries], columns)


def cpu_table(entries: Sequence[tuple[Entry, Neighborhood, float]]) -> Table:
    """One column an entry: the CPU's predicted speedup against the FLOP bound."""
    columns = []
    for _, neighborhood, predicted in entries:
        bound = neighborhood.tokens**2 / neighborhood.pairs
        speedup = {"FLOP bound": _speedup(bound), "predicted": _speedup(predicted)}
        columns.append(_geometry(neighborhood) | speedup)
    return _by_column("cpu", [entry.name for entry, *_ in entries], columns)


def _figures(entry: Entry, cut: Plan) -> dict[str, str]:
    found = speedups(cut)
    figures = {
        "query box": times(cut.query_box),
        "key box": times(cut.key_box),
        "visited (most)": f"{cut.grid.visited.mean:.1f} ({cut.grid.visited.max})",
        "masked": f"{cut.partial / cut.visited:.0%}",
        "FLOP bound": _speedup(found.flop_bound),
        "mean tile": _speedup(found.mean_tile),
        "simulator": _speedup(found.simulator),
        "predicted": _speedup(found.predicted),
        "ms": f"{cut.milliseconds:.2f}",
        "ms if dense": f"{found.dense_milliseconds:.2f}",
    }
    if entry.attention_share is not None:
        run = end_to_end(found.predicted, entry.attention_share, *entry.dense_steps)
        figures["whole run"] = _speedup(run)
    return figures


def _flat_figures(cut: Plan, query_tile: int, key_tile: int) -> dict[str, str]:
    neighborhood = cut.workload.neighborhood
    counts = flat_counts(neighborhood, query_tile, key_tile, cut.tiling)
    tokens = neighborhood.grid_tokens
    return {
        f"flattened {query_tile}, {key_tile}": "",
        "- visited (most)": f"{counts.visited.mean:.1f} ({counts.visited.max})",
        "- masked": f"{counts.partial.sum / counts.visited.sum:.0%}",
        "- mean tile": _speedup(tokens**2 / (counts.visited.sum * query_tile * key_tile)),
        "- simulator": _speedup(-(-tokens // key_tile) / counts.visited.max),
    }


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


def _geometry(neighborhood: Neighborhood) -> dict[str, str]:
    axes = neighborhood.axes
    parts = [neighborhood.prefix, times(neighborhood.grid), neighborhood.suffix]
    lines = {
        "grid": " + ".join(str(part) for part in parts if part),
        "window": times(axis.window for axis in axes),
        "stride": times(axis.stride for axis in axes),
    }
    if any(axis.dilation > 1 for axis in axes):
        lines["dilation"] = times(axis.dilation for axis in axes)
    if any(axis.causal for axis in axes):
        lines["causal"] = " ".join("yes" if axis.causal else "no" for axis in axes)
    return lines


def _by_column(corner: str, names: Sequence[str], columns: Sequence[dict[str, str]]) -> Table:
    """A table of one column each, with a row for every line that any of them has."""
    table = _table(corner)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    lines: dict[str, None] = {}
    for column in sorted(columns, key=len, reverse=True):
        lines |= dict.fromkeys(column)
    for line in lines:
        table.add_row(line, *(column.get(line, "-") for column in columns))
    return table
