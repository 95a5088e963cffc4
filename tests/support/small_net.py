"""A small vision transformer, its input and its policies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = (6, 8)


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Net(nn.Module):
    """Patchify, blocks; images [batch, 3, H, W] with the token grid (H / 2, W / 2)."""

    def __init__(self, depth: int = 2, checkpoint: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 2, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.checkpoint = checkpoint

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def policy(*rules: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "min_tokens": 0,
        "min_speedup": 0,
        **top,
        "rules": list(rules) or [{"window": 3}],
    }


def image(grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randn(1, 3, 2 * grid[0], 2 * grid[1])


PHASED = policy({"phases": "warmup", "dense": True}, {"window": 3}, phases=["warmup"])
