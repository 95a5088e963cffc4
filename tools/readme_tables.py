"""Writes the tables of README.md: models from tests/golden, speeds from benchmarks/results.

`make test` fails when a table is not current. After a change of decisions, and having looked at it:
`UPDATE_GOLDEN=1 make test`, then `python tools/readme_tables.py`; after a benchmark the latter alone.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def models() -> str:
    """One row for each `*.decisions.txt`: model, sites found, rewritten, dense by reason."""
    rows = [["model", "sites", "rewritten", "layout from", "dense"]]
    for path in sorted((ROOT / "tests" / "golden").glob("*.decisions.txt")):
        title, *lines = path.read_text().splitlines()
        sites = [[cell.strip() for cell in line.split("|")] for line in lines]
        reasons = Counter(became for *_, became in sites if not became.startswith("gna "))
        sources = dict.fromkeys(
            layout.partition("(")[2].rstrip(")")
            for *_, layout, became in sites
            if became.startswith("gna ")
        )
        rewritten = len(sites) - reasons.total()
        dense = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        cells = [title, str(len(sites)), str(rewritten), ", ".join(sources) or "–", dense or "–"]
        rows.append(cells)
    return _table(rows)


def hopper() -> str:
    """Speedups of the Hopper kernel over cuDNN's dense attention."""
    data = _results("kernels-h200.json")
    rows = [["case", "FLOP bound", "cuDNN dense, ms", "ours, ms", "speedup", "of the bound"]]
    for result in data["results"]:
        speedup, bound = result["speedup"], result["bound"]
        cells = [result["case"], f"{bound:.2f}×", f"{result['cudnn']:.1f}", f"{result['ours']:.2f}"]
        rows.append([*cells, f"**{speedup:.2f}×**", f"{speedup / bound:.0%}"])
    machine = data["machine"]
    return (
        f"{machine['card']}, torch {machine['torch']}, cuDNN {machine['cudnn']}, commit "
        f"{machine['commit']}:\n\n{_table(rows)}"
    )


def cpu() -> str:
    """Speedups of the CPU kernel over PyTorch's dense attention."""
    data = _results("cpu.json")
    about, results = data["environment"], data["results"]
    head = ["case", "head size", "dtype", "tile bound", "forward", "with backward"]
    rows = [[*head, "FlexAttention", "portable"]]
    for row in results["rows"]:
        cells = [row["case"], str(row["head_dim"]), row["dtype"], f"{row['tile_bound']:.1f}×"]
        for name in ("ours", "ours_training", "flex", "portable"):
            dense = row["dense_training" if "training" in name else "dense"]
            cells.append(f"{dense / row[name]:.1f}×" if row[name] else "–")
        rows.append(cells)
    return (
        f"{about['cpu']}, {about['threads']} threads, batch 1, {results['heads']} heads, torch "
        f"{about['versions']['torch']}, commit {about['commit'][:7]}:\n\n{_table(rows)}"
    )


def overhead() -> str:
    """The backend's own time beside Inductor's."""
    data = _results("overhead.json")
    rows = [["shapes", "sites", "ours", "Inductor", "share"]]
    for name, runs in data["results"].items():
        ours, inductor = (statistics.median(r[key] for r in runs) for key in ("ours", "inductor"))
        times = [f"{ours * 1e3:.0f} ms", f"{inductor:.1f} s", f"{ours / inductor:.2%}"]
        rows.append([name, f"{runs[0]['sites']:.0f}", *times])
    return _table(rows)


TABLES = {"models": models, "hopper": hopper, "cpu": cpu, "overhead": overhead}


def with_tables(readme: str) -> str:
    """The README with current tables between their marks."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end of {name} -->"
        before, _, rest = readme.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md has no {begin} ... {end}")
        readme = f"{before}{begin}\n{table()}\n{end}{after}"
    return readme


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))
