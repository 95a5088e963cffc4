"""Neighboring tokens that come from the same sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from gna_compile.graph.tokens.position_ids import ReadIds


@dataclass(frozen=True)
class Run:
    """Neighboring tokens that come from the same sources.

    Attributes:
        size: how many.
        grid: lengths of the axes on which they lie in raster order, if that is proven.
        axes: lengths of the dimensions whose raster they are, which need not be axes of space;
            () if they are off any lattice, or not in order.
        why: what is shown of the grid, and by what.
        ids: the graph's input of position ids that are theirs.
        read: what position ids showed of them and their neighbors.
        also: what other ids showed of the same tokens, or of other rows of the batch.
        disorder: what is known to be wrong with their order.
        doubt: what is not known of them.
        has_tokens: some source's tokens stand behind them; else they are the same for any input.
    """

    size: int
    grid: tuple[int, ...] | None = None
    axes: tuple[int, ...] = ()
    why: str = ""
    ids: fx.Node | None = None
    read: ReadIds | None = None
    also: tuple[ReadIds, ...] = ()
    disorder: str = ""
    doubt: str = ""
    has_tokens: bool = False


def times(grid: Sequence[object]) -> str:
    """Sizes as text: 30×48×80."""
    return "×".join(map(str, grid))
