"""Small models of packed latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


OPTIONS: dict[str, Any] = {"inner": "eager"}


def policy(*rules: dict[str, Any], **top: Any) -> dict[str, Any]:
    base = {"version": 1, "min_tokens": 0, "min_speedup": 0}
    return {**base, **top, "rules": list(rules) or [{"window": 3}]}


class Attn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x)
        return x + y


class Net(nn.Module):
    """Images [batch, 3, H, W] with the token grid (H / 2, W / 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class Tokens(nn.Module):
    """Takes tokens that something else has packed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, height: int = 6) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, 2 * height, 2 * width)
