"""Decisions as a table that a person reads in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import HORIZONTALS
from rich.markup import escape
from rich.table import Table

from gna_compile.report.rows import Row


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a rich table, in sections by phase if there are several."""
    phases = list(dict.fromkeys(row.phase for row in rows))
    table = Table(box=HORIZONTALS, show_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("heads x tokens\nx head_dim", no_wrap=True)
    table.add_column("layout\nand source", no_wrap=True)
    table.add_column("becomes", no_wrap=True)
    table.add_column("FLOPs\nkept", justify="right", no_wrap=True)
    table.add_column("speedup\n(bound)", justify="right", no_wrap=True)
    for phase in phases:
        table.add_section()
        if len(phases) > 1:
            table.add_row(f"[bold]in phase {phase}[/bold]")
        for row in rows:
            if row.phase == phase:
                table.add_row(
                    escape(row.layer) or "?",
                    f"{row.heads} x {row.tokens} x {row.head_dim}",
                    f"{row.layout}\n[dim]{row.layout_source}[/dim]" if row.layout else "-",
                    _becomes(row),
                    "-" if row.flop_share is None else f"{row.flop_share:.1%}",
                    _speedup(row),
                )
    return table


def _becomes(row: Row) -> str:
    if row.reason:
        return f"dense: {row.reason}"
    if ":" in row.window:
        groups = zip(row.window.split("; "), row.stride.split("; "), strict=True)
        lines = ["gna, heads", *(f"{w} / {s.split(': ')[1]}" for w, s in groups)]
    else:
        lines = [f"gna {row.window} / {row.stride}"]
    if set(row.dilation) - set("1x+ "):
        lines.append(f"dilation {row.dilation}")
    if "causal" in row.causal:
        lines.append(f"causal {row.causal}")
    if row.between_grids not in ("", "full"):
        lines.append(f"between grids: {row.between_grids}")
    return "\n".join([*lines, f"on {row.provider}"])


def reasons_in_words(rows: Sequence[Row]) -> list[str]:
    """Each reason for which sites stay dense, once, with the values that decided; then hints."""
    reasons = [f"{row.reason}: {row.detail}" for row in rows if row.reason]
    hints = [row.detail for row in rows if row.detail and not row.reason]
    return list(dict.fromkeys(reasons + hints))


def _speedup(row: Row) -> str:
    """The predicted speedup, and under it the FLOP bound."""
    if row.flop_share is None:
        return "-"
    predicted = "?" if row.predicted_speedup is None else f"{row.predicted_speedup:.2f}x"
    return f"{predicted}\n({1 / row.flop_share:.2f}x)"
