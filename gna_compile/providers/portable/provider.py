"""The provider that runs everywhere: boxes of queries against their union box, in PyTorch's own words.

A pattern is taken as pieces (`pieces`), whose grids are cut axis by axis (`tiles`, `cuts`). It works
tile by tile (`walk`), so memory stays bounded: one tile's keys are copied out of their grids at a
time, and a mask is never larger than one tile. Two ways to attend within a tile:

- *fused*: PyTorch's CPU flash attention, forward and backward. It takes an additive mask, and
  0 x NaN and -inf + NaN then let hidden values through, so it serves only inputs whose logits are
  all finite, which is checked first.
- *exact*: matrix products and a softmax in fp32 (fp64 for fp64), which keep hidden values out
  whatever they are. There is no branch on data and no host synchronization in it, so it can be
  captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.providers.portable import exact
from gna_compile.providers.portable.cuts import predicted_speedup
from gna_compile.providers.portable.exact import accurate
from gna_compile.providers.portable.pieces import group_of
from gna_compile.providers.portable.tile_tensors import Scratch, Tile
from gna_compile.providers.portable.walk import Step, parts
from gna_compile.providers.problem import (
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Portable:
    """PyTorch's own operators on any device; see the module's docstring."""

    name = "portable"
    fast_on = frozenset({"cpu"})

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype not in _DTYPES:
            return f"takes fp32, fp16, bf16 and fp64, not {problem.dtype}"
        if group_of(problem.pattern) is None:
            return "takes heads that all see the same, one head group at a time"
        return None

    def forecast(self, problem: Problem) -> Forecast:
        if problem.device != "cpu":
            return Forecast()
        group = problem.heads // problem.kv_heads
        return Forecast(predicted_speedup(problem.pattern, group))

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        query, key, value, _, scale = inputs
        fused = _bounded(query, key, scale) and _bounded(value)
        scratch = Scratch()
        for part in parts(problem):
            step = Step(problem, part, inputs, scratch)
            outputs, lses = map(step.of_query, results)
            for tile in step.tiles():
                out, lse = _attend(tile, scale, fused)
                tile.write_rows(outputs, out)
                tile.write_rows(lses, lse)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        forward: Forward,
        given: OutputGradients,
        gradients: Gradients,
    ) -> None:
        query, key, value, _, scale = inputs
        # The fused backward has no place for the logsumexp's gradient.
        fused = (
            given.logsumexp is None
            and _bounded(query, key, scale)
            and _bounded(given.output, value)
        )
        scratch = Scratch()
        for part in parts(problem):
            step = Step(problem, part, inputs, scratch)
            sums = [_Accumulator(step.of_key(grad)) for grad in (gradients.key, gradients.value)]
            results = Forward(*map(step.of_query, forward))
            grad_output, grad_query = map(step.of_query, (given.output, gradients.query))
            grad_lse = None if given.logsumexp is None else step.of_query(given.logsumexp)
            for tile in step.tiles():
                rows = Forward(
                    tile.read_rows(results.output, "out"), tile.read_rows(results.logsumexp, "lse")
                )
                given_rows = OutputGradients(
                    tile.read_rows(grad_output, "grad_out"),
                    None if grad_lse is None else tile.read_rows(grad_lse, "grad_lse"),
                )
                grads = _attend_backward(tile, rows, given_rows, scale, fused)
                tile.write_rows(grad_query, grads.query)
                for total, grad in zip(sums, grads[1:], strict=True):
                    tile.add_keys(total.tensor, grad)
            for total in sums:
                total.finish()


def _bounded(left: Tensor, right: Tensor | None = None, scale: float = 1.0) -> bool:
    """Whether the fused way may be taken: on the CPU, if all inner products of rows are finite."""
    if left.device.type != "cpu" or _torch.why_not("CPU flash attention"):
        return False
    if not left.numel() or (right is not None and not right.numel()):
        return False
    bound = _largest(left)
    if right is not None:
        bound *= _largest(right) * left.shape[-1] * max(abs(scale), 1.0)
    return bound < torch.finfo(accurate(left.dtype)).max / 4


def _largest(tensor: Tensor) -> float:
    # Two reductions and no |tensor|, which would be a copy; both are NaN if any element is.
    return max(abs(float(tensor.amax())), abs(float(tensor.amin())))


def _attend(tile: Tile, scale: float, fused: bool) -> Forward:
    """Output [batch, kv_heads, rows, D] and logsumexp [batch, kv_heads, rows] of a tile."""
    if not fused or not tile.key.shape[2]:
        return exact.attend(tile, scale)
    out, lse = _torch.cpu_flash_attention(
        _unit_stride(tile.query),
        _unit_stride(tile.key),
        _unit_stride(tile.value),
        attn_mask=_bias(tile),
        scale=scale,
    )
    if tile.may_be_blind and tile.hidden is not None:
        blind = tile.hidden.all(dim=-1)
        out.masked_fill_(blind.unsqueeze(-1), 0)
        lse = lse.masked_fill(blind, -math.inf)
    return Forward(out, lse)


def _attend_backward(
    tile: Tile, forward: Forward, given: OutputGradients, scale: float, fused: bool
) -> Gradients:
    """Gradients of a tile's queries, keys and values, shaped like them.

    Args:
        tile: the tile.
        forward: its rows of the forward's results.
        given: its rows of their gradients.
        scale: of the logits.
        fused: whether PyTorch's kernel may serve.
    """
    if not fused or not tile.key.shape[2]:
        return exact.attend_backward(tile, forward, given, scale)
    lse = forward.logsumexp
    if tile.may_be_blind:
        # The kernel's own for a row that sees nothing; -inf would make a NaN of -inf - -inf.
        lse = lse.masked_fill(lse == -math.inf, 0)
    grads = _torch.cpu_flash_attention_backward(
        _unit_stride(given.output),
        _unit_stride(tile.query),
        _unit_stride(tile.key),
        _unit_stride(tile.value),
        _unit_stride(forward.output),
        lse.contiguous(),
        0.0,
        False,
        attn_mask=_bias(tile),
        scale=scale,
    )
    return Gradients(*grads[:3])


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bias(tile: Tile) -> Tensor | None:
    if tile.hidden is None:
        return None
    dtype = accurate(tile.query.dtype)
    like = tile.hidden.new_empty(0, dtype=dtype)
    bias = tile.scratch.take("bias", tile.hidden.shape, like)
    return bias.zero_().masked_fill_(tile.hidden, -math.inf)


class _Accumulator:
    """Sums a gradient in fp32 (fp64 for fp64), in place where the gradient is that already."""

    def __init__(self, grad: Tensor) -> None:
        self._grad = grad
        dtype = accurate(grad.dtype)
        if grad.dtype == dtype:
            self.tensor = grad.zero_()
        else:
            self.tensor = torch.zeros(grad.shape, dtype=dtype, device=grad.device)

    def finish(self) -> None:
        if self.tensor is not self._grad:
            self._grad.copy_(self.tensor)
