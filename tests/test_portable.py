"""The portable provider: its cuts and masks, hidden values, bounds on memory, and no host reads."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gna_compile import ops, providers
from gna_compile.geometry import Axis, Neighborhood
from gna_compile.providers import Declined, Forecast, Problem, boxes, choose, portable
from gna_compile.providers.portable import Portable

SDPA: Any = torch.nn.functional.scaled_dot_product_attention
WAYS = ["fused", "exact"]


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
        "neighborhood": neighborhood,
        "has_key_mask": False,
        "query_strides": strides,
        "key_strides": strides,
        "value_strides": strides,
    }
    return Problem(**(facts | changes))


def work(monkeypatch: pytest.MonkeyPatch, way: str, cut_sizes: Sequence[int] | None = None) -> None:
    """Makes the provider work that way, and cut the grid into boxes of these sizes."""
    if way == "exact":
        monkeypatch.setattr(portable, "_bounded", lambda *_: False)
    if cut_sizes is not None:

        def cut(neighborhood: Neighborhood, _: int) -> tuple[tuple[boxes.AxisTile, ...], ...]:
            return tuple(
                tuple(boxes._tiles(axis, size, merge=False))
                for axis, size in zip(neighborhood.axes, cut_sizes, strict=True)
            )

        monkeypatch.setattr(portable, "cut_grid", cut)


# Cutting the grid --------------------------------------------------------------------------------


@given(st.lists(axes(), min_size=1, max_size=3), st.integers(1, 3))
def test_a_cut_covers_every_query_once_with_its_union_box(parts: list[Axis], rows: int) -> None:
    for axis, tiles in zip(parts, boxes.cut_grid(Neighborhood(tuple(parts)), rows), strict=True):
        tokens = [range(axis.length)[tile.query_tokens] for tile in tiles]
        assert sorted(itertools.chain(*tokens)) == list(range(axis.length))
        for tile, queries in zip(tiles, tokens, strict=True):
            keys = range(axis.length)[tile.key_tokens]
            seen = [set(axis.keys(query)) for query in queries]
            assert set(keys) == set().union(*seen)
            assert tile.interior == all(row == set(keys) for row in seen)


@given(axes(), st.integers(1, 24), st.booleans())
def test_axis_masks_are_the_geometry(axis: Axis, size: int, merge: bool) -> None:
    for tile in boxes._tiles(axis, size, merge):
        hidden = portable.axis_hidden(tile, torch.device("cpu"))
        keys = range(axis.length)[tile.key_tokens]
        for row, query in zip(hidden, range(axis.length)[tile.query_tokens], strict=True):
            assert [not axis.sees(query, key) for key in keys] == row.tolist()
        assert tile.interior == (not hidden.any())


@given(st.lists(axes(longest=200), min_size=1, max_size=3), st.integers(1, 8))
@settings(max_examples=30)
def test_masks_stay_within_their_bound(parts: list[Axis], rows: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(boxes, "MAX_MASK", 4000)
        neighborhood = Neighborhood(tuple(parts), prefix=3)
        cut = boxes.cut_grid.__wrapped__(neighborhood, rows)
    queries = [max(len(tile.queries) for tile in tiles) for tiles in cut]
    keys = [max(len(tile.keys) for tile in tiles) for tiles in cut]
    interior = all(tile.interior for tiles in cut for tile in tiles)
    mask = rows * math.prod(queries) * (math.prod(keys) + 3)
    assert interior or mask <= 4000 or queries == [1] * len(parts)


def test_boxes_that_divide_the_stride_need_no_mask() -> None:
    neighborhood = Neighborhood.of((8, 24, 32), (4, 12, 16), (2, 4, 8))
    cut = boxes.cut_grid(neighborhood, 1)
    assert all(tile.interior for tiles in cut for tile in tiles)
    pairs = [sum(len(t.queries) * len(t.keys) for t in tiles) for tiles in cut]
    assert math.prod(pairs) == neighborhood.pairs


def test_cutting_a_huge_grid_is_quick() -> None:
    start = time.perf_counter()
    boxes.cut_grid.__wrapped__(Neighborhood.of((4_000_000,), (1001,)), 1)
    boxes.cut_grid.__wrapped__(Neighborhood.of((61, 90, 160), (20, 40, 51), (3, 5, 7)), 1)
    assert time.perf_counter() - start < 10


# Hidden values -----------------------------------------------------------------------------------

POISON = [math.nan, math.inf, -math.inf]
GEOMETRY: dict[str, Any] = {
    "grid": (5, 6),
    "window": (2, 3),
    "stride": (2, 1),
    "causal": (False, True),
    "prefix": 1,
    "suffix": 2,
}


def poisoned(where: str, poison: float, tokens: int) -> dict[str, Tensor]:
    """query, key, value and the output's gradient, one of them with a poisoned element a head."""
    generator = torch.Generator().manual_seed(tokens + ord(where[0]))
    tensors = {
        name: torch.randn(2, heads, tokens, 4, generator=generator)
        for name, heads in (("query", 4), ("key", 2), ("value", 2), ("grad", 4))
    }
    for batch, head in itertools.product(range(2), range(tensors[where].shape[1])):
        token = int(torch.randint(tokens, (), generator=generator))
        tensors[where][batch, head, token, head % 4] = poison
    return tensors


def same_where_finite(actual: Tensor, expected: Tensor) -> None:
    """Non-finite in the same places, and the same elsewhere."""
    assert torch.equal(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(
        actual.nan_to_num(0, 0, 0).double(),
        expected.detach().nan_to_num(0, 0, 0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("cut", [(5, 6), (2, 3), (1, 2)])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("where", ["query", "key", "value", "grad"])
def test_poison_reaches_the_rows_that_see_it_and_no_others(
    where: str, poison: float, cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    work(monkeypatch, "fused", cut)
    mask = oracle.mask(**GEOMETRY)
    tensors = poisoned(where, poison, mask.shape[0])
    inputs: list[Any] = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
    key_mask = torch.tensor([[True, False, True], [False, True, True]])
    output, lse = ops.neighborhood_attention(
        *inputs, **GEOMETRY, key_mask=key_mask, return_logsumexp=True
    )
    expected, expected_lse = oracle.attention(*inputs, visible=mask, key_mask=key_mask, prefix=1)
    if where != "grad":
        assert not expected.isfinite().all()
        if poison == poison and where == "value":
            assert torch.equal(output.isposinf(), expected.isposinf())
            assert torch.equal(output.isneginf(), expected.isneginf())
    same_where_finite(output.detach(), expected)
    same_where_finite(lse.detach(), expected_lse)
    grads = torch.autograd.grad(output, inputs, tensors["grad"])
    # The second oracle's rows must be taken one by one if the gradient is what is poisoned.
    expected_grads = torch.autograd.grad(
        oracle._row_by_row(*_repeated(inputs), seen=_seen(mask, key_mask), scale=0.5)[0],
        inputs,
        tensors["grad"].double(),
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        same_where_finite(grad, expected_grad.double())


def _repeated(inputs: Sequence[Tensor]) -> list[Any]:
    query, key, value = (x.double() for x in inputs)
    return [query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)]


def _seen(mask: Tensor, key_mask: Tensor) -> Tensor:
    seen = mask[None].repeat(2, 1, 1)
    seen[:, :, :1] &= key_mask[:, None, :1]
    seen[:, :, -2:] &= key_mask[:, None, 1:]
    return seen


@pytest.mark.parametrize("poison", [*POISON, 3e38])
def test_padding_may_hold_anything(poison: float) -> None:
    grid: dict[str, Any] = {"grid": (7,), "window": (3,), "prefix": 2, "suffix": 2}
    clean = [torch.randn(1, 2, 11, 8) for _ in range(3)]
    dirty = [x.clone() for x in clean]
    for tensor in dirty[1:]:
        tensor[:, :, [0, 10]] = poison
    key_mask = torch.tensor([[False, True, True, False]])
    results = []
    for inputs in (clean, dirty):
        leaves = [x.requires_grad_() for x in inputs]
        output = ops.neighborhood_attention(*leaves, **grid, key_mask=key_mask)
        assert isinstance(output, Tensor)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [-math.inf, -3e38])
def test_rows_of_minus_infinity_give_zero(low: float) -> None:
    # Token 0 and 1 see keys that make all their logits -inf, by value or by overflow.
    query, key, value = torch.rand(1, 1, 6, 4) + 1, torch.rand(1, 1, 6, 4), torch.rand(1, 1, 6, 4)
    key[0, 0, :2] = low
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output, lse = ops.neighborhood_attention(
        *inputs, grid=(6,), window=(2,), stride=(2,), scale=4.0, return_logsumexp=True
    )
    assert (output[0, 0, :2] == 0).all()
    assert lse[0, 0].isneginf().tolist() == [True, True, False, False, False, False]
    dense = SDPA(*inputs, attn_mask=oracle.mask((6,), (2,), (2,)), scale=4.0)
    torch.testing.assert_close(output, dense)
    grads = torch.autograd.grad(output[:, :, 2:].sum(), inputs)
    for grad, leaf in zip(grads, inputs, strict=True):
        if leaf is query and low == -math.inf:
            # As in dense attention: weight 0 times a key of -inf.
            assert grad[0, 0, :2].isnan().all()
            grad = grad[:, :, 2:]
        else:
            assert (grad[0, 0, :2] == 0).all()
        assert grad.isfinite().all()


# Memory, host reads, determinism -----------------------------------------------------------------


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


def direct(kind: str) -> Callable[..., Any]:
    """The provider's own forward or backward on given tensors, with what the op would allocate."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, neighborhood: Neighborhood, key_mask: Any
    ) -> None:
        batch, heads, _, head_dim = query.shape
        facts = problem(
            neighborhood,
            device=query.device.type,
            batch=batch,
            heads=heads,
            kv_heads=key.shape[1],
            head_dim=head_dim,
            has_key_mask=key_mask is not None,
        )
        output, lse = torch.empty_like(query), query.new_zeros(query.shape[:3])
        if kind == "forward":
            Portable().forward(facts, query, key, value, key_mask, 0.5, output, lse)
            return
        grads = [torch.empty_like(x) for x in (query, key, value)]
        Portable().backward(
            facts, output, lse, query, key, value, output, lse, key_mask, 0.5, *grads
        )

    return run


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_bounded(way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work(monkeypatch, way)
    monkeypatch.setattr(portable, "_WORKSPACE", 1 << 20)
    monkeypatch.setattr(boxes, "MAX_MASK", 1 << 17)
    boxes.cut_grid.cache_clear()
    neighborhood = Neighborhood.of((48, 48), (13, 13), prefix=4)
    query, key, value = (torch.zeros(1, 4, neighborhood.tokens, 8) for _ in range(3))
    with Watch() as watch:
        direct(kind)(query, key, value, neighborhood, torch.ones(1, 4, dtype=torch.bool))
    boxes.cut_grid.cache_clear()
    assert query.numel() <= watch.largest < 4 * query.numel() < neighborhood.tokens**2 / 10


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("masked", [False, True])
def test_other_devices_are_never_read_on_the_host(kind: str, masked: bool) -> None:
    # A meta tensor has no values: any read of one raises, as it would break a CUDA graph's capture.
    neighborhood = Neighborhood.of((9, 10), (3, 4), (1, 2), (2, 1), (False, True), 2, 3)
    query, key, value = (
        torch.empty(2, heads, neighborhood.tokens, 8, device="meta") for heads in (4, 2, 2)
    )
    key_mask = torch.empty(2, 5, dtype=torch.bool, device="meta") if masked else None
    direct(kind)(query, key, value, neighborhood, key_mask)


@pytest.mark.parametrize("way", WAYS)
def test_results_are_bitwise_repeatable(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work(monkeypatch, way)
    geometry: dict[str, Any] = {"grid": (12, 12), "window": (5, 5), "prefix": 3}
    inputs = [torch.randn(1, 4, 147, 16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 4, 147, 16)
    runs = []
    for _ in range(2):
        output = ops.neighborhood_attention(*inputs, **geometry)
        assert isinstance(output, Tensor)
        runs.append([output, *torch.autograd.grad(output, inputs, grad)])
    assert all(map(torch.equal, *runs))


# Choosing ----------------------------------------------------------------------------------------


class Picky:
    name = "picky"
    fast_on = frozenset({"cuda"})

    def supports(self, problem: Problem) -> str | None:
        return None if problem.head_dim == 8 else f"head size {problem.head_dim} is not 8"

    def forecast(self, problem: Problem) -> Forecast:
        return Forecast()

    def forward(self, *_: Any) -> None:
        raise AssertionError("not called here")

    backward = forward


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    picky, slow = Picky(), Portable()
    monkeypatch.setattr(providers, "PROVIDERS", [picky, slow])
    neighborhood = Neighborhood.of((8,), (3,))
    takes = problem(neighborhood)
    assert choose(takes) is picky
    assert choose(takes, allow_slow=False) is slow
    assert choose(problem(neighborhood, head_dim=16)) is slow
    assert choose(takes, name="portable") is slow
    on_cuda = problem(neighborhood, head_dim=16, device="cuda")
    declined = choose(on_cuda, allow_slow=False)
    assert declined == Declined({"picky": "head size 16 is not 8", "portable": "not fast on cuda"})
    assert str(declined) == "picky: head size 16 is not 8; portable: not fast on cuda"
    assert choose(on_cuda, name="picky") == Declined({"picky": "head size 16 is not 8"})
    with pytest.raises(ValueError, match="no provider 'fast'; there are 'picky', 'portable'"):
        choose(takes, name="fast")


def test_supports_says_why_not() -> None:
    neighborhood = Neighborhood.of((8,), (3,))
    reason = Portable().supports(problem(neighborhood, dtype=torch.float8_e4m3fn))
    assert reason == "takes fp32, fp16, bf16 and fp64, not torch.float8_e4m3fn"
    assert Portable().supports(problem(neighborhood)) is None
