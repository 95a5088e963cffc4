"""A pattern in words, as graph diffs and error messages show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gna_compile.geometry.encoding import SAME

_LINKS = {"0": "none", "1": "full", "2": "window"}


def text_of_list(entries: Sequence[Any]) -> str:
    """An encoded pattern in words; its sizes may be symbols or the names of graph nodes.

    Example:
        >>> text_of_list([1, 0, 2, 0, 77, 1, 64, 0, 64, -1, 1, 1, 1, 2, 1, 4, 1, 16, 8, 1, 0])
        '77 + 64; 4 heads: window 16, stride 8'
    """
    rest = iter(entries)
    _, partial = next(rest), next(rest)
    queries = [_segment(rest) for _ in range(next(rest))]
    count = next(rest)
    keys = queries if count == SAME else [_segment(rest) for _ in range(count)]
    links = [[_LINKS[str(next(rest))] for _ in keys] for _ in queries]
    parts = [" + ".join(text for text, _ in queries)]
    if keys is not queries:
        parts[0] += " of " + " + ".join(text for text, _ in keys)
    if keys is not queries or links != _usual(queries):
        parts.append("links " + " / ".join(" ".join(row) for row in links))
    if partial:
        parts.append("partial")
    grids = [rank for _, rank in queries if rank]
    for _ in range(next(rest)):
        heads = next(rest)
        windows = [_window(rest) for _ in grids]
        parts.append(f"{heads} heads: {' / '.join(windows) or 'full'}")
    return "; ".join(parts)


def _segment(rest: Iterator[Any]) -> tuple[str, int]:
    """A segment in words and its rank, 0 for global tokens."""
    rank = next(rest)
    if rank == 0:
        return str(next(rest)), 0
    grid, start, stop = ([str(next(rest)) for _ in range(rank)] for _ in range(3))
    text = "x".join(grid)
    if stop != grid or set(start) != {"0"}:
        text += "[" + ", ".join(f"{a}:{b}" for a, b in zip(start, stop, strict=True)) + "]"
    return text, rank


def _window(rest: Iterator[Any]) -> str:
    rank = next(rest)
    if rank == 0:
        return "full"
    window, stride, dilation, causal = ([str(next(rest)) for _ in range(rank)] for _ in range(4))
    parts = ["window " + "x".join(window)]
    for name, values in (("stride", stride), ("dilation", dilation)):
        if set(values) != {"1"}:
            parts.append(f"{name} " + "x".join(values))
    if "1" in causal:
        parts.append("causal " + "x".join("yes" if value == "1" else "no" for value in causal))
    return ", ".join(parts)


def _usual(queries: Sequence[tuple[str, int]]) -> list[list[str]]:
    """The links of one grid with global tokens around it."""
    grids = [place for place, (_, rank) in enumerate(queries) if rank]
    return [
        ["window" if row == column and row in grids else "full" for column in range(len(queries))]
        for row in range(len(queries))
    ]
