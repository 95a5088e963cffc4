"""Position ids of packed latents: a tensor whose rows are the coordinates of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from gna_compile import _torch

COLUMNS = (3, 4)  # t, h, w, and l (place in a sequence) in newer models


def may_be_ids(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor may hold position ids: by its name and its shape [.., tokens, 3 or 4]."""
    return "ids" in name and value.ndim in (2, 3) and value.shape[-1] in COLUMNS


def name_of(node: fx.Node) -> str:
    """The model's own name of an ids input: `img_ids` of Dynamo's `l_kwargs_img_ids_`."""
    found = re.search(r"(?:[a-z]+_)?ids", node.name)
    return found.group() if found else node.name


def grid_from_ids(ids: torch.Tensor) -> tuple[int, ...] | None:
    """The grid of the one image whose tokens these position ids enumerate in raster order.

    Args:
        ids: coordinates [tokens, columns], or [batch, tokens, columns] with equal rows for the
            whole batch. Copied to the host once.

    Returns:
        Height and width; None if the values are no such raster, or several of them (see
        `runs_from_ids`). A single row or column is a mere enumeration, as text tokens have it, and
        no grid.
    """
    return one_grid(runs_from_ids(ids))


def counting_columns(ids: torch.Tensor) -> frozenset[int]:
    """The columns of position ids that tell tokens apart."""
    table = ids.detach().flatten(0, -2)
    return frozenset(i for i in range(table.shape[-1]) if bool((table[:, i] != table[0, i]).any()))


def one_grid(runs: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The grid if the tokens are one image of more than one row and column."""
    return runs[0] if len(runs) == 1 and min(runs[0]) > 1 else None


def runs_from_ids(ids: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """The images whose tokens position ids enumerate one after another: height and width of each.

    Columns are (t, h, w) or (t, h, w, l). The first one tells images apart (a model for image
    editing gives its reference images other values), so it is no axis: a new image begins where it
    changes:

        t   0 0 0 0 0 0 | 1 1 1 1
        h   0 0 0 1 1 1 | 0 0 1 1     an image of 2 x 3, then one of 2 x 2
        w   0 1 2 0 1 2 | 0 1 0 1

    Every value is checked: within an image h and w must count up in equal steps in raster order,
    from any first value, and nothing else may change.

    Args:
        ids: as for `grid_from_ids`.

    Returns:
        The images in order; () if any part of the tokens is no image of two or more tokens.
    """
    unreadable = isinstance(ids, _torch.FakeTensor) or ids.is_meta
    if unreadable or ids.ndim not in (2, 3) or not ids.numel() or ids.shape[-1] not in COLUMNS:
        return ()
    table = ids.detach().to("cpu", torch.float64)
    if table.ndim == 3:
        if not bool((table == table[:1]).all()):
            return ()
        table = table[0]
    if not bool((table[:, 3:] == table[0, 3:]).all()):
        return ()
    starts = (table[1:, 0] != table[:-1, 0]).nonzero().flatten() + 1
    edges = [0, *starts.tolist(), len(table)]
    runs = []
    for start, stop in pairwise(edges):
        size = _raster(table[start:stop, 1], table[start:stop, 2])
        if size is None:
            return ()
        runs.append(size)
    return tuple(runs)


def why_no_grid(ids: torch.Tensor) -> str:
    """In words, why `grid_from_ids` shows none: the images if there are several."""
    runs = runs_from_ids(ids)
    if len(runs) < 2:
        return "the position ids are not the raster of an image"
    return several_grids(runs)


def several_grids(runs: Sequence[Sequence[int]]) -> str:
    """What is said of tokens that are several grids one after another."""
    sizes = ["×".join(map(str, run)) for run in runs]
    listed = f"{', '.join(sizes[:-1])} and {sizes[-1]}"
    return f"{len(runs)} grids one after another: {listed}; several grids are not rewritten yet"


def _raster(rows: torch.Tensor, columns: torch.Tensor) -> tuple[int, int] | None:
    """Height and width if these coordinates [tokens] are a raster of two or more tokens."""
    height, width = torch.unique(rows), torch.unique(columns)
    if len(rows) < 2 or len(height) * len(width) != len(rows):
        return None
    if not (_has_equal_steps(height) and _has_equal_steps(width)):
        return None
    expected = torch.meshgrid(height, width, indexing="ij")
    shown = zip(expected, (rows, columns), strict=True)
    if not all(torch.equal(want.reshape(-1), got) for want, got in shown):
        return None
    return len(height), len(width)


def _has_equal_steps(values: torch.Tensor) -> bool:
    steps = values.diff()
    return bool((steps == steps[:1]).all())


class SeenIds:
    """Reads position ids again exactly when their content is not that of the last ones.

    A private copy of the ids that were read last is compared with those of each call, on their
    device: identity and version say too little, since `.data`, NumPy and kernels change values
    behind them. On an accelerator that is one comparison and one synchronization a call; ids on the
    CPU wait for nothing. A copy or a pickle of this object has seen nothing yet.
    """

    def __init__(self) -> None:
        self._seen: tuple[torch.Tensor, tuple[tuple[int, int], ...]] | None = None

    def runs(self, ids: torch.Tensor) -> tuple[tuple[int, int], ...]:
        """As `runs_from_ids`."""
        if isinstance(ids, _torch.FakeTensor) or ids.is_meta:
            return ()
        seen = self._seen
        if seen is None or not same_content(seen[0], ids):
            with torch.no_grad():
                copy = ids.detach().clone()
            # Of the copy, which nothing else can change in between.
            self._seen = seen = copy, runs_from_ids(copy)
        return seen[1]

    def grid(self, ids: torch.Tensor) -> tuple[int, ...] | None:
        """As `grid_from_ids`."""
        return one_grid(self.runs(ids))

    def __reduce__(self) -> Any:
        return SeenIds, ()


def same_content(copy: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype, device and values; waits for their device."""
    alike = copy.shape == ids.shape and copy.dtype == ids.dtype and copy.device == ids.device
    return alike and torch.equal(copy, ids)
