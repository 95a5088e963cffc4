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
    "packed_grid.v2(SymInt[] sizes, int place, int number) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Other compilers see nothing of it.
_library.impl("packed_grid.v2", lambda sizes, place, number: None, "CompositeImplicitAutograd")
_MARK = torch.ops.gna.packed_grid.v2

Grid = tuple[int, ...]
Segments = tuple[int | Grid, ...]
"""From the first grid to the last: the lengths of a grid, or a number of tokens between two."""
T = TypeVar("T")


class PackedGrid:
    """The grids that the inputs of a model show at present.

    Attributes:
        declared: the segments that `prepare` or its policy declares, for each layout.
        segments: first those in the position ids, then what has become of each declared layout;
            None where there are none. Until the model is first called, what is declared holds.
        tensors: for each, an empty tensor [*sizes, 0] for each of its segments.
        why: for each that is None, why, in words.
        is_seen: whether some call had inputs that a declared layout could be held against.
        is_said: whether a warning was logged that a declared layout does not hold.
    """

    def __init__(self, declared: Sequence[Segments] = ()) -> None:
        self.declare(declared)

    def declare(self, declared: Sequence[Segments]) -> None:
        """Forgets what was seen, and takes these layouts as declared."""
        self.declared = tuple(declared)
        self.segments: tuple[Segments | None, ...] = (None, *self.declared)
        self.tensors = tuple(map(_tensors_of, self.segments))
        self.why = ("",) * len(self.segments)
        self.is_seen = self.is_said = False

    @property
    def of_ids(self) -> Segments | None:
        """What position ids show."""
        return self.segments[0]

    def show(self, segments: Segments | None, why: str = "", place: int = 0) -> None:
        """Takes others, of position ids or of the declared layout at this place."""
        self.why = _with(self.why, place, why)
        if segments != self.segments[place]:
            self.segments = _with(self.segments, place, segments)
            self.tensors = _with(self.tensors, place, _tensors_of(segments))

    def place_of(self, declared: Sequence[Size | Sequence[Size]] | None) -> int | None:
        """Where in `segments` a declared layout is (None: that of position ids), or None."""
        if declared is None:
            return 0
        known = [place for place, own in enumerate(self.declared, 1) if own == tuple(declared)]
        return known[0] if known else None


def _with(items: tuple[T, ...], place: int, item: T) -> tuple[T, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _tensors_of(segments: Segments | None) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False):  # or guards would tell two kinds of tensors apart
        return tuple(
            torch.empty(*_sizes(segment), 0, dtype=torch.uint8, device="cpu")
            for segment in segments or ()
        )


def _sizes(segment: int | Grid) -> Grid:
    return segment if isinstance(segment, tuple) else (segment,)


@dataclass(frozen=True)
class Mark:
    """A segment that guards hold a graph to.

    Attributes:
        place: of its layout in `PackedGrid.segments`.
        number: its own in the layout.
        sizes: the lengths of the grid, or the one number of tokens.
    """

    place: int
    number: int
    sizes: tuple[Size, ...]


def mark(packed: PackedGrid) -> None:
    """Notes the grids in the graph that is being traced."""
    for place, tensors in enumerate(packed.tensors):
        for number, tensor in enumerate(tensors):
            _MARK([tensor.size(axis) for axis in range(tensor.dim() - 1)], place, number)


def marks_of(packed: PackedGrid) -> list[Mark]:
    """The marks of sizes that are constants."""
    return [
        Mark(place, number, _sizes(segment))
        for place, segments in enumerate(packed.segments)
        for number, segment in enumerate(segments or ())
    ]


def take_marks(gm: fx.GraphModule) -> list[Mark]:
    """The different grids that a graph of Dynamo is marked with, without the marks from then on."""
    found: list[Mark] = []
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        marks = module.graph.find_nodes(op="call_function", target=_MARK)
        for node in marks:
            given, place, number = node.args
            sizes = fx.node.map_arg(tuple(given), lambda size: size.meta["example_value"])
            if not any(
                (m.place, m.number) == (place, number) and same_shape(sizes, m.sizes) for m in found
            ):
                found.append(Mark(place, number, sizes))
            module.graph.erase_node(node)
        if marks:
            module.recompile()
    return found
