"""Random problems for FlexAttention."""

from __future__ import annotations

import random
from typing import Any

import oracle
import torch
from problems import error
from torch import Tensor

from gna_compile import ops


def check_random_problem(
    seed: int, device: str, dtype: torch.dtype, longest: dict[int, int], tolerance: float = 2e-5
) -> None:
    """Forward, logsumexp and backward of provider "flex" against the oracle."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rank = rng.choice([1, 2, 3])
    geometry: dict[str, Any] = {n: [] for n in ("grid", "window", "stride", "dilation", "causal")}
    for _ in range(rank):
        length = rng.randint(1, longest[rank])
        dilation = rng.choice([1, 1, rng.randint(1, min(length, 4))])
        window = rng.choice([rng.randint(1, length // dilation), length // dilation])
        stride = rng.choice([1, rng.randint(1, window), window])
        for name, drawn in zip(
            geometry, (length, window, stride, dilation, rng.random() < 0.25), strict=True
        ):
            geometry[name].append(drawn)
    prefix, suffix = (rng.choice([0, 0, rng.randint(0, 150)]) for _ in range(2))
    visible = oracle.mask(**geometry, prefix=prefix, suffix=suffix).to(device)
    tokens, batch, kv_heads = len(visible), rng.choice([1, 2]), rng.choice([1, 2])
    heads, head_dim = kv_heads * rng.choice([1, 1, 2, 3]), rng.choice([16, 32, 40, 64, 96, 128])

    def values(heads: int) -> Tensor:
        if rng.random() < 0.5:
            return torch.randn(batch, tokens, heads, head_dim).to(device, dtype).transpose(1, 2)
        return torch.randn(batch, heads, tokens, head_dim).to(device, dtype)

    inputs = [values(count).requires_grad_() for count in (heads, kv_heads, kv_heads)]
    key_mask = None
    if rng.random() < 0.4:
        key_mask = (torch.rand(batch, prefix + suffix) < 0.5).to(device)
    scale = rng.choice([None, 0.3, -0.5, 0.0])
    results = ops.neighborhood_attention(
        *inputs,
        **geometry,
        prefix=prefix,
        suffix=suffix,
        key_mask=key_mask,
        scale=scale,
        return_logsumexp=True,
        provider="flex",
    )
    wanted = oracle.attention(
        *inputs, visible=visible, key_mask=key_mask, scale=scale, prefix=prefix
    )
    assert error(results[0], wanted[0]) < tolerance, geometry
    assert error(results[1], wanted[1]) < max(2e-5, tolerance / 10), geometry
    count = rng.choice([1, 2])
    upstream = [values(heads), torch.randn(batch, heads, tokens, device=device)][:count]
    grads = torch.autograd.grad(results[:count], inputs, upstream)
    expected = torch.autograd.grad(wanted[:count], inputs, [x.double() for x in upstream])
    for grad, other in zip(grads, expected, strict=True):
        assert error(grad, other.double()) < 3 * tolerance, geometry
