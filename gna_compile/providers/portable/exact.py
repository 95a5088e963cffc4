"""Attention within a tile by matrix products and a softmax: hidden values stay out, whatever they are.

There is no branch on data and no host synchronization on a GPU, so that a CUDA graph can capture it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gna_compile.providers.portable.tile_tensors import Tile
from gna_compile.providers.problem import Forward, Gradients, OutputGradients


def accurate(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(tile: Tile, scale: float) -> Forward:
    """A tile's output [batch, kv_heads, rows, D] and logsumexp [batch, kv_heads, rows]."""
    dtype = accurate(tile.query.dtype)
    query, key, value = (x.to(dtype) for x in (tile.query, tile.key, tile.value))
    if not key.shape[2]:
        return Forward(torch.zeros_like(query), query.new_full(query.shape[:3], -math.inf))
    outs, lses = [], []
    for rows, hidden in tile.row_chunks():
        scores = torch.matmul(query[:, :, rows], key.mT).mul_(scale)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        highest = scores.amax(dim=-1, keepdim=True)
        # A row of nothing but -inf has output 0 and logsumexp -inf, as in SDPA's safe softmax.
        shift = highest.masked_fill(highest == -math.inf, 0)
        weights = scores.sub_(shift).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        out = product(weights, value, hidden, positive=True)
        outs.append(out.div_(total.masked_fill(total == 0, 1)))
        lses.append((highest + total.log()).squeeze(-1))
    return Forward(torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def attend_backward(
    tile: Tile, forward: Forward, given: OutputGradients, scale: float
) -> Gradients:
    """Gradients of a tile's queries, keys and values; `forward` and `given` are its rows."""
    dtype = accurate(tile.query.dtype)
    query, key, value = (x.to(dtype) for x in (tile.query, tile.key, tile.value))
    grad_out, lse = given.output.to(dtype), forward.logsumexp
    shift = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)
    delta = (grad_out * forward.output.to(dtype)).sum(dim=-1, keepdim=True)
    if given.logsumexp is not None:
        delta = delta - given.logsumexp.unsqueeze(-1)
    grad_queries = []
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for rows, hidden in tile.row_chunks():
        weights = torch.matmul(query[:, :, rows], key.mT).mul_(scale).sub_(shift[:, :, rows]).exp_()
        grad_scores = torch.matmul(grad_out[:, :, rows], value.mT).sub_(delta[:, :, rows])
        hidden_from = None
        if hidden is not None:
            weights.masked_fill_(hidden, 0)
            hidden_from = hidden.mT
        grad_value += product(weights.mT, grad_out[:, :, rows], hidden_from, positive=True)
        grad_scores.mul_(weights).mul_(scale)
        if hidden is not None:
            grad_scores.masked_fill_(hidden, 0)
        grad_queries.append(product(grad_scores, key, hidden, positive=False))
        grad_key += product(grad_scores.mT, query[:, :, rows], hidden_from, positive=False)
    return Gradients(torch.cat(grad_queries, dim=2), grad_key, grad_value)


def product(weights: Tensor, values: Tensor, hidden: Tensor | None, positive: bool) -> Tensor:
    """weights @ values, where hidden pairs (weight 0) stay out even if the value is not finite.

    Args:
        weights: [batch, heads, m, n], 0 where hidden.
        values: [batch, heads, n, D].
        hidden: bool, broadcastable to weights' shape, with m and n as dimensions.
        positive: whether the weights are at least 0, so that a visible inf stays that inf;
            otherwise any visible non-finite value gives NaN.
    """
    if hidden is None:
        return torch.matmul(weights, values)
    finite = torch.isfinite(values)
    if values.device.type == "cpu" and bool(finite.all()):
        return torch.matmul(weights, values)
    product = torch.matmul(weights, values.masked_fill(~finite, 0))
    rising = ~finite & (values != -math.inf) if positive else ~finite
    falling = ~finite & (values != math.inf) if positive else ~finite
    # How many visible values are +inf or NaN, and -inf or NaN: +inf and -inf make a NaN.
    counts = torch.matmul(
        (~hidden).to(values.dtype), torch.cat([rising, falling], dim=-1).to(values.dtype)
    )
    for count, limit in zip(counts.chunk(2, dim=-1), (math.inf, -math.inf), strict=True):
        product += torch.zeros_like(product).masked_fill_(count > 0, limit)
    return product
