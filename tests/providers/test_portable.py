"""The portable provider: its cuts and masks, hidden values, bounds on memory, and no host reads."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import provider_checks
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Watch, axes, problem
from torch import Tensor

from gna_compile import providers
from gna_compile.geometry import Axis, Neighborhood
from gna_compile.providers import (
    Declined,
    Forecast,
    Forward,
    Gradients,
    Inputs,
    OutputGradients,
    Problem,
    choose,
)
from gna_compile.providers.portable import cuts, tile_tensors, walk
from gna_compile.providers.portable import provider as portable
from gna_compile.providers.portable.masks import axis_hidden
from gna_compile.providers.portable.pieces import AxisSight, Piece, TokenGrid
from gna_compile.providers.portable.provider import Portable
from gna_compile.providers.portable.tiles import KeyRun, tiles

WAYS = ["fused", "exact"]


@pytest.fixture(autouse=True)
def _only_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", [Portable()])


def work(monkeypatch: pytest.MonkeyPatch, way: str, cut_sizes: Sequence[int] | None = None) -> None:
    """Makes the provider work that way, and cut the grid into boxes of these sizes."""
    if way == "exact":
        monkeypatch.setattr(portable, "_bounded", lambda *_: False)
    if cut_sizes is not None:

        def cut(piece: Piece, _: int) -> cuts.Cut:
            sizes = zip(piece.axes, cut_sizes or (), strict=bool(piece.axes))
            return cuts.Cut(tuple(tuple(tiles(axis, size, merge=False)) for axis, size in sizes))

        monkeypatch.setattr(walk, "cut_grid", cut)


# Cutting the grid --------------------------------------------------------------------------------


def grid_piece(axes: Sequence[Axis], global_keys: int = 0) -> Piece:
    """The queries of a whole grid, which see that grid and global tokens before it."""
    grid = TokenGrid(global_keys, tuple(axis.length for axis in axes))
    tokens = range(global_keys, global_keys + math.prod(grid.shape))
    linked = (range(global_keys),) if global_keys else ()
    sights = tuple(map(AxisSight.whole, axes))
    return Piece((tokens,), linked, bool(linked), False, sights, grid, (grid,))


@given(st.lists(axes(), min_size=1, max_size=3), st.integers(1, 3))
def test_a_cut_covers_every_query_once_with_its_union_box(parts: list[Axis], rows: int) -> None:
    for axis, of_axis in zip(parts, cuts.cut_grid(grid_piece(parts), rows).axes, strict=True):
        assert sorted(itertools.chain(*(tile.tokens for tile in of_axis))) == [*range(axis.length)]
        for tile in of_axis:
            [keys] = tile.keys
            seen = [set(axis.keys(query)) for query in tile.tokens]
            assert set(keys.tokens) == set().union(*seen)
            assert keys.full == all(row == set(keys.tokens) for row in seen)


@given(axes(), st.data(), st.integers(1, 24), st.booleans())
def test_runs_and_masks_of_a_box_are_the_geometry(
    axis: Axis, data: st.DataObject, size: int, merge: bool
) -> None:
    """Queries and keys at hand are parts of the axis; a second key grid is not limited by it."""
    queries, keys = (
        range(*sorted(data.draw(st.lists(st.integers(0, axis.length), min_size=2, max_size=2))))
        for _ in range(2)
    )
    assume(len(queries) and len(keys))
    sight = AxisSight(axis, queries, (keys, range(3)), (True, False))
    covered = []
    for tile in tiles(sight, size, merge):
        rows = [queries[token] for token in tile.tokens]
        covered += rows
        limited, free = tile.keys
        assert free == KeyRun(range(3), range(3), full=True)
        columns = [keys[token] for token in limited.tokens]
        assert {key for row in rows for key in axis.keys(row) if key in keys} <= set(columns)
        hidden = axis_hidden(tile.axis, tile.positions, limited.positions, torch.device("cpu"))
        assert [[not axis.sees(row, key) for key in columns] for row in rows] == hidden.tolist()
        assert limited.full == (not hidden.any())
    assert sorted(covered) == list(queries)


@given(st.lists(axes(longest=200), min_size=1, max_size=3), st.integers(1, 8))
@settings(max_examples=30)
def test_masks_stay_within_their_bound(parts: list[Axis], rows: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuts, "MAX_MASK", 4000)
        cut = cuts.cut_grid.__wrapped__(grid_piece(parts, global_keys=3), rows)
    full = all(tile.full for of_axis in cut.axes for tile in of_axis)
    assert full or rows * cut.max_queries * (cut.max_keys + 3) <= 4000 or cut.max_queries == 1


def test_boxes_that_divide_the_stride_need_no_mask() -> None:
    neighborhood = Neighborhood.of((8, 24, 32), (4, 12, 16), (2, 4, 8))
    cut = cuts.cut_grid(grid_piece(neighborhood.axes), 1).axes
    assert all(tile.full for of_axis in cut for tile in of_axis)
    pairs = [sum(len(t.positions) * len(t.keys[0].positions) for t in tiles) for tiles in cut]
    assert math.prod(pairs) == neighborhood.pairs


def test_cutting_a_huge_grid_is_quick() -> None:
    start = time.perf_counter()
    for grid, window, stride in [
        ((4_000_000,), (1001,), (1,)),
        ((61, 90, 160), (20, 40, 51), (3, 5, 7)),
    ]:
        cuts.cut_grid.__wrapped__(grid_piece(Neighborhood.of(grid, window, stride).axes), 1)
    assert time.perf_counter() - start < 10


# Hidden values, repeating ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(5, 6), (2, 3), (1, 2)])
@pytest.mark.parametrize("poison", provider_checks.POISON)
@pytest.mark.parametrize("where", provider_checks.WHERE)
def test_poison_reaches_the_rows_that_see_it_and_no_others(
    where: str, poison: float, cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    work(monkeypatch, "fused", cut)
    provider_checks.check_poison_reaches_the_rows_that_see_it_and_no_others(where, poison)


@pytest.mark.parametrize("poison", provider_checks.PADDING)
def test_padding_may_hold_anything(poison: float) -> None:
    provider_checks.check_padding_may_hold_anything(poison)


@pytest.mark.parametrize("low", [-math.inf, -3e38])
def test_rows_of_minus_infinity_give_zero(low: float) -> None:
    provider_checks.check_rows_of_minus_infinity_give_zero(low)


@pytest.mark.parametrize("way", WAYS)
def test_results_are_bitwise_repeatable(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work(monkeypatch, way)
    provider_checks.check_results_are_bitwise_repeatable()


# Memory, host reads --------------------------------------------------------------------------------


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
        inputs = Inputs(query, key, value, key_mask, 0.5)
        results = Forward(torch.empty_like(query), query.new_zeros(query.shape[:3]))
        if kind == "forward":
            Portable().forward(facts, inputs, results)
            return
        grads = Gradients(*map(torch.empty_like, (query, key, value)))
        Portable().backward(facts, inputs, results, OutputGradients(*results), grads)

    return run


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_bounded(way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work(monkeypatch, way)
    monkeypatch.setattr(tile_tensors, "WORKSPACE", 1 << 20)
    monkeypatch.setattr(cuts, "MAX_MASK", 1 << 17)
    cuts.cut_grid.cache_clear()
    neighborhood = Neighborhood.of((48, 48), (13, 13), prefix=4)
    query, key, value = (torch.zeros(1, 4, neighborhood.tokens, 8) for _ in range(3))
    with Watch() as watch:
        direct(kind)(query, key, value, neighborhood, torch.ones(1, 4, dtype=torch.bool))
    cuts.cut_grid.cache_clear()
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


# Choosing ----------------------------------------------------------------------------------------


class Picky:
    name = "picky"
    fast_on = frozenset({"cuda"})

    def supports(self, problem: Problem) -> str | None:
        return None if problem.head_dim == 8 else f"head_dim {problem.head_dim} is not 8"

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
    assert declined == Declined({"picky": "head_dim 16 is not 8", "portable": "not fast on cuda"})
    assert str(declined) == "picky: head_dim 16 is not 8; portable: not fast on cuda"
    assert choose(on_cuda, name="picky") == Declined({"picky": "head_dim 16 is not 8"})
    with pytest.raises(ValueError, match="no provider 'fast'; there are 'picky', 'portable'"):
        choose(takes, name="fast")


def test_supports_says_why_not() -> None:
    neighborhood = Neighborhood.of((8,), (3,))
    reason = Portable().supports(problem(neighborhood, dtype=torch.float8_e4m3fn))
    assert reason == "takes fp32, fp16, bf16 and fp64, not torch.float8_e4m3fn"
    assert Portable().supports(problem(neighborhood)) is None
