"""The CUDA kernel's launches for patterns of several grids, played in float64 by what each one writes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import oracle
import pattern_oracle
import patterns
import pytest
import torch
from kernel_problems import TOLERANCE, deviation
from torch import Tensor

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
    encode,
)
from gna_compile.planner import ARCHITECTURES, dense_plan, plan
from gna_compile.planner.architectures import SM90
from gna_compile.providers import Problem
from gna_compile.providers.cuda.launches import NO_LAUNCHES, Launch, key_masks, launches_of
from gna_compile.providers.cuda.library import library
from gna_compile.providers.cuda.provider import (
    NativeCuda,
    current_capability,
    forecast,
    workloads_of,
)

TEXT, IMAGE, WINDOW = GlobalTokens(5), GridTokens((4, 6)), Window((2, 3))


def of(segments: tuple[Segment, ...], *windows: Window | None, heads: int = 2) -> AttentionPattern:
    """All links full, but for a window from each grid to itself."""
    return AttentionPattern(
        segments, segments, default_links(segments), (HeadGroup(heads, windows),)
    )


def draw(seed: int, longest: tuple[int, int, int] = (20, 6, 3), text: int = 9) -> AttentionPattern:
    """Text and grids in any order, some grids full, some equal.

    Args:
        seed: of what is random.
        longest: axis of a grid of one, two and three axes.
        text: the most tokens of a segment off the grids.
    """
    rng = random.Random(seed)
    segments: list[Segment] = []
    windows: list[Window | None] = []
    while not windows or rng.random() < 0.7:
        if rng.random() < 0.6:
            segments.append(GlobalTokens(rng.randint(0, text)))
        if windows and rng.random() < 0.3:
            segments.append(next(s for s in segments if isinstance(s, GridTokens)))
            windows.append(windows[0])
            continue
        rank = rng.randint(1, 3)
        grid = GridTokens(tuple(rng.randint(1, longest[rank - 1]) for _ in range(rank)))
        segments.append(grid)
        windows.append(
            None if rng.random() < 0.25 else patterns._window(rng, grid.grid, rng.random() / 2)
        )
    if rng.random() < 0.5:
        segments.append(GlobalTokens(rng.randint(0, text)))
    return of(tuple(segments), *windows, heads=1)


def written(launch: Launch, tile: int) -> Tensor:
    """Bool [tokens]: the rows that a launch writes, in whole tiles of its global queries."""
    neighborhood = launch.neighborhood
    rows = torch.zeros(neighborhood.global_tokens, dtype=torch.bool)
    rows[launch.global_queries.start : launch.global_queries.stop] = True
    prefix, suffix = rows.split([neighborhood.prefix, neighborhood.suffix])
    for run in (*prefix.split(tile), *suffix.split(tile)):
        run.fill_(bool(run.any()))
    return torch.cat([prefix, torch.ones(neighborhood.grid_tokens, dtype=torch.bool), suffix])


def played(
    pattern: AttentionPattern,
    launches: tuple[Launch, ...],
    inputs: list[Tensor],
    key_mask: Tensor | None,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, as the launches write them one after the other."""
    output = torch.full_like(inputs[0], torch.nan)
    logsumexp = output[..., 0].clone()
    masks = key_masks(pattern, launches, key_mask)
    for launch, mask in zip(launches, masks, strict=True):
        neighborhood = launch.neighborhood
        axes = neighborhood.axes
        around = {"prefix": neighborhood.prefix, "suffix": neighborhood.suffix}
        visible = oracle.mask(
            neighborhood.grid,
            [axis.window for axis in axes],
            [axis.stride for axis in axes],
            [axis.dilation for axis in axes],
            [axis.causal for axis in axes],
            **around,
        )
        results = oracle.attention(
            *inputs, visible=visible, key_mask=mask, prefix=neighborhood.prefix
        )
        rows = written(launch, tile)
        output[:, :, rows], logsumexp[:, :, rows] = (x[:, :, rows] for x in results)
    return output, logsumexp


def check(pattern: AttentionPattern, launches: tuple[Launch, ...], seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.choice([1, 2])

    def tensor() -> Tensor:
        sizes = batch, pattern.heads, pattern.key_tokens, 4
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    inputs = [tensor() for _ in range(3)]
    is_maskable = launches[0].neighborhood.global_tokens >= pattern.global_keys
    key_mask = None
    if is_maskable and rng.random() < 0.6:
        key_mask = torch.rand((batch, pattern.global_keys), generator=generator) < 0.6
    actual = played(pattern, launches, inputs, key_mask, rng.choice([1, 4, 16, 128]))
    expected = pattern_oracle.attention(*inputs, pattern=pattern, key_mask=key_mask)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("block", range(8))
def test_launches_write_what_the_pattern_asks_for(block: int) -> None:
    for seed in range(60 * block, 60 * block + 60):
        pattern = draw(seed)
        pattern = [pattern, canonical(pattern), patterns.split(pattern, seed)][seed % 3]
        launches = launches_of(pattern)
        assert launches is not None
        check(pattern, launches, seed)
        assert all(not launch.global_queries for launch in launches[1:])


@pytest.mark.parametrize("block", range(4))
def test_any_pattern_that_has_launches_is_right(block: int) -> None:
    found = 0
    for seed in range(500 * block, 500 * block + 500):
        pattern = patterns.draw(seed, longest=5, most_tokens=50)
        pattern = pattern.of_group(next(group for group in pattern.head_groups if group.heads))
        pattern = canonical(pattern) if seed % 2 else pattern
        launches = launches_of(pattern)
        if launches is not None:
            check(pattern, launches, seed)
            found += 1
        assert launches is not None or pattern.neighborhood is None
    assert found > 20


def test_one_grid_is_one_launch() -> None:
    neighborhood = Neighborhood.of((4, 6), (2, 3), prefix=5, suffix=7)
    pattern = AttentionPattern.of_neighborhood(neighborhood, 2)
    assert launches_of(pattern) == (Launch(neighborhood, range(12)),)


@pytest.mark.parametrize("form", [lambda pattern: pattern, canonical])
def test_text_and_two_images_are_two_launches(form: Any) -> None:
    """With the fewest rows of global tokens: here those of the text, wherever it lies."""
    axes, (image, text) = WINDOW.axes(IMAGE.grid), (IMAGE.tokens, TEXT.tokens)
    first, second = (
        Neighborhood(axes, text, image),
        Neighborhood(axes, text + image),
    )
    before = form(of((TEXT, IMAGE, IMAGE), WINDOW, WINDOW))
    assert launches_of(before) == (Launch(first, range(5)), Launch(second, range(0)))
    between = form(of((IMAGE, TEXT, IMAGE), WINDOW, WINDOW))
    assert launches_of(between) == (
        Launch(Neighborhood(axes, 0, text + image), range(5)),
        Launch(Neighborhood(axes, image + text, 0), range(0)),
    )
    assert launches_of(form(of((IMAGE, IMAGE), WINDOW, WINDOW))) == (
        Launch(Neighborhood(axes, 0, image), range(0)),
        Launch(Neighborhood(axes, image, 0), range(0)),
    )


def test_the_first_launch_is_that_which_computes_the_fewest_rows() -> None:
    """Text around a large grid, and around a small one: the small one's rows are computed twice."""
    large = GridTokens((9, 9))
    launches = launches_of(of((TEXT, IMAGE, TEXT, large, TEXT), WINDOW, WINDOW))
    assert launches is not None
    assert launches[0].neighborhood.grid == large.grid
    assert launches[0].global_queries == range(IMAGE.tokens + 3 * TEXT.tokens)


def other_kinds() -> Iterator[AttentionPattern]:
    pattern = of((TEXT, IMAGE, IMAGE), WINDOW, WINDOW)
    (group,) = pattern.head_groups
    links = [list(row) for row in pattern.links]

    def linked(query: int, key: int, link: Link) -> AttentionPattern:
        changed = [[*row] for row in links]
        changed[query][key] = link
        return replace(pattern, links=tuple(map(tuple, changed)))

    yield linked(1, 2, Link.WINDOW)
    yield linked(1, 2, Link.NONE)
    yield linked(0, 1, Link.NONE)
    yield replace(pattern, partial=True)
    yield replace(pattern, head_groups=(group, HeadGroup(1, (None, WINDOW))))
    elsewhere = ((Link.FULL,) * 3, (Link.WINDOW, Link.FULL, Link.FULL), pattern.links[2])
    yield replace(pattern, keys=(IMAGE, TEXT, IMAGE), links=elsewhere)
    yield replace(pattern, keys=(*pattern.keys, TEXT), links=tuple((*r, Link.FULL) for r in links))


@pytest.mark.parametrize("pattern", list(other_kinds()))
def test_other_patterns_have_none(pattern: AttentionPattern) -> None:
    assert launches_of(pattern) is None
    if len(pattern.head_groups) == 1:
        assert NativeCuda(SM90).declines(problem(pattern)) == NO_LAUNCHES


def problem(pattern: AttentionPattern, **changes: Any) -> Problem:
    tokens = pattern.query_tokens
    strides = (pattern.heads * tokens * 64, tokens * 64, 64, 1)
    made = Problem(
        "cuda", torch.bfloat16, 1, pattern.heads, pattern.heads, 64, pattern, False, *[strides] * 3
    )
    return replace(made, **changes)


def test_the_provider_takes_several_grids() -> None:
    provider = NativeCuda(SM90)
    pattern = of((TEXT, IMAGE, IMAGE), WINDOW, WINDOW)
    for form in (pattern, canonical(pattern)):
        for has_key_mask in (False, True):
            assert provider.declines(problem(form, has_key_mask=has_key_mask)) is None
    dilated = of((TEXT, IMAGE, GridTokens((400,))), WINDOW, Window((4,), dilation=(16,)))
    assert "dilation" in (provider.declines(problem(dilated)) or "")
    full = of((TEXT, IMAGE, IMAGE), None, None)
    assert provider.declines(problem(full)) is None
    assert provider.declines(problem(full, has_key_mask=True)) == NO_LAUNCHES


def test_the_forecast_adds_up_the_launches() -> None:
    image = GridTokens((64, 64))
    window = Window((24, 24), (8, 8))
    asked = problem(of((GlobalTokens(512), image, image), window, window, heads=24))
    plans = [plan(workload) for workload in workloads_of(asked)]
    assert [cut.globals.query_tiles for cut in plans] == [4, 0]
    dense = dense_plan(plans[0].workload).milliseconds
    found = forecast(asked, "sm90").speedup
    assert found is not None
    assert found == dense / (plans[0].milliseconds + plans[1].milliseconds)
    assert 1 < found < 1 / asked.pattern.flop_share


# On a GPU ----------------------------------------------------------------------------------------

NATIVE = [
    name
    for name, architecture in ARCHITECTURES.items()
    if library(name) is not None and current_capability() in architecture.capabilities
]
needs_kernel = pytest.mark.skipif(not NATIVE, reason="needs a GPU that a CUDA kernel runs on")
FORWARD = torch.ops.gna.attention.v2


def visible_on_gpu(pattern: AttentionPattern) -> Tensor:
    """Bool [1, tokens, tokens], of a pattern as `of` makes it."""
    seen = torch.ones(pattern.query_tokens, pattern.key_tokens, dtype=torch.bool)
    windows = iter(pattern.head_groups[0].windows)
    start = 0
    for segment in pattern.queries:
        stop = start + segment.tokens
        window = next(windows) if isinstance(segment, GridTokens) else None
        if window is not None:
            assert isinstance(segment, GridTokens)
            seen[start:stop, start:stop] = oracle.mask(
                segment.grid, window.window, window.stride, window.dilation, window.causal
            )
        start = stop
    return seen.cuda()[None]


class OnGpu:
    """A pattern with inputs for it, of several hundred tokens a grid."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.pattern = draw(seed, longest=(700, 28, 9), text=300)
        self.kv_heads = rng.choice([1, 2])
        (group,) = self.pattern.head_groups
        heads = self.kv_heads * rng.choice([1, 2, 3])
        self.pattern = self.pattern.of_group(replace(group, heads=heads))
        self.dtype = rng.choice(list(TOLERANCE))
        self.batch, self.head_dim = rng.choice([1, 2]), rng.choice([64, 128, 40])
        self.is_transposed = rng.random() < 0.5
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.query = self.tensor(heads)
        self.key, self.value = self.tensor(self.kv_heads), self.tensor(self.kv_heads)
        self.key_mask = None
        # A mask takes a grid with a window, and canonical patterns have no window that hides nothing.
        links = canonical(self.pattern).links
        if any(Link.WINDOW in row for row in links) and rng.random() < 0.5:
            sizes = self.batch, self.pattern.global_keys
            self.key_mask = torch.rand(sizes, generator=self.generator, device="cuda") < 0.6

    def tensor(self, heads: int) -> Tensor:
        tokens = self.pattern.key_tokens
        outer = (tokens, heads) if self.is_transposed else (heads, tokens)
        sizes = self.batch, *outer, self.head_dim
        made = torch.randn(sizes, generator=self.generator, device="cuda").to(self.dtype)
        return made.transpose(1, 2) if self.is_transposed else made

    def run(self) -> tuple[Tensor, Tensor]:
        ints, order = encode(self.pattern), [0, 1, 2, 3]
        inputs = self.query, self.key, self.value
        results: tuple[Tensor, Tensor] = FORWARD(
            *inputs, ints, self.key_mask, 0.2, order, NATIVE[0]
        )
        return results

    def check(self, output: Tensor, logsumexp: Tensor) -> None:
        expected = pattern_oracle.attention(
            self.query,
            self.key,
            self.value.nan_to_num(0),
            pattern=self.pattern,
            key_mask=self.key_mask,
            scale=0.2,
            seen=visible_on_gpu(self.pattern).expand(self.pattern.heads, -1, -1),
        )
        of_output, of_logsumexp = TOLERANCE[self.dtype]
        assert deviation(output, expected[0]) < of_output, self.pattern
        finite = expected[1].isfinite()
        assert torch.equal(finite, logsumexp.isfinite()), self.pattern
        errors = (logsumexp - expected[1])[finite].abs()
        assert float(errors.max()) < of_logsumexp, self.pattern


@needs_kernel
@pytest.mark.parametrize("block", range(8))
def test_several_grids_on_a_gpu(block: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        for seed in range(12 * block, 12 * block + 12):
            problem = OnGpu(seed)
            try:
                results = problem.run()
            except RuntimeError as error:  # the one thing that not every launch takes
                if "can be read with dilation" not in str(error):
                    raise
            else:
                problem.check(*results)
    finally:
        torch.use_deterministic_algorithms(False)


def with_mask(seed: int) -> OnGpu:
    """The first problem from a seed on that has a key mask which hides something."""
    while True:
        problem = OnGpu(seed)
        if problem.key_mask is not None and not problem.key_mask.all():
            return problem
        seed += 1


@needs_kernel
@pytest.mark.parametrize("seed", [200, 300, 400])
def test_hidden_keys_of_several_grids_may_hold_anything(seed: int) -> None:
    """Each launch then runs its fallback."""
    problem = with_mask(seed)
    assert problem.key_mask is not None
    tokens = torch.tensor(pattern_oracle.global_keys(problem.pattern), device="cuda")
    for batch, shown in enumerate(problem.key_mask):
        problem.value[batch, :, tokens[~shown]] = torch.nan
    problem.check(*problem.run())


@needs_kernel
def test_several_grids_in_a_cuda_graph() -> None:
    problem = with_mask(500)
    assert problem.key_mask is not None
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.run()
    for x in (problem.query, problem.key, problem.value):
        x.normal_()
    problem.key_mask.logical_not_()
    graph.replay()
    problem.check(*results)


@needs_kernel
def test_gradients_of_several_grids() -> None:
    pattern = of((GlobalTokens(40), GridTokens((16, 20)), GridTokens((12, 12))), WINDOW, WINDOW)
    inputs = [
        torch.randn(1, 2, pattern.key_tokens, 64, device="cuda").bfloat16().requires_grad_()
        for _ in range(3)
    ]
    output, _ = FORWARD(*inputs, encode(pattern), None, 0.125, [0, 1, 2, 3], NATIVE[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    seen = visible_on_gpu(pattern).expand(2, -1, -1)
    expected, _ = pattern_oracle.attention(*exact, pattern=pattern, scale=0.125, seen=seen)
    given = torch.randn_like(expected)
    actual = torch.autograd.grad(output, inputs, given.to(output.dtype))
    for gradient, right in zip(actual, torch.autograd.grad(expected, exact, given), strict=True):
        assert deviation(gradient, right) < 2e-2
