"""Writes the table of models into README.md, from the decisions that the tests keep in tests/golden.

`make test` fails when a decision changes or the table is not current; then, having looked at the
change: `UPDATE_GOLDEN=1 make test` and `python tools/model_table.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table of models -->", "<!-- end of the table of models -->"


def table(golden: Path = ROOT / "tests" / "golden") -> str:
    """One row for each `*.decisions.txt`: model, sites found, rewritten, dense by reason."""
    rows = ["| model | sites | rewritten | layout from | dense |", "|---|---|---|---|---|"]
    for path in sorted(golden.glob("*.decisions.txt")):
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
        source = ", ".join(sources) or "–"
        rows.append(f"| {title} | {len(sites)} | {rewritten} | {source} | {dense or '–'} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """The README with a current table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text()))
