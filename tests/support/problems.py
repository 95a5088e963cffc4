"""Problems of providers, and what is asked of their results."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gna_compile.geometry import AttentionPattern, Axis, Neighborhood
from gna_compile.providers import Inputs, Problem


@st.composite
def axes(draw: st.DrawFn, longest: int = 24) -> Axis:
    length = draw(st.integers(1, longest))
    dilation = draw(st.integers(1, min(length, 4)))
    window = draw(st.integers(1, length // dilation))
    return Axis(length, window, draw(st.integers(1, window)), dilation, draw(st.booleans()))


def problem(neighborhood: Neighborhood, **changes: Any) -> Problem:
    tokens = neighborhood.tokens
    strides = (tokens * 16, tokens * 8, 8, 1)
    facts: dict[str, Any] = {
        "device": "cpu",
        "dtype": torch.float32,
        "batch": 1,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 8,
        "pattern": AttentionPattern.of_neighborhood(neighborhood, 2),
        "has_key_mask": False,
        "query_strides": strides,
        "key_strides": strides,
        "value_strides": strides,
    }
    return Problem(**(facts | changes))


def problem_of(pattern: AttentionPattern, kv_heads: int = 1, device: str = "cpu") -> Problem:
    """A problem of any pattern."""
    return Problem(
        device=device,
        dtype=torch.float32,
        batch=2,
        heads=pattern.heads,
        kv_heads=kv_heads,
        head_dim=8,
        pattern=pattern,
        has_key_mask=True,
        query_strides=(),
        key_strides=(),
        value_strides=(),
    )


def ones_for(asked: Problem) -> Inputs:
    """Query, key, value and key mask for a problem, all ones."""
    pattern, batch, size = asked.pattern, asked.batch, asked.head_dim

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=asked.dtype, device=asked.device)

    return Inputs(
        ones(batch, asked.heads, pattern.query_tokens, size),
        ones(batch, asked.kv_heads, pattern.key_tokens, size),
        ones(batch, asked.kv_heads, pattern.key_tokens, size),
        ones(batch, pattern.global_keys).bool(),
        0.5,
    )


class Watch(TorchDispatchMode):
    """Remembers the largest tensor that any operator made, in elements of memory."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and 0 not in tensor.shape:
                extent = sum(
                    (size - 1) * stride
                    for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
                )
                self.largest = max(self.largest, extent + 1)
        return result


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value (at least 1); inf where NaN or unequal."""
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach()
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    worst = float(difference.nan_to_num(torch.inf, torch.inf).max())
    return worst / max(float(expected.abs().nan_to_num(0, 0, 0).max()), 1.0)
