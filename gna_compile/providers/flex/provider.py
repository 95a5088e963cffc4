"""The provider for GPUs without a kernel of ours: FlexAttention's kernels, which Triton compiles.

Tokens are copied into tile order (see `tiles.py`), so that a window touches few tiles, and the
results copied back; Inductor compiles the copies along with the attention. The mask is read from
tables of a few numbers per token, so one kernel serves all patterns that have as many tokens and
columns and whose lists of tiles are about as long.

FlexAttention is called as the operator that `flex_attention` itself calls, because its backward
then takes the forward's results and needs no autograd. Kernels and tables are made by a thread of
their own: an op may run where autograd is off, in inference mode or within a CUDA graph's memory
pool, and none of that must reach what is kept.
"""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gna_compile import _torch
from gna_compile.geometry import AttentionPattern
from gna_compile.providers.flex.columns import MOST_COLUMNS, Links, most_columns
from gna_compile.providers.flex.tiles import TILE, lay_out
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
_LOG2 = math.log(2)  # FlexAttention's logsumexp is to base 2

_OPTIONS = {
    "BACKEND": "TRITON",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


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
        _run(_forward, problem, inputs, results)

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
        _run(_backward, problem, inputs, tensors)


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


_SHARED = 12  # tables that are there whatever the mask: four of tokens, eight of tiles


class _Mask(NamedTuple):
    """What the mask of a kernel is made of; the rest is in the tables.

    Attributes:
        columns: how many columns there are.
        has_shown: whether some keys are limited by none of them.
        has_links: whether that depends on the query.
        has_key_mask: whether global keys may be hidden.
    """

    columns: int
    has_shown: bool
    has_links: bool
    has_key_mask: bool

    @property
    def tables(self) -> int:
        """How many tables come before the other arguments, the key mask included."""
        others = self.has_shown + 3 * self.has_links + 2 * self.has_key_mask
        return _SHARED + 3 * self.columns + others


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
) -> tuple[_Mask, tuple[Tensor, ...]]:
    """A layout's tensors on the device. Kept for good: a captured CUDA graph reads them."""

    def make() -> tuple[_Mask, tuple[Tensor, ...]]:
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
        mask = _Mask(len(layout.columns), has_shown, has_links, hides_keys)
        moved = {id(table): table.to(device) for table in tables}
        return mask, tuple(moved[id(table)] for table in tables)

    return cast("tuple[_Mask, tuple[Tensor, ...]]", _apart(make, device))


@lru_cache(maxsize=256)
def _kernel(step: _Step, mask: _Mask, scale: float, facts: tuple[_Facts, ...]) -> _Step:
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


# What is compiled --------------------------------------------------------------------------------


class _Tiles:
    """Reads and writes tensors in tile order.

    Args:
        mask: which mask this is.
        tables: as `_tables` has them, then the key mask [batch, global keys] if there is one; what
            comes after that is ignored.
    """

    def __init__(self, mask: _Mask, tables: Sequence[Tensor]) -> None:
        self._mask = mask
        self._queries, self._query_rows, self._keys, self._key_rows = tables[:4]
        self._lists = tables[4:_SHARED]
        self._is_key = self._keys >= 0
        buffers = list(tables[_SHARED : _SHARED + 3 * mask.columns])
        others = tables[_SHARED + 3 * mask.columns : mask.tables]
        if mask.has_key_mask:
            *others, global_key, key_mask = others
            chosen = key_mask[:, global_key.clamp(min=0)] | (global_key < 0)
            self._is_key = self._is_key & chosen
        if mask.has_shown:
            (shown,) = others
            buffers.append(shown & chosen if mask.has_key_mask else shown)
        if mask.has_links:
            query_part, key_part, links = others
            if mask.has_key_mask:
                key_part = key_part.where(chosen, links.shape[1] - 1)
            buffers += [query_part, key_part, links]
        self._buffers = tuple(buffers)

    def read(self, tensor: Tensor) -> Tensor:
        """[batch, heads, query tokens, ...] in tile order; zero where a row is no token."""
        return _read(tensor, self._queries, self._queries >= 0)

    def read_keys(self, tensor: Tensor) -> Tensor:
        """The same of keys, and zero for hidden ones, which may hold anything."""
        return _read(tensor, self._keys, self._is_key)

    def write(self, target: Tensor, tiled: Tensor) -> None:
        """Writes what `read` would read."""
        target.copy_(tiled[:, :, self._query_rows])

    def write_keys(self, target: Tensor, tiled: Tensor) -> None:
        """Writes what `read_keys` would read."""
        target.copy_(tiled[:, :, self._key_rows])

    def rest(self, scale: float) -> tuple[Any, ...]:
        """FlexAttention's arguments from the block mask on."""
        from torch.nn.attention.flex_attention import BlockMask

        make: Any = BlockMask
        block_mask = make(
            (len(self._queries), len(self._keys)),
            *(table[None, None] for table in self._lists),
            BLOCK_SIZE=(TILE, TILE),
            mask_mod=self._visible,
        )
        return block_mask.as_tuple(), scale, dict(_OPTIONS), (), self._buffers

    def _visible(
        self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *buffers: Tensor
    ) -> Tensor:
        count = self._mask.columns
        columns = zip(*(buffers[n * count : (n + 1) * count] for n in range(3)), strict=True)
        terms = [(at[key] >= first[query]) & (at[key] < stop[query]) for at, first, stop in columns]
        others = buffers[3 * count :]

        def of_key(table: Tensor) -> Tensor:
            return table[batch, key] if self._mask.has_key_mask else table[key]

        if self._mask.has_links:
            query_part, key_part, links = others
            link = links[query_part[query], of_key(key_part)]
            terms = [term | (link & (1 << bit) > 0) for bit, term in enumerate(terms)]
            terms.append(link >= 1 << count)
        if not terms:
            return of_key(others[0])
        visible = reduce(operator.and_, terms)
        return visible | of_key(others[0]) if self._mask.has_shown else visible


def _read(tensor: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    if keep.ndim == 2:
        keep = keep[:, None]
    if tensor.ndim == 4:
        keep = keep[..., None]
    return tensor[:, :, order.clamp(min=0)].masked_fill(~keep, 0)


def _score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def _score_gradient(
    score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, grad: Tensor
) -> list[Tensor | None]:
    return [grad, None, None, None, None]


def _forward(mask: _Mask, scale: float, *arguments: Tensor) -> None:
    tiles = _Tiles(mask, arguments)
    query, key, value, output, logsumexp = arguments[mask.tables :]
    out, lse, *_ = _torch.flex_attention(
        tiles.read(query),
        tiles.read_keys(key),
        tiles.read_keys(value),
        _score,
        *tiles.rest(scale),
    )
    tiles.write(output, out)
    tiles.write(logsumexp, lse * _LOG2)


def _backward(mask: _Mask, scale: float, *arguments: Tensor) -> None:
    tiles = _Tiles(mask, arguments)
    query, key, value, output, logsumexp, grad_output, *targets = arguments[mask.tables :]
    grad_logsumexp = None
    if len(targets) == 4:
        grad_logsumexp = tiles.read(targets.pop()) * _LOG2
    *grads, _ = _torch.flex_attention_backward(
        tiles.read(query),
        tiles.read_keys(key),
        tiles.read_keys(value),
        tiles.read(output),
        tiles.read(logsumexp) / _LOG2,
        tiles.read(grad_output),
        grad_logsumexp,
        _score,
        _score_gradient,
        *tiles.rest(scale),
    )
    writers = (tiles.write, tiles.write_keys, tiles.write_keys)
    for write, target, grad in zip(writers, targets, grads, strict=True):
        write(target, grad)
