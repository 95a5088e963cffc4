"""Which keys of a tile are hidden from which of its queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gna_compile.providers.portable.tiles import AxisTile


class AxisMasks:
    """The masks of tiles, from one small mask per axis and axis tile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[AxisTile, Tensor] = {}

    def hidden(self, box: tuple[AxisTile, ...]) -> Tensor | None:
        """Bool [queries, keys] of a box of the grid, or None if nothing is hidden."""
        rank = len(box)
        shape = [len(tile.queries) for tile in box] + [len(tile.keys) for tile in box]
        hidden: Tensor | None = None
        for axis, tile in enumerate(box):
            if tile.interior:
                continue
            if tile not in self._known:
                self._known[tile] = axis_hidden(tile, self._device)
            view = [1] * (2 * rank)
            view[axis], view[rank + axis] = shape[axis], shape[rank + axis]
            here = self._known[tile].view(view)
            hidden = here if hidden is None else hidden | here
        if hidden is None:
            return None
        return hidden.expand(shape).reshape(math.prod(shape[:rank]), math.prod(shape[rank:]))


def axis_hidden(tile: AxisTile, device: torch.device) -> Tensor:
    """Bool [queries, keys] of one axis: True where the query does not see the key.

    Computed on the device, since a CUDA graph cannot capture a copy from the host. This is
    `Axis.keys` in tensor form, and a test holds the two together.
    """
    axis = tile.axis
    query = torch.arange(tile.queries.start, tile.queries.stop, device=device)[:, None]
    key = torch.arange(tile.keys.start, tile.keys.stop, device=device)
    group = torch.div(query, axis.stride, rounding_mode="floor") * axis.stride
    if axis.causal:
        leader = (group + axis.stride - 1).clamp(max=axis.length - 1)
        return (key < leader - axis.window + 1) | (key > query)
    leader = (group + axis.stride // 2).clamp(max=axis.length - 1)
    first = (leader - axis.window // 2).clamp(0, axis.length - axis.window)
    return (key < first) | (key >= first + axis.window)


def join_hidden(
    hidden_globals: Tensor | None,
    hidden_box: Tensor | None,
    count: int,
    box: tuple[AxisTile, ...],
    device: torch.device,
) -> Tensor:
    """What is hidden among a tile's keys, [batch or 1, 1, rows or 1, globals + box]."""
    keys = math.prod(len(tile.keys) for tile in box)
    if hidden_globals is None:
        hidden_globals = torch.zeros((1, 1, 1, count), dtype=torch.bool, device=device)
    if hidden_box is None:
        hidden_box = torch.zeros((1, 1, 1, keys), dtype=torch.bool, device=device)
    batch, rows = hidden_globals.shape[0], hidden_box.shape[2]
    return torch.cat(
        [hidden_globals.expand(batch, 1, rows, count), hidden_box.expand(batch, 1, rows, keys)],
        dim=3,
    )
