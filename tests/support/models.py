"""Small real models with random weights: diffusers, transformers and timm classes as users run them.

`build(name)` gives a model in eval mode and the keyword arguments of one forward call. Sizes are
small and every axis of a token grid has another length, so that swapped axes show. Weights are
seeded, and none is zero: models in training start with zeroed output layers, which would hide what
attention computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import models_image
import models_video
import models_vision
import torch
from models_base import HIDDEN_TEXT, TEXT, Grid, Inputs, Recipe
from models_image import flux_ids
from torch import Tensor, nn

__all__ = [
    "HIDDEN_TEXT",
    "MODELS",
    "OLD_TORCH",
    "TEXT",
    "TRUE_LAYOUTS",
    "Built",
    "build",
    "flux_ids",
    "inputs_for",
    "main_output",
    "randomize",
]

OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
MODELS: dict[str, Recipe] = {
    **models_image.RECIPES,
    **models_video.RECIPES,
    **models_vision.RECIPES,
}
NEWEST = (
    *("bria-fibo2", "bria-fibo2-edit", "flux3", "flux3-reference", "kandinsky6"),
    *("sana-wm", "sana-wm-refiner"),
)
if sys.version_info < (3, 11):  # for which the last diffusers has none of these
    MODELS = {name: recipe for name, recipe in MODELS.items() if name not in NEWEST}

TRUE_LAYOUTS = {name: recipe.layouts for name, recipe in MODELS.items()}
"""How the tokens of every self-attention of a model lie, in the order in which they run.

"14 + 5x6x8 + 2" is 14 tokens of no place, a grid in row-major order, 2 more; "5" is a grid of one
axis. "" is no grid in this order of tokens, as where they are all text. Read in the models' code:
what the backend finds is to be compared with it.
"""


@dataclass(frozen=True)
class Built:
    """A model, the keyword arguments of one forward call, and the token grid that they have."""

    model: nn.Module
    inputs: Inputs
    grid: Grid

    def run(self, model: Callable[..., Any] | None = None) -> Tensor:
        """The main output of `model` (by default this one) on the inputs, without gradients."""
        with torch.no_grad():
            return main_output((self.model if model is None else model)(**self.inputs))


def build(
    name: str,
    grid: Grid | None = None,
    *,
    batch: int = 1,
    seed: int = 0,
    written_out: bool = False,
) -> Built:
    """Makes the model `name` of `MODELS` and its inputs.

    Args:
        grid: token grid; by default the recipe's.
        batch: samples in the batch.
        seed: of weights and inputs; equal seeds give equal values.
        written_out: attention as matmul, softmax, matmul instead of the fused function; the
            weights are the same. transformers and timm only.
    """
    recipe = MODELS[name]
    grid = grid or recipe.grid
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.model(grid).eval()
        randomize(model, seed)
        torch.manual_seed(seed + 1)
        inputs = recipe.inputs(grid, batch)
    if written_out:
        write_out_attention(model)
    return Built(model, inputs, grid)


def inputs_for(name: str, grid: Grid, *, batch: int = 1, seed: int = 0) -> Inputs:
    """Other inputs for a model that takes every grid."""
    recipe = MODELS[name]
    if not recipe.any_grid:
        raise ValueError(f"{name} is made for one grid")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return recipe.inputs(grid, batch)


def main_output(result: Any) -> Tensor:
    """The main tensor of what a forward returned: a tensor, a tuple, or a library's output class."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
    return result


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draws all weights anew so that signals keep their size and no weight is zero.

    Libraries start some layers at zero and others so small that every attention is a plain mean.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            # Weights of linear layers and convolutions; a position table has (1, tokens, width).
            inputs = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            parameter.normal_(0.0, inputs**-0.5, generator=generator)
        elif not parameter.any():
            parameter.normal_(0.0, 0.1, generator=generator)
        elif parameter.abs().max() < 1e-3:
            parameter.normal_(0.0, 1.0, generator=generator)  # scales of a layer's output


def write_out_attention(model: nn.Module) -> None:
    """Switches a transformers or timm model from fused attention to matmul, softmax, matmul."""
    switch: Any = getattr(model, "set_attn_implementation", None)
    by_class = any(type(module).__name__.endswith("SdpaAttention") for module in model.modules())
    if switch is not None and not by_class:
        switch("eager")
        return
    fused: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not fused:
        raise ValueError(f"{type(model).__name__} has no switch from fused to unfused attention")
    for module in fused:
        module.fused_attn = False
