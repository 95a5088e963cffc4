"""Forward-mode derivative of the attention: the portable provider's tiles, in its exact way.

With P the weights of a row, S its scores and a dot for the tangent of a thing, the tangents of
logsumexp and output are

    dot L = sum_j P_j dot S_j        dot O = sum_j P_j dot V_j + sum_j P_j (dot S_j - dot L) V_j.

Runs on any device and costs about three times the forward's pairs; memory stays bounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gna_compile.providers.portable.exact import accurate, product
from gna_compile.providers.portable.tile_tensors import Scratch, Tile
from gna_compile.providers.portable.walk import Step, parts
from gna_compile.providers.problem import Forward, Inputs, Problem


def write_tangents(
    problem: Problem, inputs: Inputs, moving: Inputs, logsumexp: Tensor, tangents: Forward
) -> None:
    """Writes the tangents of output and logsumexp.

    Args:
        problem: as for a provider; batch, heads and tokens are at least 1.
        inputs: as for a provider.
        moving: the same with the tangents of query, key and value in their places.
        logsumexp: the forward's.
        tangents: like the forward's results; every element is written.
    """
    scratch, moving_scratch = Scratch(), Scratch()
    for part in parts(problem):
        step = Step(problem, part, inputs, scratch)
        moving_step = Step(problem, part, moving, moving_scratch)
        lses, moving_outs, moving_lses = map(step.of_query, (logsumexp, *tangents))
        for tile, tangent in zip(step.tiles(), moving_step.tiles(), strict=True):
            lse = tile.read_rows(lses, "lse")
            rows = _tile_tangents(tile, tangent, lse, inputs.scale)
            tile.write_rows(moving_outs, rows.output)
            tile.write_rows(moving_lses, rows.logsumexp)


def _tile_tangents(tile: Tile, tangent: Tile, lse: Tensor, scale: float) -> Forward:
    """Tangents of a tile's output [batch, kv_heads, rows, D] and logsumexp [batch, kv_heads, rows]."""
    dtype = accurate(tile.query.dtype)
    query, key, value = (x.to(dtype) for x in (tile.query, tile.key, tile.value))
    moving_query, moving_key, moving_value = (
        x.to(dtype) for x in (tangent.query, tangent.key, tangent.value)
    )
    shift = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)
    outs, lses = [], []
    for rows, hidden in tile.row_chunks():
        weights = torch.matmul(query[:, :, rows], key.mT).mul_(scale).sub_(shift[:, :, rows]).exp_()
        moving_scores = torch.matmul(moving_query[:, :, rows], key.mT)
        moving_scores += torch.matmul(query[:, :, rows], moving_key.mT)
        moving_scores *= scale
        if hidden is not None:
            weights.masked_fill_(hidden, 0)
            moving_scores.masked_fill_(hidden, 0)
        moving_lse = (weights * moving_scores).sum(dim=-1, keepdim=True)
        out = product(weights, moving_value, hidden, positive=True)
        moving_weights = moving_scores.sub_(moving_lse).mul_(weights)
        if hidden is not None:
            # Where the row's tangent is not finite, a hidden weight of 0 times it is NaN.
            moving_weights.masked_fill_(hidden, 0)
        outs.append(out + product(moving_weights, value, hidden, positive=False))
        lses.append(moving_lse.squeeze(-1))
    return Forward(torch.cat(outs, dim=2), torch.cat(lses, dim=2))
