"""FLOPs of the op for `torch.utils.flop_counter`: the visible pairs, counted exactly.

They follow PyTorch's own formulas for attention: two matrix products forward, five backward, two
FLOPs a multiply-add, and nothing for the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from gna_compile.geometry import Neighborhood


def attention_flops(
    query_shape: Sequence[Any],
    grid: Sequence[Any],
    window: Sequence[Any],
    stride: Sequence[Any],
    dilation: Sequence[Any],
    causal: Sequence[bool],
    prefix: Any,
    suffix: Any,
) -> int:
    """Forward FLOPs; a key mask is not looked at, as it is data."""
    batch, heads, tokens, head_dim = map(_number, query_shape)
    columns = [[_number(size) for size in sizes] for sizes in (grid, window, stride, dilation)]
    # A size that is not known is counted as dense, which bounds it.
    pairs = tokens * tokens
    if all(isinstance(size, int) for column in columns for size in column):
        lengths, windows, strides, dilations = columns
        geometry = (lengths, windows, strides, dilations, causal)
        pairs = Neighborhood.of(*geometry, _number(prefix), _number(suffix)).pairs
    return 4 * batch * heads * pairs * head_dim


def _number(size: Any) -> Any:
    """The hint of a symbol, without a guard, or the symbol itself if it has none."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return size if hint is None else hint
    return size


def register() -> None:
    """Registers the formulas of both ops; they must be defined."""

    @register_flop_formula(torch.ops.gna.attention)
    def forward(  # type: ignore[no-untyped-def]
        query, key, value, grid, window, stride, dilation, causal, prefix, suffix, *_, **__
    ) -> int:
        return attention_flops(query, grid, window, stride, dilation, causal, prefix, suffix)

    @register_flop_formula(torch.ops.gna.attention_backward)
    def backward(  # type: ignore[no-untyped-def]
        grad_output,
        grad_logsumexp,
        query,
        key,
        value,
        output,
        logsumexp,
        grid,
        window,
        stride,
        dilation,
        causal,
        prefix,
        suffix,
        *_,
        **__,
    ) -> int:
        geometry = (grid, window, stride, dilation, causal, prefix, suffix)
        return attention_flops(query, *geometry) * 5 // 2
