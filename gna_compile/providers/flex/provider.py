"""The provider for GPUs without a kernel of ours: FlexAttention's kernels, which Triton compiles.

Tokens are copied into tile order (see `tiles.py`), so that a window touches few tiles, and the
results copied back; Inductor compiles the copies along with the attention. The mask is read from
tables of a few numbers per token, so one kernel serves all patterns that have as many tokens and
columns and whose lists of tiles are about as long.

Kernels and tables are made by a thread of their own: an op may run where autograd is off, in
inference mode or within a CUDA graph's memory pool, and none of that must reach what is kept.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.geometry import AttentionPattern
from gna_compile.providers.flex.columns import MOST_COLUMNS, Links, most_columns
from gna_compile.providers.flex.steps import Mask, backward, forward
from gna_compile.providers.flex.tiles import lay_out
from gna_compile.providers.problem import (
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIMS = range(16, 257)
_SMALL_HEAD_DIM, _LARGE_SHARED = (
    128,
    160 << 10,
)  # bytes; larger heads want more than 8.6 and 8.9 have


class Flex:
    """FlexAttention on CUDA; fp32, bf16 and fp16, accumulated in fp32."""

    name = "flex"
    fast_on = frozenset({"cuda"})

    def supports(self, problem: Problem) -> str | None:
        if problem.device != "cuda":
            return f"runs on cuda, not {problem.device}"
        return self.declines(problem) or unusable(problem.dtype, problem.head_dim)

    def declines(self, problem: Problem) -> str | None:
        """Why no device could run `problem` with FlexAttention, or None if one could."""
        if not problem.pattern.key_tokens:
            return "takes at least one key"
        if most_columns(problem.pattern) > MOST_COLUMNS:
            return f"takes at most {MOST_COLUMNS} different pairs of an axis and its dilation"
        if problem.dtype not in _DTYPES:
            return f"takes fp32, bf16 and fp16, not {problem.dtype}"
        if problem.head_dim not in _HEAD_DIMS:
            return (
                f"head_dim {problem.head_dim} is not between {_HEAD_DIMS[0]} and {_HEAD_DIMS[-1]}"
            )
        return None

    def forecast(self, problem: Problem) -> Forecast:
        return Forecast()

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        _run(forward, problem, inputs, results)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        forward: Forward,
        given: OutputGradients,
        gradients: Gradients,
    ) -> None:
        tensors = [*forward, given.output, *gradients]
        if given.logsumexp is not None:
            tensors.append(given.logsumexp)
        _run(backward, problem, inputs, tensors)


def unusable(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why Triton's kernels of this type cannot run on the current device, or None if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _unusable_on(torch.cuda.current_device(), dtype, head_dim)


@cache
def _unusable_on(device: int, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    why = _torch.why_not("flex")
    if why is not None:
        return why
    if torch.version.hip is not None:
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    needed = 8 if dtype == torch.bfloat16 else 7  # what Inductor compiles for
    if properties.major < needed:
        return (
            f"{dtype} needs compute capability {needed}.0, not "
            f"{properties.major}.{properties.minor}"
        )
    shared = properties.shared_memory_per_block_optin
    if head_dim > _SMALL_HEAD_DIM and shared < _LARGE_SHARED:
        return (
            f"head_dim {head_dim} needs {_LARGE_SHARED} bytes of shared memory, not {shared}: "
            f"PyTorch's kernels for more than {_SMALL_HEAD_DIM} do not fit"
        )
    return None


# Kernels and tables, made once -------------------------------------------------------------------


_Step = Callable[..., None]
_Facts = tuple[torch.device, torch.dtype, torch.Size, tuple[int, ...]]


def _run(step: _Step, problem: Problem, inputs: Inputs, others: Sequence[Tensor]) -> None:
    query, key, value, key_mask, scale = inputs
    hides_keys = key_mask is not None and key_mask.shape[1] > 0
    mask, tables = _tables(problem.pattern, hides_keys, query.device)
    arguments = [*tables, *([key_mask] if hides_keys else []), query, key, value, *others]
    facts = tuple((x.device, x.dtype, x.shape, x.stride()) for x in arguments if x is not None)
    _kernel(step, mask, scale, facts)(*arguments)


@cache
def _tables(
    pattern: AttentionPattern, hides_keys: bool, device: torch.device
) -> tuple[Mask, tuple[Tensor, ...]]:
    """A layout's tensors on the device. Kept for good: a captured CUDA graph reads them."""

    def make() -> tuple[Mask, tuple[Tensor, ...]]:
        layout = lay_out(pattern, hides_keys)
        sequences = (layout.queries, layout.keys)
        tables = [table for rows in sequences for table in (rows.order, rows.rows)]
        for lists in (layout.key_tiles, layout.query_tiles):
            tables += [lists.masked_counts, lists.masked, lists.whole_counts, lists.whole]
        for values in zip(*layout.columns, strict=True):
            tables += values
        links = layout.links
        has_links = isinstance(links, Links)
        has_shown = not isinstance(links, Links) and bool(links.any())
        if isinstance(links, Links):
            tables += links
        elif has_shown:
            tables.append(links)
        if hides_keys:
            tables.append(layout.global_key)
        mask = Mask(len(layout.columns), has_shown, has_links, hides_keys)
        moved = {id(table): table.to(device) for table in tables}
        return mask, tuple(moved[id(table)] for table in tables)

    return cast("tuple[Mask, tuple[Tensor, ...]]", _apart(make, device))


@lru_cache(maxsize=256)
def _kernel(step: _Step, mask: Mask, scale: float, facts: tuple[_Facts, ...]) -> _Step:
    """`step` compiled for tensors of these devices, types, shapes and strides."""

    def run(*arguments: Tensor) -> None:
        step(mask, scale, *arguments)

    # Tracing keeps its state in globals. The lock is taken here, where it may already be held, and
    # not by the thread apart.
    with _torch.compile_lock:
        return cast(_Step, _apart(lambda: _compile(run, facts), facts[0][0]))


def _apart(make: Callable[[], Any], device: torch.device) -> Any:
    """The result of `make`, called in a thread of its own with the device as current one."""

    def call() -> Any:
        if device.type != "cuda":
            return make()
        with torch.cuda.device(device):
            return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _compile(run: _Step, facts: Sequence[_Facts]) -> _Step:
    with torch.no_grad(), _torch.FakeTensorMode():
        examples = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for device, dtype, shape, strides in facts
        ]
        graph = _torch.make_fx(run)(*examples)
    with torch.no_grad():
        compiled: Any = _torch.compile_fx(
            graph, examples, config_patches={"triton.cudagraphs": False}
        )
    return cast(_Step, compiled)
