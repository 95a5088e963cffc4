"""Which keys of a tile are hidden from which of its queries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gna_compile.geometry import Axis
from gna_compile.providers.portable.tiles import AxisTile


class AxisMasks:
    """The masks of tiles, from one small mask per axis and run of queries."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[Axis, range, range], Tensor] = {}

    def hidden(self, box: Sequence[AxisTile], key_grid: int) -> Tensor | None:
        """Bool [queries, keys] of a box of queries and its keys in a grid, or None if nothing is hidden."""
        rank = len(box)
        runs = [tile.keys[key_grid] for tile in box]
        shape = [len(tile.positions) for tile in box] + [len(run.positions) for run in runs]
        hidden: Tensor | None = None
        for axis, (tile, run) in enumerate(zip(box, runs, strict=True)):
            if run.full:
                continue
            rule = (tile.axis, tile.positions, run.positions)
            here = self._known.get(rule)
            if here is None:
                here = self._known[rule] = axis_hidden(*rule, self._device)
            view = [1] * (2 * rank)
            view[axis], view[rank + axis] = shape[axis], shape[rank + axis]
            here = here.view(view)
            hidden = here if hidden is None else hidden | here
        if hidden is None:
            return None
        return hidden.expand(shape).reshape(math.prod(shape[:rank]), math.prod(shape[rank:]))


def axis_hidden(axis: Axis, queries: range, keys: range, device: torch.device) -> Tensor:
    """Bool [queries, keys] of an axis of dilation 1: True where the query does not see the key.

    Computed on the device, since a CUDA graph cannot capture a copy from the host. This is
    `Axis.keys` in tensor form, and a test holds the two together.
    """
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    group = torch.div(query, axis.stride, rounding_mode="floor") * axis.stride
    if axis.causal:
        leader = (group + axis.stride - 1).clamp(max=axis.length - 1)
        return (key < leader - axis.window + 1) | (key > query)
    leader = (group + axis.stride // 2).clamp(max=axis.length - 1)
    first = (leader - axis.window // 2).clamp(0, axis.length - axis.window)
    return (key < first) | (key >= first + axis.window)


def join_hidden(parts: Sequence[tuple[Tensor | None, int]], device: torch.device) -> Tensor | None:
    """What is hidden among a tile's keys, [batch or 1, 1, rows or 1, keys]; None if nothing is.

    Args:
        parts: what is hidden among some of them, alike, and how many they are.
        device: of the mask.
    """
    known = [hidden for hidden, _ in parts if hidden is not None]
    if not known:
        return None
    if len(parts) == 1:
        return known[0]
    batch = max(hidden.shape[0] for hidden in known)
    rows = max(hidden.shape[2] for hidden in known)
    nothing = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
    return torch.cat(
        [
            (nothing if hidden is None else hidden).expand(batch, 1, rows, keys)
            for hidden, keys in parts
        ],
        dim=3,
    )
