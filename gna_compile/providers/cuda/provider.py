"""The provider of a native CUDA kernel; see csrc/cuda/api.h.

Forward only: gradients are FlexAttention's, or the portable provider's where it cannot run.
"""

from __future__ import annotations

from ctypes import byref
from functools import lru_cache

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.planner import (
    Architecture,
    PlanError,
    Workload,
    better_stride,
    plan,
    speedups,
)
from gna_compile.providers.cuda import first_use
from gna_compile.providers.cuda.launches import (
    NO_LAUNCHES,
    Launch,
    key_masks,
    launches_of,
)
from gna_compile.providers.cuda.library import (
    BF16,
    FP16,
    GridAxis,
    NativeProblem,
    TensorView,
    library,
    unusable,
)
from gna_compile.providers.flex.provider import Flex
from gna_compile.providers.portable.provider import Portable
from gna_compile.providers.problem import (
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
    Provider,
)

_TYPES = {torch.bfloat16: BF16, torch.float16: FP16}
_HEAD_DIMS = range(8, 129, 8)
_KERNEL_HEAD_DIMS = (64, 128)  # other values cost as much as the next of the two
_ALIGNMENT = 16  # bytes

# With a scale of 0 a hidden score, minus infinity, would become NaN.
_SMALLEST_SCALE = 1e-30


class NativeCuda:
    """The native kernel of a GPU generation; bf16 and fp16, accumulated in fp32."""

    fast_on = frozenset({"cuda"})

    def __init__(self, architecture: Architecture) -> None:
        self.name = architecture.name
        self._architecture = architecture

    def supports(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"runs on cuda, not {problem.device}"
        loaded = library(self.name)
        if loaded is None:
            return unusable(self.name)
        capability = current_capability()
        if capability == (0, 0):
            return "there is no CUDA device"
        capabilities = self._architecture.capabilities
        if capability not in capabilities:
            needed = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
            return f"needs compute capability {needed}, not {capability[0]}.{capability[1]}"
        return self.declines(problem) or first_use.failure(
            self.name, loaded.path, torch.cuda.current_device()
        )

    def declines(self, problem: Problem) -> str | None:
        """Why no device could run `problem` with this kernel, or None if one could."""
        if problem.dtype not in _TYPES:
            return f"takes bf16 and fp16, not {problem.dtype}"
        if problem.head_dim not in _HEAD_DIMS:
            return f"head_dim {problem.head_dim} is not a multiple of 8 up to {_HEAD_DIMS[-1]}"
        launches = _launches(problem, self.name)
        if isinstance(launches, str):
            return launches
        tensors = (
            ("query", problem.heads, problem.query_strides),
            ("key", problem.kv_heads, problem.key_strides),
            ("value", problem.kv_heads, problem.value_strides),
        )
        for name, heads, strides in tensors:
            reason = _unreadable(self.name, problem, heads, strides)
            if reason:
                return f"{name}: {reason}"
        return None

    def forecast(self, problem: Problem) -> Forecast:
        return forecast(problem, self.name)

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        query, key, value, key_mask, scale = inputs
        if scale < 0:
            query, scale = -query, -scale
        loaded = library(self.name)
        assert loaded is not None
        launches = _launches(problem, self.name)
        assert not isinstance(launches, str)
        # Copies and masks, if any, must outlive the launches: until then their memory could be handed
        # out again.
        query, key, value = _aligned(query), _aligned(key), _aligned(value)
        output = written = results.output
        strides = output.stride()
        is_writable = strides == query.stride() or _is_writable(self.name, problem, strides)
        if output.data_ptr() % _ALIGNMENT or not is_writable:
            written = torch.empty_like(query)
        masks = key_masks(problem.pattern, [launch for launch, _ in launches], key_mask)
        tensors = (
            _view(query),
            _view(key),
            _view(value),
            _view(written),
            results.logsumexp.data_ptr(),
        )
        device = query.device.index
        for (_, constants), mask in zip(launches, masks, strict=True):
            native = NativeProblem.from_buffer_copy(constants)
            native.scale = max(scale, _SMALLEST_SCALE)
            if mask is not None:
                native.key_mask = mask.data_ptr()
                native.key_mask_batch_stride, native.key_mask_token_stride = mask.stride()
            if device == torch.cuda.current_device():
                code = loaded.forward(native, *tensors, _stream(device))
            else:
                with torch.cuda.device(device):
                    code = loaded.forward(native, *tensors, _stream(device))
            if code != 0:
                raise RuntimeError(f"{self.name}: {loaded.message().decode()}; {problem}")
        if written is not output:
            output.copy_(written)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        forward: Forward,
        given: OutputGradients,
        gradients: Gradients,
    ) -> None:
        backwards: Provider = Flex()
        if backwards.supports(problem) is not None:
            backwards = Portable()
        backwards.backward(problem, inputs, forward, given, gradients)


def forecast(problem: Problem, architecture: str) -> Forecast:
    """What the planner says of `problem` on an architecture of its cost table."""
    workloads = workloads_of(problem)
    plans = [plan(workload, architecture) for workload in workloads]
    dense = speedups(plans[0]).dense_milliseconds
    hint = ""
    if len(workloads) == 1:
        stride = better_stride(workloads[0], architecture)
        if stride is not None:
            hint = f"hint: with stride {'x'.join(map(str, stride))} no key tile would need a mask"
    return Forecast(dense / sum(cut.milliseconds for cut in plans), hint)


def workloads_of(problem: Problem) -> list[Workload]:
    """What the planner needs of a problem that the kernel takes: each launch."""
    launches = launches_of(problem.pattern)
    assert launches is not None
    return [_workload(problem, launch) for launch in launches]


def _workload(problem: Problem, launch: Launch) -> Workload:
    return Workload(
        launch.neighborhood.merged,
        heads=problem.batch * problem.heads,
        # The kernels also compute the columns up to the next head_dim that they have.
        head_dim=next(
            (size for size in _KERNEL_HEAD_DIMS if size >= problem.head_dim), problem.head_dim
        ),
        element_bytes=problem.dtype.itemsize,
        key_mask=problem.has_key_mask,
        global_queries=launch.global_queries,
    )


def current_capability() -> tuple[int, int]:
    """Compute capability of PyTorch's current device; (0, 0) without one."""
    if not torch.cuda.is_available():
        return (0, 0)
    return _capability(torch.cuda.current_device())


@lru_cache(maxsize=64)
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _unreadable(name: str, problem: Problem, heads: int, strides: tuple[int, ...]) -> str | None:
    if strides[3] != 1 and problem.head_dim != 1:
        return "the last dimension is not contiguous"
    loaded = library(name)
    if loaded is None:
        return None
    view = TensorView(None, *strides[:3])
    reason = loaded.declines(problem.batch, heads, problem.pattern.key_tokens, byref(view))
    return reason.decode() if reason else None


@lru_cache(maxsize=1024)
def _is_writable(name: str, problem: Problem, strides: tuple[int, ...]) -> bool:
    return _unreadable(name, problem, problem.heads, strides) is None


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its address is not what TMA needs."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _view(tensor: Tensor) -> TensorView:
    return TensorView(tensor.data_ptr(), *tensor.stride()[:3])


def _stream(device: int) -> int:
    """The current stream's address; as compiled code asks for it, ten times faster than the object."""
    stream: int = _torch.raw_stream(device)
    return stream


@lru_cache(maxsize=1024)
def _launches(
    problem: Problem, architecture: str
) -> tuple[tuple[Launch, NativeProblem], ...] | str:
    """Each launch with all of it that does not change from call to call; or why there are none."""
    launches = launches_of(problem.pattern)
    if launches is None:
        return NO_LAUNCHES
    # Attention without any window may be a launch whose grid is all tokens, which no mask hides.
    masked = problem.pattern.global_keys if problem.has_key_mask else 0
    if launches[0].neighborhood.global_tokens < masked:
        return NO_LAUNCHES
    try:
        return tuple(
            (launch, _native_problem(problem, launch, architecture)) for launch in launches
        )
    except PlanError as error:
        return str(error)


def _native_problem(problem: Problem, launch: Launch, architecture: str) -> NativeProblem:
    cut = plan(_workload(problem, launch), architecture)
    axes = [
        GridAxis(
            axis.length,
            axis.window,
            axis.stride,
            axis.dilation,
            axis.causal,
            query.bit_length() - 1,
            key.bit_length() - 1,
        )
        for axis, query, key in zip(
            cut.workload.neighborhood.axes, cut.query_box, cut.key_box, strict=True
        )
    ]
    return NativeProblem(
        _TYPES[problem.dtype],
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        len(axes),
        (GridAxis * 3)(*axes),
        launch.neighborhood.prefix,
        launch.neighborhood.suffix,
        launch.global_queries.start,
        launch.global_queries.stop,
    )
