"""The provider that runs the Hopper kernel of csrc/sm90; see its header gna_sm90.h.

Forward only: gradients are the portable provider's.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from functools import lru_cache

import torch
from torch import Tensor

from gna_compile.providers import sm90_boxes
from gna_compile.providers.portable import Portable
from gna_compile.providers.problem import Problem
from gna_compile.providers.sm90_library import (
    BF16,
    FP16,
    GridAxis,
    NativeProblem,
    TensorView,
    library,
)

_TYPES = {torch.bfloat16: BF16, torch.float16: FP16}
_HEAD_DIMS = (64, 128)
_ALIGNMENT = 16  # bytes

# With a scale of 0 a hidden score, minus infinity, would become NaN.
_SMALLEST_SCALE = 1e-30


class Sm90:
    """The native kernel for compute capability 9.0; bf16 and fp16, accumulated in fp32."""

    name = "sm90"
    fast_on = frozenset({"cuda"})

    def __init__(self) -> None:
        self._backward = Portable()

    def supports(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"runs on cuda, not {problem.device}"
        if library() is None:
            return "the CUDA kernels were not built"
        capability = _current_capability()
        if capability != (9, 0):
            return f"needs compute capability 9.0, not {capability[0]}.{capability[1]}"
        return self.declines(problem)

    def declines(self, problem: Problem) -> str | None:
        """Why no device could run `problem` with this kernel, or None if one could."""
        if problem.dtype not in _TYPES:
            return f"takes bf16 and fp16, not {problem.dtype}"
        if problem.head_dim not in _HEAD_DIMS:
            return f"head size {problem.head_dim} is neither 64 nor 128"
        if _plan(problem.neighborhood) is None:
            return f"cannot read boxes of tokens with a dilation of {_dilation(problem)}"
        tensors = (
            ("query", problem.heads, problem.query_strides),
            ("key", problem.kv_heads, problem.key_strides),
            ("value", problem.kv_heads, problem.value_strides),
        )
        for name, heads, strides in tensors:
            reason = _unreadable(problem, heads, strides)
            if reason:
                return f"{name}: {reason}"
        return None

    def forward(
        self,
        problem: Problem,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scale: float,
        output: Tensor,
        logsumexp: Tensor,
    ) -> None:
        if scale < 0:
            query, scale = -query, -scale
        native = _native_problem(problem, key_mask, max(scale, _SMALLEST_SCALE))
        written = output if _is_writable(problem, output) else torch.empty_like(query)
        # Copies, if any, must outlive the launch: until then their memory could be handed out again.
        inputs = [_aligned(tensor) for tensor in (query, key, value)]
        device = query.device.index
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            loaded = library()
            assert loaded is not None
            code = loaded.gna_sm90_forward(
                byref(native),
                *(byref(_view(tensor)) for tensor in inputs),
                byref(_view(written)),
                logsumexp.data_ptr(),
                stream,
            )
        if code != 0:
            raise RuntimeError(f"sm90: {loaded.gna_sm90_message().decode()}; {problem}")
        if written is not output:
            output.copy_(written)

    def backward(
        self,
        problem: Problem,
        grad_output: Tensor,
        grad_logsumexp: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        key_mask: Tensor | None,
        scale: float,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
    ) -> None:
        self._backward.backward(
            problem,
            grad_output,
            grad_logsumexp,
            query,
            key,
            value,
            output,
            logsumexp,
            key_mask,
            scale,
            grad_query,
            grad_key,
            grad_value,
        )


def _current_capability() -> tuple[int, int]:
    """Compute capability of PyTorch's current device; (0, 0) without one."""
    if not torch.cuda.is_available():
        return (0, 0)
    return _capability(torch.cuda.current_device())


@lru_cache(maxsize=64)
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=256)
def _plan(neighborhood):  # type: ignore[no-untyped-def]
    """Axes as the kernel takes them, or None if it cannot read their boxes."""
    joined = sm90_boxes.merged(neighborhood)
    boxes = sm90_boxes.choose_boxes(joined)
    if boxes is None:
        return None
    axes = [
        GridAxis(axis.length, axis.window, axis.stride, axis.dilation, axis.causal, query, key)
        for axis, query, key in zip(joined.axes, boxes.queries, boxes.keys, strict=True)
    ]
    return (GridAxis * 3)(*axes), len(axes)


def _dilation(problem: Problem) -> tuple[int, ...]:
    return tuple(axis.dilation for axis in problem.neighborhood.axes)


def _unreadable(problem: Problem, heads: int, strides: tuple[int, ...]) -> str | None:
    if strides[3] != 1 and problem.head_dim != 1:
        return "the last dimension is not contiguous"
    loaded = library()
    if loaded is None:
        return None
    view = TensorView(None, *strides[:3])
    reason = loaded.gna_sm90_declines(
        problem.batch, heads, problem.neighborhood.tokens, byref(view)
    )
    return reason.decode() if reason else None


def _is_writable(problem: Problem, output: Tensor) -> bool:
    return (
        output.data_ptr() % _ALIGNMENT == 0
        and _unreadable(problem, problem.heads, output.stride()) is None
    )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its address is not what the copy engine needs."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _view(tensor: Tensor) -> TensorView:
    return TensorView(tensor.data_ptr(), *tensor.stride()[:3])


def _native_problem(problem: Problem, key_mask: Tensor | None, scale: float) -> NativeProblem:
    planned = _plan(problem.neighborhood)
    assert planned is not None
    axes, count = planned
    native = NativeProblem(
        _TYPES[problem.dtype],
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        count,
        axes,
        problem.neighborhood.prefix,
        problem.neighborhood.suffix,
    )
    native.scale = scale
    if key_mask is not None and key_mask.numel():
        native.key_mask = ctypes.c_void_p(key_mask.data_ptr())
        native.key_mask_batch_stride, native.key_mask_token_stride = key_mask.stride()
    return native
