"""Why the op does not take the operands of an attention, whatever the policy says."""

from __future__ import annotations

import math

import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.functorch import plain
from gna_compile.graph.symbols import holds, is_known, is_unbacked, same_shape
from gna_compile.reasons import Decline, Reason

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_HEAD_SIZE, _LARGEST_HEAD_SIZE = 8, 256


def unfit(
    out: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    form: str,
    key_transposed: bool,
    grouped: bool,
) -> Decline | None:
    """Why the op does not take operands of these kinds, sizes and dtypes, or None."""
    query, value = operands[0], operands[2]
    for tensor in (out, *operands):
        try:
            inside = plain(tensor)
        except _torch.Missing as missing:
            return Decline(Reason.TORCH, str(missing))
        if inside is None or inside.layout != torch.strided:
            return Decline(Reason.SHAPE, "not plain tensors (a tensor subclass)")
        if is_unbacked(tensor):
            return Decline(Reason.UNBACKED, f"a size of {_sizes(tensor)} depends on data")
    shapes = ", ".join(_sizes(tensor) for tensor in operands)
    rank = query.dim()
    if rank < 3 or any(tensor.dim() != rank for tensor in (out, *operands)):
        return Decline(
            Reason.SHAPE, f"operands of {shapes} do not have three or more dimensions each"
        )
    key_shape = list(operands[1].shape)
    if key_transposed:
        key_shape[-2:] = key_shape[:-3:-1]
    leading = max(rank - 3, 1)
    if any(not same_shape(o[:leading], query.shape[:leading]) for o in (key_shape, value.shape)):
        return Decline(Reason.SHAPE, f"the batch size differs between operands of {shapes}")
    if rank >= 4:
        heads, kv_heads = query.shape[-3], key_shape[-3]
        if not is_known(value.shape[-3] == kv_heads):
            return Decline(Reason.SHAPE, f"keys and values have different heads in {shapes}")
        if not is_known(heads == kv_heads) and not (
            grouped and holds(kv_heads > 0) and holds(heads % kv_heads == 0)
        ):
            return Decline(
                Reason.SHAPE, f"the heads of keys do not serve those of queries in {shapes}"
            )
    head_dim = query.shape[-1]
    if not is_known(key_shape[-1] == head_dim) or not is_known(value.shape[-1] == head_dim):
        return Decline(Reason.HEAD_SIZE, f"head_dim differs between operands of {shapes}")
    if not holds(head_dim >= _LEAST_HEAD_SIZE) or not holds(head_dim <= _LARGEST_HEAD_SIZE):
        return Decline(
            Reason.HEAD_SIZE,
            f"head_dim {head_dim} is not between {_LEAST_HEAD_SIZE} and {_LARGEST_HEAD_SIZE}",
        )
    if not same_shape(out.shape, query.shape):
        return Decline(
            Reason.SHAPE, f"the output {_sizes(out)} is not shaped as the query of {shapes}"
        )
    if any(is_known(size == 0) for tensor in operands for size in tensor.shape):
        return Decline(Reason.SHAPE, f"operands of {shapes} are empty")
    if any(tensor.device != out.device for tensor in operands):
        return Decline(Reason.SHAPE, "operands and output are on different devices")
    return _unfit_dtype(out, operands, form)


def _unfit_dtype(
    out: torch.Tensor, operands: tuple[torch.Tensor, ...], form: str
) -> Decline | None:
    dtypes = {tensor.dtype for tensor in operands}
    names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in operands)
    if out.dtype not in _DTYPES or any(not dtype.is_floating_point for dtype in dtypes):
        return Decline(Reason.DTYPE, f"operands of {names}, output {out.dtype}")
    if torch.float64 in dtypes:
        return Decline(Reason.DTYPE, f"operands of {names}")
    # A fused node takes one dtype only, or any under autocast, which gives its output a half type.
    if form == "sdpa" and dtypes != {out.dtype} and out.dtype == torch.float32:
        return Decline(Reason.DTYPE, f"operands of {names} for an output of {out.dtype}")
    return None


def unfit_mask(mask: fx.Node | None, query: torch.Tensor) -> Decline | None:
    """Refuses masks that broadcast over more batch dimensions than the op has."""
    if mask is None or query.dim() <= 4:
        return None
    return Decline(
        Reason.MASK, f"queries of {_sizes(query)} have a mask, for which one batch is needed"
    )


def unfit_scale(scale: float | None) -> Decline | None:
    if scale is None or (math.isfinite(scale) and scale > 0):
        return None
    return Decline(Reason.SHAPE, f"the scale {scale:g} is not positive and finite")


def _sizes(tensor: torch.Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape)
