"""The flex provider without a GPU: its tile order, lists and mask, and what it asks FlexAttention for.

FlexAttention's own reference stands in for its kernels. It follows the mask and not the lists, so
the lists are tested apart. What runs on a GPU is at the end, and in `test_cuda.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import flex_problems
import oracle
import pattern_oracle
import patterns
import provider_checks
import pytest
import torch
from flex_problems import Setting, Worst, check_pattern, check_random_pattern, check_random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_model import masked
from problems import Watch, axes, problem
from small_net import GRID, Net, image, policy
from torch import Tensor
from torch._inductor import compile_fx as inductor

from gna_compile import ops, providers
from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Neighborhood,
    Segment,
    Window,
    canonical,
    default_links,
)
from gna_compile.providers import Problem, choose
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.flex import columns, lists, steps, tiles
from gna_compile.providers.flex import provider as flex
from gna_compile.providers.flex.columns import Links
from gna_compile.providers.flex.cuts import AxisCut, reach
from gna_compile.providers.flex.lists import TileLists, tile_lists
from gna_compile.providers.flex.provider import Flex
from gna_compile.providers.flex.tiles import TILE, Layout, lay_out
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


def of(neighborhood: Neighborhood) -> AttentionPattern:
    return AttentionPattern.of_neighborhood(neighborhood, 1)


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    rank = draw(st.integers(1, 3))
    longest = {1: 600, 2: 30, 3: 10}[rank]
    parts = tuple(draw(axes(longest)) for _ in range(rank))
    prefix, suffix = (draw(st.sampled_from([0, 0, 3, 100, 128])) for _ in range(2))
    return Neighborhood(parts, prefix, suffix)


def dense(listed: TileLists, width: int) -> tuple[Tensor, Tensor]:
    """Which tiles are listed, bool [tiles, width] for those with and those without a mask."""
    tables = []
    for counts, indices in (
        (listed.masked_counts, listed.masked),
        (listed.whole_counts, listed.whole),
    ):
        table = torch.zeros(len(counts), width, dtype=torch.bool)
        for row, (count, entries) in enumerate(zip(counts, indices, strict=True)):
            seen = entries[:count].tolist()
            assert seen == sorted(set(seen))
            table[row, seen] = True
        tables.append(table)
    assert listed.masked.shape == listed.whole.shape
    return tables[0], tables[1]


def visible_rows(
    pattern: AttentionPattern, layout: Layout, key_mask: Tensor | None, batch: int = 0
) -> Tensor:
    """What the mask makes visible in tile order, bool [query rows, key rows]."""
    mask, tables = flex._tables(pattern, key_mask is not None, torch.device("cpu"))
    reader = steps.Tiles(mask, [*tables, *([] if key_mask is None else [key_mask])])
    queries, keys = (torch.arange(len(x.order)) for x in (layout.queries, layout.keys))
    seen = reader.visible(
        torch.tensor(batch), torch.tensor(0), queries[:, None], keys[None], *reader.buffers
    )
    return seen.expand(len(queries), len(keys))


def check_layout(
    pattern: AttentionPattern, visible: Tensor, key_mask: Tensor | None, batch: int = 0
) -> Layout:
    """The mask alone, and the lists with it, make visible what they should, and nothing else."""
    layout = lay_out(pattern, key_mask is not None)
    queries, keys = layout.queries, layout.keys
    for rows in (queries, keys):
        count = len(rows.rows)
        assert torch.equal(rows.order[rows.rows], torch.arange(count, dtype=torch.int32))
        assert (rows.order >= 0).sum() == count and len(rows.order) % TILE == 0
    seen = visible_rows(pattern, layout, key_mask, batch)
    listed = dense(layout.key_tiles, len(keys.order) // TILE)
    for ours, theirs in zip(
        listed, dense(layout.query_tiles, len(queries.order) // TILE), strict=True
    ):
        assert torch.equal(ours, theirs.T)
    masked, whole = (x.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1) for x in listed)
    assert not (masked & whole).any()
    for rows_seen in (seen, (masked & seen) | whole):
        assert torch.equal(rows_seen[queries.rows][:, keys.rows], visible)
        assert not rows_seen[:, keys.order < 0].any()
    return layout


@given(neighborhoods(), st.booleans())
@settings(max_examples=60)
def test_lists_and_mask_are_the_geometry(neighborhood: Neighborhood, hides_keys: bool) -> None:
    count = neighborhood.global_tokens
    key_mask = (torch.arange(count) % 3 > 0)[None] if hides_keys and count else None
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
    layout = check_layout(of(neighborhood), expected, key_mask)
    # As cheap as one grid's mask can be: no links between parts, no column that hides nothing.
    assert not isinstance(layout.links, Links)
    assert len(layout.columns) <= sum(not axis.is_full for axis in parts)
    assert layout.keys is layout.queries or not layout.columns


def random_pattern(rng: random.Random) -> AttentionPattern:
    """One head; canonical or not; some with tiles full of global tokens."""
    longest, most = rng.choice([(5, 60), (7, 200), (12, 500), (25, 700)])
    pattern = patterns.draw(rng.getrandbits(40), longest, most)
    pattern = pattern.of_group(replace(rng.choice(pattern.head_groups), heads=1))
    if most == 60 and rng.random() < 0.5:

        def larger(segment: Segment) -> Segment:
            is_global = isinstance(segment, GlobalTokens)
            return GlobalTokens(40 * segment.tokens) if is_global else segment

        queries, keys = (tuple(map(larger, x)) for x in (pattern.queries, pattern.keys))
        pattern = replace(pattern, queries=queries, keys=keys)
    return canonical(pattern) if rng.random() < 0.5 else pattern


def check_random_layout(seed: int) -> None:
    rng = random.Random(seed)
    pattern = random_pattern(rng)
    visible = pattern_oracle.visible(pattern)[0]
    key_mask = None
    batch = rng.randrange(2)
    if pattern.global_keys and rng.random() < 0.4:
        chosen = [[rng.random() < 0.6 for _ in range(pattern.global_keys)] for _ in range(2)]
        key_mask = torch.tensor(chosen)
        visible[:, pattern_oracle.global_keys(pattern)] &= key_mask[batch]
    check_layout(pattern, visible, key_mask, batch)


@pytest.mark.parametrize("block", range(4))
def test_lists_and_mask_of_any_pattern(block: int) -> None:
    for seed in range(150 * block, 150 * (block + 1)):
        check_random_layout(seed)
    flex._tables.cache_clear()


FAULTS: dict[str, tuple[object, str, Any]] = {
    "no links": (columns, "_unlimited_parts", lambda sights, names: frozenset()),
    "no masks": (
        lists,
        "reach",
        lambda *cuts: replace(r := reach(*cuts), full_first=r.first, full_stop=r.stop),
    ),
    "no last tile": (
        lists,
        "reach",
        lambda *cuts: replace(r := reach(*cuts), stop=(r.stop - 1).maximum(r.first)),
    ),
    "hidden keys in full blocks": (
        tiles,
        "tile_lists",
        lambda queries, keys, sights, _: tile_lists(queries, keys, sights, False),
    ),
    "boxes that start with the grid": (
        AxisCut,
        "positions",
        lambda cut, dilation: (
            replace(cut, box=range(len(cut.box)), length=len(cut.box)).coordinates
        ),
    ),
    "one dilation": (
        columns,
        "_names",
        lambda sight: [(n, 1) for n, axis in enumerate(sight or ()) if axis is not None],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_random_layouts_notice_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    flex._tables.cache_clear()
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        for seed in range(300):
            check_random_layout(seed)
    flex._tables.cache_clear()


def test_full_blocks_need_no_mask() -> None:
    layout = lay_out(of(Neighborhood.of((8, 32, 32), (4, 16, 16), (4, 16, 16))))
    assert layout.key_tiles.masked_counts.sum() == 0
    assert layout.key_tiles.whole_counts.tolist() == [8] * 64
    assert layout.query_tiles.masked_counts.sum() == 0


def test_tables_are_small() -> None:
    neighborhood = Neighborhood.of((128, 128), (13, 13))
    with Watch() as watch:
        layout = lay_out(of(neighborhood))
    assert watch.largest < 4 * neighborhood.tokens
    tables = [layout.key_tiles, layout.query_tiles]
    # Boxes of 8 x 16 or 16 x 8.
    assert all(x.shape == (128, 16) for t in tables for x in (t.masked, t.whole))


WINDOW = HeadGroup(1, (Window((3, 5, 5)),))


def test_a_rank_of_a_grid_has_the_mask_of_one_grid() -> None:
    grid, text = (12, 16, 16), GlobalTokens(100)
    mine, halo = (
        GridTokens(grid, (first, 0, 0), (stop, 16, 16)) for first, stop in ((4, 8), (3, 9))
    )
    links = ((Link.FULL, Link.FULL), (Link.FULL, Link.WINDOW))
    pattern = AttentionPattern((text, mine), (text, halo), links, (WINDOW,), partial=True)
    layout = lay_out(pattern)
    assert not isinstance(layout.links, Links) and len(layout.columns) == 3
    # Text, then the rank's own tokens and those of its halo, without a tile of padding.
    assert [len(x.order) // TILE for x in (layout.queries, layout.keys)] == [1 + 8, 1 + 12]


def test_an_image_is_aligned_with_a_video() -> None:
    video, image = GridTokens((3, 16, 16)), GridTokens((1, 16, 16))
    segments = (video, image)
    links = default_links(segments, between_grids=Link.WINDOW)
    group = HeadGroup(1, (Window((2, 5, 5)), Window((1, 7, 7))))
    pattern = AttentionPattern(segments, segments, links, (group,))
    layout = check_layout(pattern, pattern_oracle.visible(pattern)[0], None)
    assert isinstance(layout.links, Links) and len(layout.columns) == 3
    # Neither is padded. A tile of the video sees two of its three frames, and the image.
    assert len(layout.queries.order) == len(layout.keys.order) == 4 * 256
    listed = layout.key_tiles.masked_counts + layout.key_tiles.whole_counts
    assert listed.tolist() == [6] * 6 + [8] * 2


def test_keys_may_be_seen_under_several_dilations() -> None:
    grid = GridTokens((30, 24))
    windows = (Window((4, 5), dilation=(2, 1)), Window((5, 3), dilation=(3, 2)))
    links = ((Link.WINDOW,), (Link.WINDOW,))
    pattern = AttentionPattern((grid, grid), (grid,), links, (HeadGroup(1, windows),))
    layout = check_layout(pattern, pattern_oracle.visible(pattern)[0], None)
    # Axis 0 under dilation 2 and 3, axis 1 under 1 and 2.
    assert len(layout.columns) == 4


def test_packed_images_see_their_own_tiles() -> None:
    segments = (GridTokens((16, 16)), GlobalTokens(128)) * 3
    links = default_links(segments, documents=(0, 0, 1, 1, 2, 2))
    group = HeadGroup(1, (Window((5, 5)),) * 3)
    pattern = AttentionPattern(segments, segments, links, (group,))
    layout = check_layout(pattern, pattern_oracle.visible(pattern)[0], None)
    listed = layout.key_tiles.masked_counts + layout.key_tiles.whole_counts
    assert listed.tolist() == [3] * 9
    # Three texts, whose keys are all seen, and which see all: full blocks.
    assert layout.key_tiles.whole_counts.tolist() == [3] * 3 + [1] * 6


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
@pytest.mark.parametrize("seed", range(60))
def test_random_patterns(seed: int) -> None:
    check_random_pattern(seed, "cpu", torch.float32, *[(7, 120), (20, 300)][seed % 2], 2e-5)


@reference
def test_problems_of_a_family_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "lay_out", flex_problems.padded)
    for number, family in enumerate(flex_problems.families(7, seeds=300)):
        setting = family_setting(number, torch.float32)
        flex._kernel.cache_clear()
        for seed, pattern in enumerate(family[:2]):
            check_pattern(pattern, setting, seed, "cpu", 2e-5, Worst())
        assert flex._kernel.cache_info().misses == 2
    flex._tables.cache_clear()


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
@pytest.mark.parametrize("seed", [0, 3, 4, 7])
def test_inductor_takes_any_pattern(seed: int) -> None:
    check_random_pattern(seed, "cpu", torch.float32, 7, 120, 2e-5)


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
    segments = (GlobalTokens(3), GridTokens((8,)), GridTokens((4, 5)))
    group = HeadGroup(2, (Window((3,)), None))
    general = AttentionPattern(segments, segments, default_links(segments), (group,))
    assert declines(problem(neighborhood, head_dim=96, pattern=general)) is None
    assert declines(problem(neighborhood)) == "head_dim 8 is not between 16 and 256"
    keyless = AttentionPattern(
        (GlobalTokens(3),), (GlobalTokens(0),), ((Link.FULL,),), (HeadGroup(2, ()),)
    )
    assert declines(problem(neighborhood, pattern=keyless)) == "takes at least one key"
    grids = (GridTokens((62,)),) * 31
    for count, reason in (
        (30, None),
        (31, "takes at most 30 different pairs of an axis and its dilation"),
    ):
        links = default_links(grids[:count])
        group = HeadGroup(2, tuple(Window((2,), (1,), (1 + n,)) for n in range(count)))
        many = AttentionPattern(grids[:count], grids[:count], links, (group,))
        assert declines(problem(neighborhood, head_dim=16, pattern=many)) == reason
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


# On a GPU ----------------------------------------------------------------------------------------

_REASON = flex.unusable(torch.bfloat16, 128)
needs_flex = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def family_setting(number: int, dtype: torch.dtype) -> Setting:
    """Not drawn, so that all problems of a family share a kernel."""
    return Setting(
        dtype=dtype,
        batch=2,
        shared=1 + number % 2,
        head_dim=(16, 64, 128)[number % 3],
        scale=(0.3, 0.1, -0.2)[number % 3],
        is_masked=number % 2 == 0,
        with_logsumexp=number % 3 > 0,
        transposed=number % 4 > 1,
    )


@needs_flex
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("number", range(7))
def test_a_family_of_patterns_on_a_gpu(
    number: int, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward and one backward kernel for at most 48 patterns."""
    monkeypatch.setattr(flex, "lay_out", flex_problems.padded)
    flex._tables.cache_clear()
    dtype = list(TOLERANCE)[(number + half) % 3]
    setting, worst = family_setting(number + 3 * half, dtype), Worst()
    before = flex._kernel.cache_info().misses
    for seed, pattern in enumerate(flex_problems.families(7)[number][half::2][:48]):
        check_pattern(pattern, setting, seed, "cuda", TOLERANCE[dtype], worst)
    flex._tables.cache_clear()
    print(f"family {number}, {dtype}: {worst}")
    assert worst.problems >= 15 and flex._kernel.cache_info().misses - before <= 2


@needs_flex
@pytest.mark.parametrize("seed", [31, 55, 60, 90, 98, 129])
def test_random_patterns_on_a_gpu(seed: int) -> None:
    """Some with windows, laid out as they are, each compiled anew."""
    dtype = list(TOLERANCE)[seed % 3]
    check_random_pattern(seed, "cuda", dtype, 25, 700, TOLERANCE[dtype], one_group=True)
