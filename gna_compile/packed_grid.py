"""The grid of packed latents as Dynamo sees it: sizes of a tensor, which it may keep symbolic.

Where position ids alone show a grid, no shape in the graph has its sizes, and Dynamo would take
plain numbers for constants: one graph for each grid. So a prepared model has an empty tensor whose
shape is the grid, and every attention module that is traced marks its graph with those sizes.
Dynamo makes them inputs of the graph once they have changed, as it does with all shapes.
"""

from __future__ import annotations

import torch
from torch import fx

from gna_compile.graph.values import Size, same_shape

_library = torch.library.Library("gna", "FRAGMENT")
_library.define("packed_grid.v1(SymInt[] sizes) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
# Other compilers see nothing of it.
_library.impl("packed_grid.v1", lambda sizes: None, "CompositeImplicitAutograd")
_MARK = torch.ops.gna.packed_grid.v1


class PackedGrid:
    """The grid that a model's position ids show at present.

    Attributes:
        grid: its sizes; None if the ids show none, or were never seen.
        tensor: an empty tensor [*grid, 0].
    """

    def __init__(self) -> None:
        self.grid: tuple[int, ...] | None = None
        self.tensor: torch.Tensor | None = None

    def show(self, grid: tuple[int, ...] | None) -> None:
        """Takes another grid."""
        if grid == self.grid:
            return
        self.grid = grid
        with torch.inference_mode(False):  # or guards would tell two kinds of tensors apart
            self.tensor = (
                None if grid is None else torch.empty(*grid, 0, dtype=torch.uint8, device="cpu")
            )


def mark(packed: PackedGrid) -> None:
    """Notes the grid in the graph that is being traced."""
    tensor = packed.tensor
    if tensor is not None:
        _MARK([tensor.size(axis) for axis in range(tensor.dim() - 1)])


def take_marks(gm: fx.GraphModule) -> list[tuple[Size, ...]]:
    """The different grids that a graph of Dynamo is marked with, without the marks from then on."""
    grids: list[tuple[Size, ...]] = []
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        marks = module.graph.find_nodes(op="call_function", target=_MARK)
        for node in marks:
            (sizes,) = node.args
            grid = fx.node.map_arg(tuple(sizes), lambda size: size.meta["example_value"])
            if not any(same_shape(grid, other) for other in grids):
                grids.append(grid)
            module.graph.erase_node(node)
        if marks:
            module.recompile()
    return grids
