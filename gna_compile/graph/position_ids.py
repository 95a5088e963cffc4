"""Position ids of packed latents: a tensor whose rows are the coordinates of tokens."""

from __future__ import annotations

import math
import re

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

COLUMNS = (3, 4)  # t, h, w, and l (place in a sequence) in newer models


def may_be_ids(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor may hold position ids: by its name and its shape [.., tokens, 3 or 4]."""
    return "ids" in name and value.ndim in (2, 3) and value.shape[-1] in COLUMNS


def name_of(node: fx.Node) -> str:
    """The model's own name of an ids input: `img_ids` of Dynamo's `l_kwargs_img_ids_`."""
    found = re.search(r"(?:[a-z]+_)?ids", node.name)
    return found.group() if found else node.name


def grid_from_ids(ids: torch.Tensor) -> tuple[int, ...] | None:
    """The grid that position ids enumerate in raster order, from their values.

    Every value is checked. Each column must count up in equal steps along its own axis (from any
    first value) and not change along the others, the first column being the slowest. Columns that
    never change are no axes.

    Args:
        ids: coordinates [tokens, columns], or [batch, tokens, columns] with equal rows for the
            whole batch. Copied to the host once.

    Returns:
        Two or three sizes; None if the values are no such raster. A single axis is a mere
        enumeration, as text tokens have it, and no grid.
    """
    if isinstance(ids, FakeTensor) or ids.ndim not in (2, 3) or not ids.numel():
        return None
    table = ids.detach().to("cpu", torch.float64)
    if table.ndim == 3:
        if not bool((table == table[:1]).all()):
            return None
        table = table[0]
    columns = [column for column in table.unbind(-1) if not bool((column == column[0]).all())]
    coordinates = [torch.unique(column) for column in columns]
    grid = tuple(len(values) for values in coordinates)
    if not 2 <= len(grid) <= 3 or math.prod(grid) != len(table):
        return None
    if any(not _has_equal_steps(values) for values in coordinates):
        return None
    raster = torch.meshgrid(*coordinates, indexing="ij")
    shown = all(torch.equal(r.reshape(-1), c) for r, c in zip(raster, columns, strict=True))
    return grid if shown else None


def _has_equal_steps(values: torch.Tensor) -> bool:
    steps = values.diff()
    return bool((steps == steps[0]).all())
