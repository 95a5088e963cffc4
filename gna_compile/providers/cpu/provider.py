"""The provider that runs the C++ kernel of csrc/cpu; see its header gna_cpu.h.

It reads and writes the caller's tensors in place, whatever their strides, with as many threads as
PyTorch would use.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gna_compile.geometry import canonical
from gna_compile.providers.problem import (
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
)

try:
    from gna_compile import _native
except ImportError:  # installed without a C++ compiler
    _available = False
else:
    from gna_compile.providers.cpu import tiles
    from gna_compile.providers.cpu.native_pattern import native_pattern

    _available = True


def instruction_sets() -> list[str]:
    """The native kernel's instruction sets that this processor has, best first; [] if not built."""
    return _native.isas() if _available else []


_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_HEAD_DIM = 256


class Cpu:
    """The native CPU kernel; fp32, bf16 and fp16, computed in fp32 or products of bf16.

    Args:
        isa: the instruction set to use, one of `_native.isas()`; "" takes the best.
    """

    name = "cpu"
    fast_on = frozenset({"cpu"})

    def __init__(self, isa: str = "") -> None:
        self._isa = isa

    def supports(self, problem: Problem) -> str | None:
        if not _available:
            return "the native extension was not built"
        if problem.device != "cpu":
            return f"runs on cpu, not {problem.device}"
        if problem.dtype not in _TYPES:
            return f"takes fp32, bf16 and fp16, not {problem.dtype}"
        if problem.head_dim > _MAX_HEAD_DIM:
            return f"head_dim {problem.head_dim} is larger than {_MAX_HEAD_DIM}"
        if len(canonical(problem.pattern).head_groups) != 1:
            return "takes heads that all see the same, one head group at a time"
        return None

    def forecast(self, problem: Problem) -> Forecast:
        return Forecast(tiles.predicted_speedup(problem.pattern))

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        _native.forward(
            self._native_problem(problem, inputs),
            _argument(inputs.query),
            _argument(inputs.key),
            _argument(inputs.value),
            _argument(results.output),
            results.logsumexp.data_ptr(),
        )

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        forward: Forward,
        given: OutputGradients,
        gradients: Gradients,
    ) -> None:
        logsumexp = forward.logsumexp.contiguous()
        _native.backward(
            self._native_problem(problem, inputs),
            _argument(given.output),
            None if given.logsumexp is None else _argument(given.logsumexp),
            _argument(inputs.query),
            _argument(inputs.key),
            _argument(inputs.value),
            _argument(forward.output),
            logsumexp.data_ptr(),
            *map(_argument, gradients),
        )

    def _native_problem(self, problem: Problem, inputs: Inputs) -> _native.Problem:
        return _native.Problem(
            **_constants(problem),
            scale=inputs.scale,
            key_mask=None if inputs.key_mask is None else _argument(inputs.key_mask),
            threads=torch.get_num_threads(),
            isa=self._isa,
        )


@lru_cache(maxsize=1024)
def _constants(problem: Problem) -> dict[str, Any]:
    """All of the problem that does not change from call to call."""
    pattern = canonical(problem.pattern)
    return {
        "type": _TYPES[problem.dtype],
        "sizes": (problem.batch, problem.heads, problem.kv_heads, problem.head_dim),
        "pattern": native_pattern(pattern, tiles.choose_boxes(pattern)),
    }


def _argument(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()
