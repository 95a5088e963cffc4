"""The grids of a prepared model as Dynamo sees them: sizes of tensors, which it may keep symbolic.

Where position ids or the sizes of a model's inputs decide on the grid, no shape in the graph of a
block has its sizes, and Dynamo would take plain numbers for constants: one graph for each grid. So a
prepared model has empty tensors whose shapes are its grids, and every attention module that is
traced marks its graph with those sizes. Dynamo makes them inputs of the graph once they have
changed, as it does with all shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import fx

from gna_compile.graph.symbols import Size, same_shape

_library = torch.library.Library("gna", "FRAGMENT")
_library.define(
    "packed_grid.v1(SymInt[] sizes, int place) -> ()", tags=(torch.Tag.pt2_compliant_tag,)
)
# Other compilers see nothing of it.
_library.impl("packed_grid.v1", lambda sizes, place: None, "CompositeImplicitAutograd")
_MARK = torch.ops.gna.packed_grid.v1

Grid = tuple[int, ...]
T = TypeVar("T")


class PackedGrid:
    """The grids that the inputs of a model show at present.

    Attributes:
        declared: the grids that `prepare` or its policy declares.
        grids: first the grid in the position ids, then what has become of each declared grid; None
            where there is none. Until the model is first called, what is declared holds.
        tensors: for each, an empty tensor [*grid, 0].
        why: for each that is None, why, in words.
        is_seen: whether some call had inputs that a declared grid could be held against.
        is_said: whether a warning was logged that a declared grid does not hold.
    """

    def __init__(self, declared: Sequence[Grid] = ()) -> None:
        self.declare(declared)

    def declare(self, declared: Sequence[Grid]) -> None:
        """Forgets what was seen, and takes these grids as declared."""
        self.declared = tuple(declared)
        self.grids: tuple[Grid | None, ...] = (None, *self.declared)
        self.tensors = tuple(map(_tensor_of, self.grids))
        self.why = ("",) * len(self.grids)
        self.is_seen = self.is_said = False

    @property
    def grid(self) -> Grid | None:
        """What position ids show."""
        return self.grids[0]

    def show(self, grid: Grid | None, why: str = "", place: int = 0) -> None:
        """Takes another grid, of position ids or of the declared grid at this place."""
        self.why = _with(self.why, place, why)
        if grid != self.grids[place]:
            self.grids = _with(self.grids, place, grid)
            self.tensors = _with(self.tensors, place, _tensor_of(grid))

    def place_of(self, declared: Sequence[Size] | None) -> int | None:
        """Where in `grids` a declared grid is (None: that of position ids), or None."""
        if declared is None:
            return 0
        known = [place for place, grid in enumerate(self.declared, 1) if grid == tuple(declared)]
        return known[0] if known else None


def _with(items: tuple[T, ...], place: int, item: T) -> tuple[T, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _tensor_of(grid: Grid | None) -> torch.Tensor | None:
    if grid is None:
        return None
    with torch.inference_mode(False):  # or guards would tell two kinds of tensors apart
        return torch.empty(*grid, 0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class Mark:
    """A grid that guards hold a graph to, and its place in `PackedGrid.grids`."""

    place: int
    grid: tuple[Size, ...]


def mark(packed: PackedGrid) -> None:
    """Notes the grids in the graph that is being traced."""
    for place, tensor in enumerate(packed.tensors):
        if tensor is not None:
            _MARK([tensor.size(axis) for axis in range(tensor.dim() - 1)], place)


def take_marks(gm: fx.GraphModule) -> list[Mark]:
    """The different grids that a graph of Dynamo is marked with, without the marks from then on."""
    found: list[Mark] = []
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        marks = module.graph.find_nodes(op="call_function", target=_MARK)
        for node in marks:
            sizes, place = node.args
            grid = fx.node.map_arg(tuple(sizes), lambda size: size.meta["example_value"])
            if not any(m.place == place and same_shape(grid, m.grid) for m in found):
                found.append(Mark(place, grid))
            module.graph.erase_node(node)
        if marks:
            module.recompile()
    return found
