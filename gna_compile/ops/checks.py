"""What the ops' tensors must be like; every message says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gna_compile.geometry import AttentionPattern, decode
from gna_compile.geometry.segments import text_of
from gna_compile.providers import Forward, Inputs, OutputGradients

_OPERANDS = ("query", "key", "value")


def _check_layout(name: str, tensor: Any) -> None:
    """Raises unless this is a tensor that finds its elements in memory by strides."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.is_nested:
        raise ValueError(
            f"{name} is a nested tensor; it must have one size for each dimension: call once for "
            "each of its tensors"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} has the layout {tensor.layout}; it must be torch.strided: use "
            f"{name}.to_dense()"
        )


def check_layouts(inputs: Inputs) -> None:
    """What must hold of all tensors before anything is read off them."""
    for name, tensor in zip(_OPERANDS, inputs[:3], strict=True):
        _check_layout(name, tensor)
    if inputs.key_mask is not None:
        _check_layout("key_mask", inputs.key_mask)


def check_rank(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 4:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be [batch, heads, tokens, head_dim]"
        )


def check_head_dim(query: Tensor) -> None:
    head_dim = query.shape[3]
    if isinstance(head_dim, int) and head_dim == 0:
        raise ValueError("head_dim is 0; it must be at least 1")


def check_tensors(inputs: Inputs, pattern: Sequence[int]) -> None:
    """Raises ValueError; compares plain ints only, so that no symbol gets a guard."""
    check_layouts(inputs)
    query, key, value, key_mask, _ = inputs
    for name, tensor in zip(_OPERANDS, (query, key, value), strict=True):
        check_rank(name, tensor)
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on "
                f"{query.device}; dtype and device must be the same: convert one of them"
            )
    if not query.dtype.is_floating_point:
        raise ValueError(f"query is {query.dtype}; it must be a floating-point type")
    if key_mask is not None:
        _check_key_mask(key_mask, query)
    sizes = (*pattern, query.shape[1], query.shape[2], key.shape[2])
    if all(isinstance(size, int) for size in sizes):
        pattern_of(inputs, pattern)
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    wanted = (batch, kv_heads, key.shape[2], head_dim)
    for name, tensor in (("key", key), ("value", value)):
        if any(map(_differ, tensor.shape, wanted)):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} for a query of {tuple(query.shape)}; it "
                f"must be {wanted}"
            )
    check_head_dim(query)
    known_heads = isinstance(heads, int) and isinstance(kv_heads, int)
    if known_heads and (heads % kv_heads if kv_heads else heads):
        raise ValueError(f"query has {heads} heads and key {kv_heads}; key's must divide query's")


def _check_key_mask(key_mask: Tensor, query: Tensor) -> None:
    batch = query.shape[0]
    if key_mask.dtype != torch.bool or key_mask.device != query.device:
        raise ValueError(
            f"key_mask is {key_mask.dtype} on {key_mask.device}; it must be torch.bool on "
            f"{query.device}, True where a global key is visible"
        )
    if key_mask.ndim != 2 or _differ(key_mask.shape[0], batch):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}; it must be [batch, global keys], of batch "
            f"{batch}"
        )


def check_results(query: Tensor, forward: Forward, given: OutputGradients) -> None:
    """Raises ValueError unless the backward's other inputs fit the query."""
    accurate = logsumexp_dtype(query)
    expected = [
        ("grad_output", given.output, query.shape, query.dtype),
        ("output", forward.output, query.shape, query.dtype),
        ("logsumexp", forward.logsumexp, query.shape[:3], accurate),
    ]
    if given.logsumexp is not None:
        expected.append(("grad_logsumexp", given.logsumexp, query.shape[:3], accurate))
    _check_like(expected, query.device)


def check_tangents(inputs: Inputs, moving: Inputs, logsumexp: Tensor) -> None:
    """Raises ValueError unless the tangents and logsumexp fit the operands."""
    query = inputs.query
    expected = [
        (f"tangent_{name}", tangent, operand.shape, operand.dtype)
        for name, tangent, operand in zip(_OPERANDS, moving[:3], inputs[:3], strict=True)
    ]
    expected.append(("logsumexp", logsumexp, query.shape[:3], logsumexp_dtype(query)))
    _check_like(expected, query.device)


def _check_like(
    expected: Sequence[tuple[str, Tensor, Sequence[Any], torch.dtype]], device: torch.device
) -> None:
    for name, tensor, shape, dtype in expected:
        _check_layout(name, tensor)
        fits = tensor.ndim == len(shape) and not any(map(_differ, tensor.shape, shape))
        if not fits or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be "
                f"{dtype} {tuple(shape)} on {device}"
            )


def _differ(size: Any, wanted: Any) -> bool:
    """Whether two sizes are known to differ."""
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def logsumexp_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


_decode = lru_cache(maxsize=1024)(decode)


def pattern_of(inputs: Inputs, ints: Sequence[int]) -> AttentionPattern:
    """The pattern of an encoding; raises ValueError if it is not of these tensors."""
    pattern = _decode(tuple(ints))
    query, key, _, key_mask, _ = inputs
    sequences = (
        ("query", query, pattern.query_tokens, pattern.queries),
        ("key", key, pattern.key_tokens, pattern.keys),
    )
    for name, tensor, tokens, segments in sequences:
        if tensor.shape[2] != tokens:
            raise ValueError(
                f"{name} has {tensor.shape[2]} tokens, but {text_of(segments)} makes {tokens}; pass "
                "the grid that the tokens lie on"
            )
    if pattern.heads != query.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, but the pattern's head groups have {pattern.heads}"
        )
    if key_mask is not None and _differ(key_mask.shape[1], pattern.global_keys):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)}; it must be [batch, global keys] = "
            f"[{query.shape[0]}, {pattern.global_keys}]: it covers the global tokens only"
        )
    return pattern
