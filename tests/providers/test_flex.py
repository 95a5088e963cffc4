"""The flex provider without a GPU: its tile order, lists and mask, and what it asks FlexAttention for.

FlexAttention's own reference stands in for its kernels. It follows the mask and not the lists, so
the lists are tested apart. `test_cuda.py` runs the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import oracle
import provider_checks
import pytest
import torch
from flex_problems import check_random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_model import masked
from problems import Watch, axes, problem
from small_net import GRID, Net, image, policy
from torch import Tensor
from torch._inductor import compile_fx as inductor

from gna_compile import ops, providers
from gna_compile.geometry import Neighborhood
from gna_compile.providers import Problem, choose
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.flex import provider as flex
from gna_compile.providers.flex.provider import Flex
from gna_compile.providers.flex.tiles import TILE, Layout, TileLists, choose_box, lay_out
from gna_compile.providers.portable.provider import Portable


class OnCpu(Flex):
    """Takes what FlexAttention's reference takes."""

    def supports(self, problem: Problem) -> str | None:
        return None if problem.dtype in flex._DTYPES else "no"


def apart(run: Any, *arguments: Tensor) -> Any:
    """Runs where an op's dispatch keys do not reach: the reference is made of vmaps, kernels are not."""

    def call() -> Any:
        with torch.inference_mode(arguments[-1].is_inference()), torch.no_grad():
            return run(*arguments)

    return flex._apart(call, arguments[-1].device)


@pytest.fixture
def _reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uncompiled, and no other provider."""
    monkeypatch.setattr(flex, "_compile", lambda run, facts: partial(apart, run))
    monkeypatch.setattr(providers, "PROVIDERS", [OnCpu()])
    flex._kernel.cache_clear()
    yield
    flex._kernel.cache_clear()


@pytest.fixture
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled by all of Inductor but its code generation: on a CPU, FlexAttention cannot train."""
    compile_fx = inductor.compile_fx

    def uncompiled(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        def run(arguments: list[Tensor]) -> Any:
            return apart(graph, *arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile_most(*args: Any, **kwargs: Any) -> Any:
        return compile_fx(*args, **{**kwargs, "inner_compile": uncompiled})

    monkeypatch.setattr(inductor, "compile_fx", compile_most)
    monkeypatch.setattr(providers, "PROVIDERS", [OnCpu()])
    flex._kernel.cache_clear()
    yield
    flex._kernel.cache_clear()


reference = pytest.mark.usefixtures("_reference")
without_kernels = pytest.mark.usefixtures("_without_kernels")


# Tiles and masks ---------------------------------------------------------------------------------


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    rank = draw(st.integers(1, 3))
    longest = {1: 600, 2: 30, 3: 10}[rank]
    parts = tuple(draw(axes(longest)) for _ in range(rank))
    prefix, suffix = (draw(st.sampled_from([0, 0, 3, 100, 128])) for _ in range(2))
    return Neighborhood(parts, prefix, suffix)


def dense(lists: TileLists) -> tuple[Tensor, Tensor]:
    """Which tiles are listed, bool [tiles, tiles] for those with and those without a mask."""
    tiles = len(lists.masked)
    tables = []
    for counts, indices in ((lists.masked_counts, lists.masked), (lists.whole_counts, lists.whole)):
        table = torch.zeros(tiles, tiles, dtype=torch.bool)
        for row, (count, entries) in enumerate(zip(counts, indices, strict=True)):
            listed = entries[:count].tolist()
            assert listed == sorted(set(listed))
            table[row, listed] = True
        tables.append(table)
    assert lists.masked.shape == lists.whole.shape
    return tables[0], tables[1]


def visible_rows(layout: Layout, neighborhood: Neighborhood, key_mask: Tensor | None) -> Tensor:
    """What the kernels' lists and mask make visible in tile order, bool [rows, rows]."""
    tables = flex._tables(neighborhood, key_mask is not None, torch.device("cpu"))
    mask = flex._Mask(len(layout.position), neighborhood.global_tokens > 0, key_mask is not None)
    tiles = flex._Tiles(mask, [*tables, *([] if key_mask is None else [key_mask])])
    rows = torch.arange(len(layout.order))
    zero = torch.tensor(0)
    seen = tiles._visible(zero, zero, rows[:, None], rows, *tiles._buffers)
    masked, whole = (
        table.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1) for table in dense(layout.keys)
    )
    assert not (masked & whole).any()
    return (masked & seen) | whole


@given(neighborhoods(), st.booleans())
@settings(max_examples=60)
def test_lists_and_mask_are_the_geometry(neighborhood: Neighborhood, hides_keys: bool) -> None:
    count = neighborhood.global_tokens
    hides_keys = hides_keys and count > 0
    key_mask = (torch.arange(count) % 3 > 0)[None] if hides_keys else None
    layout = lay_out(neighborhood, hides_keys)
    seen = visible_rows(layout, neighborhood, key_mask)
    parts = neighborhood.axes
    expected = oracle.mask(
        neighborhood.grid,
        [axis.window for axis in parts],
        [axis.stride for axis in parts],
        [axis.dilation for axis in parts],
        [axis.causal for axis in parts],
        neighborhood.prefix,
        neighborhood.suffix,
    )
    if key_mask is not None:
        prefix, suffix = key_mask[0].split([neighborhood.prefix, neighborhood.suffix])
        expected[:, : len(prefix)] &= prefix
        expected[:, len(expected) - len(suffix) :] &= suffix
    rows = layout.rows
    assert torch.equal(seen[rows][:, rows], expected)
    assert torch.equal(layout.order[rows], torch.arange(len(rows), dtype=torch.int32))
    assert not seen[:, layout.order < 0].any()
    for ours, theirs in zip(dense(layout.keys), dense(layout.queries), strict=True):
        assert torch.equal(ours, theirs.T)


def test_full_blocks_need_no_mask() -> None:
    layout = lay_out(Neighborhood.of((8, 32, 32), (4, 16, 16), (4, 16, 16)))
    assert layout.keys.masked_counts.sum() == 0
    assert layout.keys.whole_counts.tolist() == [8] * 64
    assert layout.queries.masked_counts.sum() == 0


def test_tables_are_small() -> None:
    neighborhood = Neighborhood.of((128, 128), (13, 13))
    with Watch() as watch:
        layout = lay_out(neighborhood)
    assert choose_box(neighborhood) in {(8, 16), (16, 8)}
    assert watch.largest < 4 * neighborhood.tokens
    lists = [layout.keys.masked, layout.keys.whole, layout.queries.masked, layout.queries.whole]
    assert all(x.shape == (128, 16) for x in lists)


def test_windows_over_one_grid_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_nothing(run: Any, facts: Any) -> Any:
        compiled.append(facts)
        return run

    monkeypatch.setattr(flex, "_compile", compile_nothing)
    monkeypatch.setattr(providers, "PROVIDERS", [OnCpu()])
    flex._kernel.cache_clear()
    inputs = [torch.randn(1, 1, 24 * 24, 16) for _ in range(3)]
    for window in ((5, 5), (6, 6), (5, 6)):
        for _ in range(2):
            ops.neighborhood_attention(*inputs, grid=(24, 24), window=window)
    flex._kernel.cache_clear()
    assert len(compiled) == 1


# What is computed --------------------------------------------------------------------------------


@reference
@pytest.mark.parametrize("seed", range(40))
def test_random_problems(seed: int) -> None:
    check_random_problem(seed, "cpu", torch.float32, longest={1: 200, 2: 14, 3: 6})


@reference
@pytest.mark.parametrize("poison", provider_checks.PADDING)
def test_padding_may_hold_anything(poison: float) -> None:
    provider_checks.check_padding_may_hold_anything(poison)


@reference
def test_rows_of_minus_infinity_give_zero() -> None:
    # A key of -inf itself spreads in the backward, as any hidden value of a visited tile that is
    # not finite does.
    provider_checks.check_rows_of_minus_infinity_give_zero(-3e38)


@reference
def test_results_are_bitwise_repeatable() -> None:
    provider_checks.check_results_are_bitwise_repeatable()


@without_kernels
@pytest.mark.parametrize("seed", [1, 4, 5, 8])
def test_inductor_takes_both_passes(seed: int) -> None:
    check_random_problem(seed, "cpu", torch.float32, {1: 200, 2: 14, 3: 6})


@without_kernels
@pytest.mark.parametrize("inference", [False, True])
def test_in_a_compiled_model(inference: bool) -> None:
    model, x = Net(), image()
    options: dict[str, Any] = {"policy": policy(allow_slow_providers=True), "inner": "aot_eager"}
    run = torch.compile(model, backend="gna", options=options, fullgraph=True)
    with masked(model, {"*": oracle.mask(GRID, (3, 3))}):
        expected = model(x)
    if inference:
        with torch.inference_mode():
            torch.testing.assert_close(run(x), expected.detach(), rtol=1e-3, atol=1e-4)
    actual = run(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    seed = torch.randn_like(actual)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(y, parameters, seed) for y in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@without_kernels
def test_threads_compile_one_at_a_time() -> None:
    """As autograd's threads do, one for each device."""
    x = torch.randn(1, 1, 83, 16)

    def attend(window: int) -> Any:
        return ops.neighborhood_attention(x, x, x, grid=(83,), window=(window,), provider="flex")

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attend, (3, 7, 40, 83)))
    for window, result in zip((3, 7, 40, 83), results, strict=True):
        torch.testing.assert_close(result, attend(window))


# Choosing ----------------------------------------------------------------------------------------


def test_supports_says_why_not() -> None:
    neighborhood = Neighborhood.of((8,), (3,))
    assert Flex().supports(problem(neighborhood)) == "runs on cuda, not cpu"
    declines = Flex().declines
    assert declines(problem(neighborhood, head_dim=96)) is None
    assert declines(problem(neighborhood)) == "head_dim 8 is not between 16 and 256"
    double = problem(neighborhood, dtype=torch.float64, head_dim=64)
    assert declines(double) == "takes fp32, bf16 and fp16, not torch.float64"
    if not torch.cuda.is_available():
        on_cuda = problem(neighborhood, device="cuda", head_dim=64)
        assert Flex().supports(on_cuda) == "there is no CUDA device"


def test_old_and_small_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device is asked by itself: V100, P40, A100, A10."""
    devices = [(7, 0, 96), (6, 1, 48), (8, 0, 163), (8, 6, 99)]

    def properties(device: int) -> Any:
        major, minor, kilobytes = devices[device]
        return SimpleNamespace(
            major=major, minor=minor, shared_memory_per_block_optin=kilobytes << 10
        )

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    flex._unusable_on.cache_clear()
    reasons = []
    for device in range(4):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        reasons += [flex.unusable(dtype, 128) for dtype in (torch.float16, torch.bfloat16)]
    wide = flex.unusable(torch.bfloat16, 192)
    flex._unusable_on.cache_clear()
    assert reasons == [
        None,
        "torch.bfloat16 needs compute capability 8.0, not 7.0",
        "torch.float16 needs compute capability 7.0, not 6.1",
        "torch.bfloat16 needs compute capability 8.0, not 6.1",
        *[None] * 4,
    ]
    assert wide is not None
    assert wide.startswith("head_dim 192 needs 163840 bytes of shared memory, not 101376")


def test_a_cpu_is_served_as_before() -> None:
    assert isinstance(choose(problem(Neighborhood.of((8,), (3,)))), (Cpu, Portable))
