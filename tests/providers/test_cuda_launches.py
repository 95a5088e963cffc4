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
)
from gna_compile.planner import dense_plan, plan
from gna_compile.planner.architectures import SM90
from gna_compile.providers import Problem
from gna_compile.providers.cuda.launches import NO_LAUNCHES, Launch, key_masks, launches_of
from gna_compile.providers.cuda.provider import NativeCuda, forecast, workloads_of

TEXT, IMAGE, WINDOW = GlobalTokens(5), GridTokens((4, 6)), Window((2, 3))


def of(segments: tuple[Segment, ...], *windows: Window | None, heads: int = 2) -> AttentionPattern:
    """All links full, but for a window from each grid to itself."""
    return AttentionPattern(
        segments, segments, default_links(segments), (HeadGroup(heads, windows),)
    )


def draw(seed: int) -> AttentionPattern:
    """Text and grids in any order, some grids full, some equal; in one of the forms it can have."""
    rng = random.Random(seed)
    segments: list[Segment] = []
    windows: list[Window | None] = []
    while not windows or rng.random() < 0.7:
        if rng.random() < 0.6:
            segments.append(GlobalTokens(rng.randint(0, 9)))
        if windows and rng.random() < 0.3:
            segments.append(next(s for s in segments if isinstance(s, GridTokens)))
            windows.append(windows[0])
            continue
        rank = rng.randint(1, 3)
        grid = GridTokens(tuple(rng.randint(1, {1: 20, 2: 6, 3: 3}[rank]) for _ in range(rank)))
        segments.append(grid)
        windows.append(
            None if rng.random() < 0.25 else patterns._window(rng, grid.grid, rng.random() / 2)
        )
    if rng.random() < 0.5:
        segments.append(GlobalTokens(rng.randint(0, 9)))
    pattern = of(tuple(segments), *windows, heads=1)
    form = rng.randrange(3)
    return [pattern, canonical(pattern), patterns.split(pattern, seed)][form]


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
