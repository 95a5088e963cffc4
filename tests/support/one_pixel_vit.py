"""A vision transformer of one attention head, with one step between its patches and the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import gna_compile

C = 16


H, W = 8, 12


POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 1,
    "min_speedup": 0,
    "rules": [{"window": "1/2"}],
}


OPTIONS: dict[str, Any] = {"policy": POLICY, "inner": "eager"}


class Model(nn.Module):
    """A patch embedding of one pixel, one attention head, and what happens in between.

    Args:
        step: from the model and its first input to what `attention` is made of.
    """

    def __init__(self, step: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.step = step
        self.mask: Tensor | None = None
        self.patch, self.other_patch = nn.Conv2d(3, C, 1), nn.Conv2d(3, C, 1)
        self.qkv = nn.Linear(C, 3 * C)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def tokens(self, image: Tensor) -> Tensor:
        return self.patch(image).flatten(2).transpose(1, 2)

    def attention(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Attention over [batch, tokens, C]; keys and values of `other` if it is given."""
        query = self.qkv(x)[..., :C]
        key, value = self.qkv(x if other is None else other)[..., C:].chunk(2, -1)
        return attend(query[:, None], key[:, None], value[:, None], attn_mask=self.mask)[:, 0]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(self, *inputs)


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, H, W)


def permutation(n: int = H * W) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def explained(model: nn.Module, *inputs: Any) -> list[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        return gna_compile.explain(model.eval(), *inputs, policy=POLICY, quiet=True).rows


def compiled(model: nn.Module) -> Any:
    return torch.compile(model.eval(), backend="gna", options=OPTIONS)
