"""The first oracle: neighborhood attention by brute force in float64, written on its own.

Nothing here comes from `gna_compile`. Per axis, a boolean matrix is filled row by row from the
definition; the grid's mask is their Kronecker product; attention then looks, for every row, at its
visible keys and at nothing else, so that a hidden value cannot matter whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor


def axis_matrix(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """Bool [length, length]: row i marks the keys that token i of one axis sees."""
    see = np.zeros((length, length), dtype=bool)
    for start in range(dilation):
        members = np.arange(length)[start::dilation]
        count = len(members)
        # Each stride group of members shares one window, which its leader places.
        for first_member in range(0, count, stride):
            sharing = range(first_member, min(first_member + stride, count))
            if causal:
                leader = min(first_member + stride - 1, count - 1)
                window_members = [m for m in range(leader - window + 1, leader + 1) if m >= 0]
            else:
                leader = min(first_member + stride // 2, count - 1)
                low = leader - window // 2
                # Slide a window that sticks out back onto the axis.
                while low + window > count:
                    low -= 1
                while low < 0:
                    low += 1
                window_members = list(range(low, low + window))
            for member in sharing:
                for other in window_members:
                    if not causal or other <= member:
                        see[members[member], members[other]] = True
    return see


def mask(
    grid: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> Tensor:
    """Bool [N, N] with N = prefix + product of grid + suffix: True where row sees column."""
    rank = len(grid)
    stride = stride or [1] * rank
    dilation = dilation or [1] * rank
    causal = causal if causal is not None else [False] * rank
    per_axis = [
        axis_matrix(*parameters)
        for parameters in zip(grid, window, stride, dilation, causal, strict=True)
    ]
    inner = reduce(np.kron, per_axis)
    return torch.from_numpy(np.pad(inner, (prefix, suffix), constant_values=True))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention in float64 over a mask, differentiable.

    Args:
        query: [B, H, N, D], any floating dtype.
        key: [B, Hkv, N, D], Hkv dividing H.
        value: like key.
        visible: bool [N, N], from `mask`.
        key_mask: bool [B, prefix + suffix], False for hidden global keys.
        scale: softmax scale, by default 1 / sqrt(D).
        prefix: how many of key_mask's columns are the first tokens; the rest are the last.

    Returns:
        output [B, H, N, D] and natural logsumexp [B, H, N], both float64.
    """
    batch, heads, tokens, head_dim = query.shape
    group = heads // key.shape[1] if heads else 1
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (repeat(x, "b h n d -> b (h group) n d", group=group) for x in (key, value))
    scale = head_dim**-0.5 if scale is None else scale
    seen = visible[None].repeat(batch, 1, 1)
    if key_mask is not None:
        suffix = key_mask.shape[1] - prefix
        seen[:, :, :prefix] &= key_mask[:, None, :prefix]
        if suffix:
            seen[:, :, tokens - suffix :] &= key_mask[:, None, prefix:]
    finite = all(bool(torch.isfinite(x).all()) for x in (query, key, value))
    return (_all_rows if finite else _row_by_row)(query, key, value, seen=seen, scale=scale)


def _all_rows(
    query: Tensor, key: Tensor, value: Tensor, *, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return torch.einsum("bhij,bhjd->bhid", weights, value), lse


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, *, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    outputs, lses = [], []
    for b in range(query.shape[0]):
        for i in range(query.shape[2]):
            columns = seen[b, i].nonzero().flatten()
            scores = torch.einsum("hd,hjd->hj", query[b, :, i], key[b][:, columns]) * scale
            dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(dead, 0), dim=-1).masked_fill(dead, 0)
            outputs.append(torch.einsum("hj,hjd->hd", weights, value[b][:, columns]))
            lses.append(torch.logsumexp(scores, dim=-1))
    batch = query.shape[0]
    output = rearrange(torch.stack(outputs), "(b n) h d -> b h n d", b=batch)
    return output, rearrange(torch.stack(lses), "(b n) h -> b h n", b=batch)
