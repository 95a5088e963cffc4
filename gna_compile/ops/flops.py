"""FLOPs of the op for `torch.utils.flop_counter`: the visible pairs, counted exactly.

They follow PyTorch's own formulas for attention: two matrix products forward, five backward, two
FLOPs a multiply-add, and nothing for the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from gna_compile import _torch
from gna_compile.geometry import decode
from gna_compile.ops.schema import BackwardCall, ForwardCall


def attention_flops(
    query_shape: Sequence[Any], key_shape: Sequence[Any], pattern: Sequence[Any]
) -> int:
    """Forward FLOPs; a key mask is not looked at, as it is data."""
    batch, heads, queries, head_dim = map(_number, query_shape)
    ints = [_number(entry) for entry in pattern]
    # A size that is not known is counted as dense, which bounds it.
    pairs = heads * queries * _number(key_shape[2])
    if all(isinstance(entry, int) for entry in ints):
        pairs = decode(ints).pairs
    return 4 * batch * pairs * head_dim


def _flops(call: ForwardCall | BackwardCall) -> int:
    """Of a call that has shapes in place of its tensors."""
    query_shape: Any = call.inputs.query
    key_shape: Any = call.inputs.key
    return attention_flops(query_shape, key_shape, call.pattern)


def _number(size: Any) -> Any:
    """The hint of a symbol, without a guard, or the symbol itself if it has none."""
    if isinstance(size, torch.SymInt):
        hint = _torch.hint(size)
        return size if hint is None else hint
    return size


def register() -> None:
    """Registers the formulas of both ops, which are given shapes in place of tensors."""

    @register_flop_formula(torch.ops.gna.attention)
    def forward(*args: Any, **_: Any) -> int:
        return _flops(ForwardCall.of(*args))

    @register_flop_formula(torch.ops.gna.attention_backward)
    def backward(*args: Any, **_: Any) -> int:
        return _flops(BackwardCall.of(*args)) * 5 // 2
