"""What must hold of a graph's inputs at every call: position ids, and index tensors of modules.

A graph built for one grid must never run on another with as many tokens.

FLUX-like models flatten their latents before the transformer sees them. The grid is visible only
in the values of the position ids, and Dynamo does not guard on values. So the grid is read from the
ids when the graph is compiled, and before the graph runs, again whenever their content has changed.
The grid that a graph runs on is constant, or among its inputs (`packed_grid.py`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gna_compile import _torch
from gna_compile.graph.symbols import Size, entry_of
from gna_compile.graph.tokens.declared import same_grid
from gna_compile.graph.tokens.layouts import Layout
from gna_compile.graph.tokens.position_ids import (
    Piece,
    SeenIds,
    images_in,
    inner_pieces,
    same_content,
    words_of_pieces,
)
from gna_compile.lower import Lowered
from gna_compile.prepared.annotations import show_grids

log = logging.getLogger("gna_compile")


@dataclass(frozen=True)
class Input:
    """A number among a graph's inputs, or a size of the tensor there."""

    index: int
    axis: int | None = None

    def of(self, inputs: Sequence[Any]) -> int:
        value = inputs[self.index]
        return int(value if self.axis is None else value.shape[self.axis])


@dataclass(frozen=True)
class IdsCheck:
    """Ids tensors among a graph's inputs, and what their values must show together.

    Attributes:
        tables: the position of each, and its rows; None for all of them.
        pieces: as `ReadIds` has them, with sizes that enter the graph.
    """

    tables: tuple[tuple[int, tuple[int, int] | None], ...]
    pieces: tuple[int | tuple[int | Input, ...], ...]


@dataclass(frozen=True, eq=False)
class IndexCheck:
    """Position of an index tensor among a graph's inputs, and the values that it must have."""

    index: int
    values: torch.Tensor


def index_checks(
    gm: fx.GraphModule, layouts: Sequence[Layout], example_inputs: Sequence[Any]
) -> tuple[IndexCheck, ...]:
    """Which inputs of `gm` must keep their values for these layouts to be true."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    positions = dict.fromkeys(placeholders.index(node) for x in layouts for node in x.indices)
    return tuple(IndexCheck(i, example_inputs[i].detach().clone()) for i in positions)


def ids_checks(gm: fx.GraphModule, layouts: Sequence[Layout]) -> tuple[IdsCheck, ...]:
    """What must hold of the inputs of `gm` for these layouts to be true."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    checks = [
        IdsCheck(
            tuple((placeholders.index(node), rows) for node, rows in read.tables),
            tuple(
                tuple(_found(size, placeholders) for size in piece)
                if isinstance(piece, tuple)
                else piece
                for piece in read.pieces
            ),
        )
        for layout in layouts
        for read in layout.ids
    ]
    return tuple(dict.fromkeys(checks))


def _found(size: Size, placeholders: Sequence[fx.Node]) -> int | Input:
    """The size, or where a symbolic one is to be found."""
    if isinstance(size, int):
        return size
    found = entry_of(_torch.expression(size), placeholders)
    if found is None:
        raise KeyError(f"the size {size} does not enter this graph")
    node, axis = found
    return Input(placeholders.index(node), axis)


class CheckedAgainstIds:
    """Runs the rewritten graph while the ids show its grid, and the dense one when they do not.

    What decides is the content of the ids at each call: one comparison with those that were read
    last, which waits for the device that they are on.

    Args:
        rewritten: the lowered, rewritten graph.
        dense: the dense graph, lowered or to be lowered at the first mismatch.
        checks: from `ids_checks`.
        indices: from `index_checks`.
        root: the compiled module. If it is prepared, a mismatch passes the grid to it, so that
            the next call uses that grid.
    """

    def __init__(
        self,
        rewritten: Lowered,
        dense: Lowered,
        checks: Sequence[IdsCheck],
        indices: Sequence[IndexCheck],
        root: nn.Module | None,
    ) -> None:
        self._rewritten, self._dense = rewritten, dense
        self._checks, self._indices = checks, indices
        self._root = weakref.ref(root) if root is not None else lambda: None
        self._seen = [SeenIds() for _ in checks]
        self._warned: set[tuple[Any, ...] | None] = set()

    def __call__(self, *inputs: Any) -> Any:
        for index in self._indices:
            if not same_content(index.values, inputs[index.index]):
                if None not in self._warned:
                    log.warning(
                        "a buffer with the order of the tokens has changed since this graph was "
                        "compiled; using dense attention. Compile the model again"
                    )
                self._warned.add(None)
                return self._dense(*inputs)
        for check, seen in zip(self._checks, self._seen, strict=True):
            shown = seen.pieces(*((inputs[index], rows) for index, rows in check.tables))
            pieces = tuple(
                tuple(s.of(inputs) if isinstance(s, Input) else s for s in piece)
                if isinstance(piece, tuple)
                else piece
                for piece in check.pieces
            )
            if not _alike(shown, pieces):
                self._report(shown, pieces)
                return self._dense(*inputs)
        return self._rewritten(*inputs)

    def _report(self, shown: Sequence[Piece], pieces: Sequence[Any]) -> None:
        root = self._root()
        prepared = root is not None and show_grids(root, inner_pieces(shown))
        if tuple(shown) in self._warned:
            return
        self._warned.add(tuple(shown))
        log.warning(
            "position ids describe %s, the graph was compiled for %s; using dense attention%s",
            words_of_pieces(shown) if images_in(shown) else "no grid",
            words_of_pieces(pieces) if pieces else "text",
            " (the next call uses the grid of the ids)"
            if prepared
            else ". Call gna_compile.prepare(model, policy) before torch.compile to recompile "
            "when the grid changes",
        )


def _alike(shown: Sequence[Piece], pieces: Sequence[Any]) -> bool:
    """Whether ids show these pieces; leading axes of length 1 are none of theirs."""
    if not pieces:
        return bool(shown) and not images_in(shown)
    return len(shown) == len(pieces) and all(
        same_grid(ours, theirs)
        if isinstance(ours, tuple) and isinstance(theirs, tuple)
        else ours == theirs
        for ours, theirs in zip(shown, pieces, strict=True)
    )
