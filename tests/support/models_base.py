"""What the recipes of small models share: sizes, token grids, random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Grid = tuple[int, ...]
Inputs = dict[str, Any]

VIDEO: Grid = (5, 6, 8)
IMAGE: Grid = (8, 10)
SQUARE: Grid = (10, 10)
TEXT = 14
"""Text tokens of models that take text."""
HIDDEN_TEXT = 5
"""How many of them, at the end, a model's text mask hides."""
TEXT_WIDTH = 32


@dataclass(frozen=True)
class Recipe:
    """How to make one model and its inputs.

    Attributes:
        library: "diffusers", "transformers" or "timm".
        grid: default token grid, (T, H, W) or (H, W).
        model: makes the model; a model with a table of positions is made for one grid.
        inputs: (grid, batch) to the keyword arguments of `forward`.
        layouts: how the tokens of each self-attention lie on `grid`, in the order in which they
            run: see `models.TRUE_LAYOUTS`.
        any_grid: one model takes every grid.
    """

    library: Literal["diffusers", "transformers", "timm"]
    grid: Grid
    model: Callable[[Grid], nn.Module]
    inputs: Callable[[Grid, int], Inputs]
    layouts: tuple[str, ...]
    any_grid: bool = True


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def steps(batch: int) -> Tensor:
    return torch.linspace(300, 700, batch)


def text_mask(batch: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """[batch, TEXT]: the last tokens are padding; later samples have one more each."""
    mask = torch.ones(batch, TEXT, dtype=dtype)
    for sample in range(batch):
        mask[sample, TEXT - HIDDEN_TEXT - sample :] = 0
    return mask
