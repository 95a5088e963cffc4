"""The oracle of any attention pattern: a boolean matrix per head, filled from the definition.

Of `gna_compile` it reads the fields of a pattern and calls nothing. Every token of a sequence is a
segment's number and a place in its whole grid; axes are judged by `oracle.axis_matrix`.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import oracle
import torch
from einops import repeat
from torch import Tensor

Token = tuple[int, tuple[int, ...] | None]

_axis_matrix = cache(oracle.axis_matrix)


def tokens(segments: Any) -> list[Token]:
    """Every token of a sequence: its segment, and its place on the segment's grid (None: global)."""
    listed: list[Token] = []
    for number, segment in enumerate(segments):
        if hasattr(segment, "grid"):
            box = [range(a, b) for a, b in zip(segment.start, segment.stop, strict=True)]
            listed += [(number, place) for place in itertools.product(*box)]
        else:
            listed += [(number, None)] * segment.tokens
    return listed


def visible(pattern: Any) -> Tensor:
    """Bool [heads, query tokens, key tokens]: True where the query sees the key."""
    queries, keys = tokens(pattern.queries), tokens(pattern.keys)
    rows = []
    for group in pattern.head_groups:
        windows = iter(group.windows)
        window_of = [next(windows) if hasattr(s, "grid") else None for s in pattern.queries]
        see = np.zeros((len(queries), len(keys)), dtype=bool)
        for i, (segment, place) in enumerate(queries):
            for j, (other, there) in enumerate(keys):
                link = int(pattern.links[segment][other])
                window = window_of[segment]
                if link == 2 and window is not None and place is not None and there is not None:
                    lengths = pattern.queries[segment].grid
                    other_lengths = pattern.keys[other].grid
                    parameters = zip(
                        lengths,
                        window.window,
                        window.stride,
                        window.dilation,
                        window.causal,
                        strict=True,
                    )
                    see[i, j] = all(
                        length != other_length or _axis_matrix(length, *rest)[at, at_key]
                        for (length, *rest), other_length, at, at_key in zip(
                            parameters, other_lengths, place, there, strict=True
                        )
                    )
                else:
                    see[i, j] = link != 0
        rows += [see] * group.heads
    return torch.from_numpy(np.stack(rows))


def is_complete(pattern: Any) -> bool:
    """Whether each query finds at hand every key that it would see were the key grids whole."""
    import copy

    whole = copy.copy(pattern)
    keys = []
    for segment in pattern.keys:
        segment = copy.copy(segment)
        if hasattr(segment, "grid"):
            object.__setattr__(segment, "start", (0,) * len(segment.grid))
            object.__setattr__(segment, "stop", segment.grid)
        keys.append(segment)
    object.__setattr__(whole, "keys", tuple(keys))
    return bool((visible(whole).sum(-1) == visible(pattern).sum(-1)).all())


def global_keys(pattern: Any) -> list[int]:
    """The key tokens off any grid: the columns of a key mask."""
    return [j for j, (_, place) in enumerate(tokens(pattern.keys)) if place is None]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Any,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in float64 over a pattern, differentiable; a row without keys gives 0 and -inf.

    Args:
        query: [B, H, queries, D], any floating dtype.
        key: [B, Hkv, keys, D], Hkv dividing H.
        value: like key.
        pattern: which key each query sees.
        key_mask: bool [B, global keys], False for hidden ones.
        scale: softmax scale, by default 1 / sqrt(D).
        seen: what `visible` says of the pattern, if that is known.

    Returns:
        output [B, H, queries, D] and natural logsumexp [B, H, queries], both float64.
    """
    batch, heads, _, head_dim = query.shape
    query, key, value = (x.double() for x in (query, key, value))
    group = heads // key.shape[1]
    key, value = (repeat(x, "b h n d -> b (h group) n d", group=group) for x in (key, value))
    seen = visible(pattern) if seen is None else seen
    seen = repeat(seen, "h i j -> b h i j", b=batch).clone()
    if key_mask is not None:
        seen[..., global_keys(pattern)] &= key_mask[:, None, None]
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    alive = seen.any(-1, keepdim=True)
    weights = torch.exp(scores - lse[..., None].masked_fill(~alive, 0)) * alive
    return torch.einsum("bhij,bhjd->bhid", weights, value), lse
