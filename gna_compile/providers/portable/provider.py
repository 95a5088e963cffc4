"""The provider that runs everywhere: boxes of queries against their union box, in PyTorch's own words.

It works tile by tile (see `boxes`), so memory stays bounded: one tile's keys are copied out of the
grid at a time, and a mask is never larger than one tile. Two ways to attend within a tile:

- *fused*: PyTorch's CPU flash attention, forward and backward. It takes an additive mask, and
  0 x NaN and -inf + NaN then let hidden values through, so it serves only inputs whose logits are
  all finite, which is checked first.
- *exact*: matrix products and a softmax in fp32 (fp64 for fp64), which keep hidden values out
  whatever they are. There is no branch on data and no host synchronisation in it, so it can be
  captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gna_compile.geometry import Neighborhood
from gna_compile.providers.portable.tiles import AxisTile, cut_grid, predicted_speedup
from gna_compile.providers.problem import (
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
)

_WORKSPACE = 1 << 26
"""Bytes that the buffers of one step aim to stay under; one head of one tile always runs."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Portable:
    """PyTorch's own operators on any device; see the module's docstring."""

    name = "portable"
    fast_on = frozenset({"cpu"})

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype not in _DTYPES:
            return f"takes fp32, fp16, bf16 and fp64, not {problem.dtype}"
        return None

    def forecast(self, problem: Problem) -> Forecast:
        if problem.device != "cpu":
            return Forecast()
        group = problem.heads // problem.kv_heads
        return Forecast(predicted_speedup(problem.neighborhood, group))

    def forward(self, problem: Problem, inputs: Inputs, results: Forward) -> None:
        query, key, value, _, scale = inputs
        fused = _bounded(query, key, scale) and _bounded(value)
        scratch = _Scratch()
        for part in _parts(problem):
            step = _Step(problem, part, inputs, scratch)
            for tile in step.tiles():
                out, lse = _attend(tile, scale, fused)
                tile.write_rows(step.of_query(results.output), out)
                tile.write_rows(step.of_query(results.logsumexp), lse)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        forward: Forward,
        given: OutputGradients,
        gradients: Gradients,
    ) -> None:
        query, key, value, _, scale = inputs
        # The fused backward has no place for the logsumexp's gradient.
        fused = (
            given.logsumexp is None
            and _bounded(query, key, scale)
            and _bounded(given.output, value)
        )
        scratch = _Scratch()
        for part in _parts(problem):
            step = _Step(problem, part, inputs, scratch)
            sums = [_Accumulator(step.of_key(grad)) for grad in (gradients.key, gradients.value)]
            for tile in step.tiles():
                rows = Forward(
                    tile.read_rows(step.of_query(forward.output), "out"),
                    tile.read_rows(step.of_query(forward.logsumexp), "lse"),
                )
                grad_lse = given.logsumexp
                given_rows = OutputGradients(
                    tile.read_rows(step.of_query(given.output), "grad_out"),
                    None
                    if grad_lse is None
                    else tile.read_rows(step.of_query(grad_lse), "grad_lse"),
                )
                grads = _attend_backward(tile, rows, given_rows, scale, fused)
                tile.write_rows(step.of_query(gradients.query), grads.query)
                for total, grad in zip(sums, grads[1:], strict=True):
                    tile.add_keys(total.tensor, grad)
            for total in sums:
                total.finish()


# Which part of the batch and of the heads one step works on --------------------------------------


@dataclass(frozen=True)
class _Part:
    batch: slice
    kv_heads: slice


def _parts(problem: Problem) -> Iterator[_Part]:
    """Splits batch and heads so that a tile's buffers fit the workspace."""
    neighborhood = problem.neighborhood
    group = problem.heads // problem.kv_heads
    cut = cut_grid(neighborhood, group)
    rows = group * math.prod(max(len(tile.queries) for tile in tiles) for tiles in cut)
    keys = math.prod(max(len(tile.keys) for tile in tiles) for tiles in cut)
    keys += neighborhood.global_tokens
    # Key, value, their gradients; query, output, their gradients; fp32 is 4 bytes.
    head_bytes = 4 * 4 * problem.head_dim * (rows + keys)
    if problem.device != "cpu":
        # A few blocks of scores: the exact way holds them whole.
        head_bytes += 4 * 4 * rows * keys
    batch_bytes = head_bytes * problem.kv_heads
    if problem.has_key_mask:
        batch_bytes += 4 * rows * keys
    heads = min(max(_WORKSPACE // head_bytes, 1), problem.kv_heads)
    batches = 1
    if heads == problem.kv_heads:
        batches = min(max(_WORKSPACE // batch_bytes, 1), problem.batch)
    for batch in range(0, problem.batch, batches):
        for head in range(0, problem.kv_heads, heads):
            yield _Part(
                slice(batch, min(batch + batches, problem.batch)),
                slice(head, min(head + heads, problem.kv_heads)),
            )


class _Scratch:
    """Buffers by name, used again by every tile: fresh memory costs more than filling it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised and contiguous; what was taken under this name before is lost."""
        numel = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name] = like.new_empty(numel)
        return buffer[:numel].view(shape)


class _Step:
    """One part of the batch and heads; makes its tiles.

    Views in here: [batch, kv_heads, group, tokens, ...] of anything that the queries have, and
    [batch, kv_heads, tokens, head_dim] of anything that the keys have.
    """

    def __init__(
        self,
        problem: Problem,
        part: _Part,
        inputs: Inputs,
        scratch: _Scratch,
    ) -> None:
        self._neighborhood = problem.neighborhood
        self._part = part
        self._scratch = scratch
        self._group = problem.heads // problem.kv_heads
        self._kv_heads = problem.kv_heads
        self._query = self.of_query(inputs.query)
        self._key = self.of_key(inputs.key)
        self._value = self.of_key(inputs.value)
        self._hidden_globals: Tensor | None = None
        if inputs.key_mask is not None and problem.neighborhood.global_tokens:
            self._hidden_globals = ~inputs.key_mask[part.batch]

    def of_query(self, tensor: Tensor) -> Tensor:
        grouped = tensor.unflatten(1, (self._kv_heads, self._group))
        return grouped[self._part.batch, self._part.kv_heads]

    def of_key(self, tensor: Tensor) -> Tensor:
        return tensor[self._part.batch, self._part.kv_heads]

    def tiles(self) -> Iterator[_Tile]:
        """All tiles; each query is in exactly one. A tile is valid until the next one."""
        if self._neighborhood.global_tokens:
            yield self._global_tile()
        yield from self._grid_tiles()

    def _global_tile(self) -> _Tile:
        """The global queries, which see all tokens."""
        key, value, hidden = self._key, self._value, None
        if self._hidden_globals is not None:
            batch, grid = self._key.shape[0], self._neighborhood.grid_tokens
            visible = self._hidden_globals.new_zeros(batch, grid)
            prefix, suffix = self._hidden_globals.split(
                [self._neighborhood.prefix, self._neighborhood.suffix], dim=1
            )
            hidden = torch.cat([prefix, visible, suffix], dim=1)[:, None, None]
            key, value = (_without(tensor, hidden) for tensor in (key, value))
        return _Tile(self._neighborhood, None, self._query, key, value, hidden, self._scratch)

    def _grid_tiles(self) -> Iterator[_Tile]:
        cut = cut_grid(self._neighborhood, self._group)
        count = self._neighborhood.global_tokens
        masks = _AxisMasks(self._query.device)
        hidden_globals = None
        if self._hidden_globals is not None:
            hidden_globals = self._hidden_globals[:, None, None]
        longest = count + math.prod(max(len(tile.keys) for tile in tiles) for tiles in cut)
        keys, values = (
            _Gather(name, tensor, self._neighborhood, longest, hidden_globals, self._scratch)
            for name, tensor in (("key", self._key), ("value", self._value))
        )
        for box in itertools.product(*cut):
            hidden = masks.hidden(box)
            if hidden is not None:
                hidden = hidden.repeat(self._group, 1)[None, None]
            if count and (hidden is not None or hidden_globals is not None):
                hidden = _join_hidden(hidden_globals, hidden, count, box, self._query.device)
            yield _Tile(
                self._neighborhood,
                box,
                self._query,
                keys.take(box),
                values.take(box),
                hidden,
                self._scratch,
            )


def _join_hidden(
    hidden_globals: Tensor | None,
    hidden_box: Tensor | None,
    count: int,
    box: tuple[AxisTile, ...],
    device: torch.device,
) -> Tensor:
    """What is hidden among a tile's keys, [batch or 1, 1, rows or 1, globals + box]."""
    keys = math.prod(len(tile.keys) for tile in box)
    if hidden_globals is None:
        hidden_globals = torch.zeros((1, 1, 1, count), dtype=torch.bool, device=device)
    if hidden_box is None:
        hidden_box = torch.zeros((1, 1, 1, keys), dtype=torch.bool, device=device)
    batch, rows = hidden_globals.shape[0], hidden_box.shape[2]
    return torch.cat(
        [hidden_globals.expand(batch, 1, rows, count), hidden_box.expand(batch, 1, rows, keys)],
        dim=3,
    )


def _without(tensor: Tensor, hidden: Tensor) -> Tensor:
    """Keys [batch, kv_heads, n, D] with those that `hidden` [batch, 1, 1, n] hides set to zero."""
    return tensor.masked_fill(hidden.transpose(2, 3), 0)


# One tile ----------------------------------------------------------------------------------------


class _Tile:
    """A box of queries, the keys and values that any of them sees, and what is hidden from whom.

    Args:
        neighborhood: the geometry.
        box: one axis tile per grid axis, or None for the global queries, which see all tokens.
        query: all queries, [batch, kv_heads, group, tokens, D].
        key: this tile's keys [batch, kv_heads, keys, D]: global keys first, then the box, for a
            box; all tokens in their own order for the global queries.
        value: like key.
        hidden: bool, broadcastable to [batch, kv_heads, rows, keys], or None if nothing is hidden.
    """

    def __init__(
        self,
        neighborhood: Neighborhood,
        box: tuple[AxisTile, ...] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None,
        scratch: _Scratch,
    ) -> None:
        self._neighborhood = neighborhood
        self._box = box
        self.scratch = scratch
        self.query = self.read_rows(query, "query")
        self.key = key
        self.value = value
        self.hidden = hidden

    def read_rows(self, tensor: Tensor, name: str) -> Tensor:
        """This tile's rows [batch, kv_heads, group * queries, ...] of all queries' `tensor`.

        Maybe in the scratch buffer `name`.
        """
        if self._box is None:
            return torch.cat(self._ends(tensor, 3), dim=3).flatten(2, 3)
        box, last = self._query_box(tensor), 2 + len(self._box)
        if _is_row(box, last):
            return box.flatten(2, last)
        rows = self.scratch.take(name, box.shape, tensor).copy_(box)
        return rows.flatten(2, last)

    def write_rows(self, tensor: Tensor, rows: Tensor) -> None:
        """The inverse of `read_rows`."""
        group = tensor.shape[2]
        if self._box is not None:
            box = self._query_box(tensor)
            box.copy_(rows.unflatten(2, box.shape[2 : 3 + len(self._box)]))
            return
        sizes = [self._neighborhood.prefix, self._neighborhood.suffix]
        parts = rows.unflatten(2, (group, sum(sizes))).split(sizes, dim=3)
        for target, part in zip(self._ends(tensor, 3), parts, strict=True):
            target.copy_(part)

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        """Adds the gradient of this tile's keys to `total` [batch, kv_heads, tokens, D]."""
        if self._box is None:
            total.add_(grad)
            return
        sizes = [self._neighborhood.prefix, self._neighborhood.suffix]
        *parts, box_grad = grad.split([*sizes, grad.shape[2] - sum(sizes)], dim=2)
        for target, part in zip(self._ends(total, 2), parts, strict=True):
            target.add_(part)
        box = _grid_box(total, 2, self._neighborhood, [tile.key_tokens for tile in self._box])
        box.add_(box_grad.unflatten(2, box.shape[2:-1]))

    def _query_box(self, tensor: Tensor) -> Tensor:
        assert self._box is not None
        tokens = [tile.query_tokens for tile in self._box]
        return _grid_box(tensor, 3, self._neighborhood, tokens)

    def _ends(self, tensor: Tensor, dim: int) -> list[Tensor]:
        return _global_tokens(tensor, dim, self._neighborhood)


def _grid_box(tensor: Tensor, dim: int, neighborhood: Neighborhood, box: list[slice]) -> Tensor:
    """A box of the grid of tokens that lies along `dim`, as a view with one dimension an axis."""
    tokens = tensor.narrow(dim, neighborhood.prefix, neighborhood.grid_tokens)
    grid = tokens.unflatten(dim, neighborhood.grid)
    return grid[(slice(None),) * dim + tuple(box)]


def _global_tokens(tensor: Tensor, dim: int, neighborhood: Neighborhood) -> list[Tensor]:
    """The prefix and the suffix tokens along `dim`, as views."""
    start = neighborhood.prefix + neighborhood.grid_tokens
    return [
        tensor.narrow(dim, 0, neighborhood.prefix),
        tensor.narrow(dim, start, neighborhood.suffix),
    ]


class _Gather:
    """Brings the keys (or values) of one tile after another into one row of tokens.

    The global tokens are copied once, to the front of the buffer; boxes follow behind them.
    Without global tokens, a box that already is one evenly strided row is not copied.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        neighborhood: Neighborhood,
        longest: int,
        hidden_globals: Tensor | None,
        scratch: _Scratch,
    ) -> None:
        self._name = name
        self._scratch = scratch
        self._tensor = tensor
        self._neighborhood = neighborhood
        self._longest = longest
        self._hidden_globals = hidden_globals
        self._buffer: Tensor | None = None

    def take(self, box: tuple[AxisTile, ...]) -> Tensor:
        tokens = [tile.key_tokens for tile in box]
        view = _grid_box(self._tensor, 2, self._neighborhood, tokens)
        count = self._neighborhood.global_tokens
        if count == 0 and _is_row(view, view.ndim - 2):
            return view.flatten(2, -2)
        if self._buffer is None:
            self._buffer = self._new_buffer(count)
        row = self._buffer[:, :, : count + math.prod(view.shape[2:-1])]
        row[:, :, count:].unflatten(2, view.shape[2:-1]).copy_(view)
        return row

    def _new_buffer(self, count: int) -> Tensor:
        batch, heads, _, head_dim = self._tensor.shape
        shape = (batch, heads, self._longest, head_dim)
        buffer = self._scratch.take(self._name, shape, self._tensor)
        if count:
            tokens = torch.cat(_global_tokens(self._tensor, 2, self._neighborhood), dim=2)
            if self._hidden_globals is not None:
                tokens = _without(tokens, self._hidden_globals)
            buffer[:, :, :count].copy_(tokens)
        return buffer


def _is_row(view: Tensor, last: int) -> bool:
    """Whether the dimensions 2 .. last are one evenly strided dimension."""
    stride = None
    for size, step in zip(view.shape[last:1:-1], view.stride()[last:1:-1], strict=True):
        if size == 1:
            continue
        if stride is not None and step != stride:
            return False
        stride = step * size
    return True


class _AxisMasks:
    """The masks of tiles, from one small mask per axis and axis tile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[AxisTile, Tensor] = {}

    def hidden(self, box: tuple[AxisTile, ...]) -> Tensor | None:
        """Bool [queries, keys] of a box of the grid, or None if nothing is hidden."""
        rank = len(box)
        shape = [len(tile.queries) for tile in box] + [len(tile.keys) for tile in box]
        hidden: Tensor | None = None
        for axis, tile in enumerate(box):
            if tile.interior:
                continue
            if tile not in self._known:
                self._known[tile] = axis_hidden(tile, self._device)
            view = [1] * (2 * rank)
            view[axis], view[rank + axis] = shape[axis], shape[rank + axis]
            here = self._known[tile].view(view)
            hidden = here if hidden is None else hidden | here
        if hidden is None:
            return None
        return hidden.expand(shape).reshape(math.prod(shape[:rank]), math.prod(shape[rank:]))


def axis_hidden(tile: AxisTile, device: torch.device) -> Tensor:
    """Bool [queries, keys] of one axis: True where the query does not see the key.

    Computed on the device, since a CUDA graph cannot capture a copy from the host. This is
    `Axis.keys` in tensor form, and a test holds the two together.
    """
    axis = tile.axis
    query = torch.arange(tile.queries.start, tile.queries.stop, device=device)[:, None]
    key = torch.arange(tile.keys.start, tile.keys.stop, device=device)
    group = torch.div(query, axis.stride, rounding_mode="floor") * axis.stride
    if axis.causal:
        leader = (group + axis.stride - 1).clamp(max=axis.length - 1)
        return (key < leader - axis.window + 1) | (key > query)
    leader = (group + axis.stride // 2).clamp(max=axis.length - 1)
    first = (leader - axis.window // 2).clamp(0, axis.length - axis.window)
    return (key < first) | (key >= first + axis.window)


# Attention within a tile -------------------------------------------------------------------------


def _bounded(left: Tensor, right: Tensor | None = None, scale: float = 1.0) -> bool:
    """Whether all inner products of rows are finite, on a device where asking costs little."""
    if left.device.type != "cpu":
        return False
    bound = _largest(left)
    if right is not None:
        bound *= _largest(right) * left.shape[-1] * max(abs(scale), 1.0)
    return bound < torch.finfo(_accurate(left.dtype)).max / 4


def _largest(tensor: Tensor) -> float:
    # Two reductions and no |tensor|, which would be a copy; both are NaN if any element is.
    return max(abs(float(tensor.amax())), abs(float(tensor.amin())))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attend(tile: _Tile, scale: float, fused: bool) -> Forward:
    """Output [batch, kv_heads, rows, D] and logsumexp [batch, kv_heads, rows] of a tile."""
    if not fused:
        return _exact(tile, scale)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _unit_stride(tile.query),
        _unit_stride(tile.key),
        _unit_stride(tile.value),
        attn_mask=_bias(tile),
        scale=scale,
    )
    return Forward(out, lse)


def _attend_backward(
    tile: _Tile, forward: Forward, given: OutputGradients, scale: float, fused: bool
) -> Gradients:
    """Gradients of a tile's queries, keys and values, shaped like them.

    Args:
        tile: the tile.
        forward: its rows of the forward's results.
        given: its rows of their gradients.
        scale: of the logits.
        fused: whether PyTorch's kernel may serve.
    """
    if not fused:
        return _exact_backward(tile, forward, given, scale)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _unit_stride(given.output),
        _unit_stride(tile.query),
        _unit_stride(tile.key),
        _unit_stride(tile.value),
        _unit_stride(forward.output),
        forward.logsumexp.contiguous(),
        0.0,
        False,
        attn_mask=_bias(tile),
        scale=scale,
    )
    return Gradients(*grads[:3])


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bias(tile: _Tile) -> Tensor | None:
    if tile.hidden is None:
        return None
    dtype = _accurate(tile.query.dtype)
    like = tile.hidden.new_empty(0, dtype=dtype)
    bias = tile.scratch.take("bias", tile.hidden.shape, like)
    return bias.zero_().masked_fill_(tile.hidden, -math.inf)


def _row_chunks(tile: _Tile) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of the rows whose scores fit the workspace, and what is hidden from them."""
    batch, heads, rows, _ = tile.query.shape
    keys = tile.key.shape[2]
    step = max(_WORKSPACE // (4 * 4 * batch * heads * keys), 1)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        hidden = tile.hidden
        if hidden is not None:
            if hidden.shape[2] != 1:
                hidden = hidden[:, :, chunk]
            hidden = hidden.expand(-1, -1, chunk.stop - chunk.start, -1)
        yield chunk, hidden


def _exact(tile: _Tile, scale: float) -> Forward:
    dtype = _accurate(tile.query.dtype)
    query, key, value = (x.to(dtype) for x in (tile.query, tile.key, tile.value))
    outs, lses = [], []
    for rows, hidden in _row_chunks(tile):
        scores = torch.matmul(query[:, :, rows], key.mT).mul_(scale)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        highest = scores.amax(dim=-1, keepdim=True)
        # A row of nothing but -inf has output 0 and logsumexp -inf, as in SDPA's safe softmax.
        shift = highest.masked_fill(highest == -math.inf, 0)
        weights = scores.sub_(shift).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        out = _product(weights, value, hidden, positive=True)
        outs.append(out.div_(total.masked_fill(total == 0, 1)))
        lses.append((highest + total.log()).squeeze(-1))
    return Forward(torch.cat(outs, dim=2), torch.cat(lses, dim=2))


def _exact_backward(
    tile: _Tile, forward: Forward, given: OutputGradients, scale: float
) -> Gradients:
    dtype = _accurate(tile.query.dtype)
    query, key, value = (x.to(dtype) for x in (tile.query, tile.key, tile.value))
    grad_out, lse = given.output.to(dtype), forward.logsumexp
    shift = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)
    delta = (grad_out * forward.output.to(dtype)).sum(dim=-1, keepdim=True)
    if given.logsumexp is not None:
        delta = delta - given.logsumexp.unsqueeze(-1)
    grad_queries = []
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for rows, hidden in _row_chunks(tile):
        weights = torch.matmul(query[:, :, rows], key.mT).mul_(scale).sub_(shift[:, :, rows]).exp_()
        grad_scores = torch.matmul(grad_out[:, :, rows], value.mT).sub_(delta[:, :, rows])
        hidden_from = None
        if hidden is not None:
            weights.masked_fill_(hidden, 0)
            hidden_from = hidden.mT
        grad_value += _product(weights.mT, grad_out[:, :, rows], hidden_from, positive=True)
        grad_scores.mul_(weights).mul_(scale)
        if hidden is not None:
            grad_scores.masked_fill_(hidden, 0)
        grad_queries.append(_product(grad_scores, key, hidden, positive=False))
        grad_key += _product(grad_scores.mT, query[:, :, rows], hidden_from, positive=False)
    return Gradients(torch.cat(grad_queries, dim=2), grad_key, grad_value)


def _product(weights: Tensor, values: Tensor, hidden: Tensor | None, positive: bool) -> Tensor:
    """weights @ values, where hidden pairs (weight 0) stay out even if the value is not finite.

    Args:
        weights: [batch, heads, m, n], 0 where hidden.
        values: [batch, heads, n, D].
        hidden: bool, broadcastable to weights' shape, m and n written out.
        positive: whether the weights are at least 0, so that a visible inf stays that inf;
            otherwise any visible non-finite value gives NaN.
    """
    if hidden is None:
        return torch.matmul(weights, values)
    finite = torch.isfinite(values)
    if values.device.type == "cpu" and bool(finite.all()):
        return torch.matmul(weights, values)
    product = torch.matmul(weights, values.masked_fill(~finite, 0))
    rising = ~finite & (values != -math.inf) if positive else ~finite
    falling = ~finite & (values != math.inf) if positive else ~finite
    # How many visible values are +inf or NaN, and -inf or NaN: +inf and -inf make a NaN.
    counts = torch.matmul(
        (~hidden).to(values.dtype), torch.cat([rising, falling], dim=-1).to(values.dtype)
    )
    for count, limit in zip(counts.chunk(2, dim=-1), (math.inf, -math.inf), strict=True):
        product += torch.zeros_like(product).masked_fill_(count > 0, limit)
    return product


class _Accumulator:
    """Sums a gradient in fp32 (fp64 for fp64), in place where the gradient is that already."""

    def __init__(self, grad: Tensor) -> None:
        self._grad = grad
        dtype = _accurate(grad.dtype)
        if grad.dtype == dtype:
            self.tensor = grad.zero_()
        else:
            self.tensor = torch.zeros(grad.shape, dtype=dtype, device=grad.device)

    def finish(self) -> None:
        if self.tensor is not self._grad:
            self._grad.copy_(self.tensor)
