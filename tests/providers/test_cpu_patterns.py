"""The CPU provider on any attention pattern: random problems, threads, its tiles and forecast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pattern_problems
import patterns
import provider_checks
import pytest
import torch
from pattern_problems import PatternProblem, isa_way
from problems import error, ones_for, problem_of
from torch import Tensor

from gna_compile import _native
from gna_compile.geometry import (
    AttentionPattern,
    Axis,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Neighborhood,
    Window,
    canonical,
)
from gna_compile.providers import Forward, Gradients, Inputs, OutputGradients, Problem, Provider
from gna_compile.providers.cpu import native_pattern as cpu_patterns
from gna_compile.providers.cpu import tiles as cpu_tiles
from gna_compile.providers.cpu.native_pattern import links_of, native_pattern
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.portable.provider import Portable

PROBLEMS_OF_EACH_ISA = 400


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Results -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", _native.isas())
def test_random_patterns(isa: str) -> None:
    torch.set_num_threads(1)
    for seed in range(PROBLEMS_OF_EACH_ISA):
        pattern_problems.check(seed, "cpu", isa_way(isa))


def test_random_problems_have_what_can_go_wrong() -> None:
    """What is hard for this provider is in at least one problem of two hundred."""
    seen: dict[str, int] = {}
    count = 500
    for seed in range(count):
        pattern = canonical(PatternProblem(seed).pattern)
        (group,) = pattern.head_groups
        links = links_of(pattern)
        windows: dict[int, list[tuple[Axis | None, ...]]] = {}
        for query, key in itertools.product(range(len(pattern.queries)), range(len(pattern.keys))):
            if links[query][key] is Link.WINDOW:
                windows.setdefault(key, []).append(pattern.axes(group, query, key) or ())
        grids = [pattern.keys[key] for key in windows]
        features = {
            "several windows onto one key grid": any(len(axes) > 1 for axes in windows.values()),
            "windows of different dilation onto one key grid": any(
                len({axis.dilation for axis in along if axis is not None}) > 1
                for axes in windows.values()
                for along in zip(*axes, strict=True)
            ),
            "keys that nobody is linked to": any(
                set(column) == {Link.NONE} for column in zip(*links, strict=True)
            ),
            "queries without links": any(set(row) == {Link.NONE} for row in links),
            "boxes of key grids": any(
                isinstance(grid, GridTokens) and not grid.is_whole() for grid in grids
            ),
        }
        for name, has in features.items():
            seen[name] = seen.get(name, 0) + has
    assert min(seen.values()) >= count // 200, str(seen)


FAULTS: dict[str, Any] = {
    "windows that hide nothing": lambda pattern: tuple(
        tuple(Link(min(link, Link.FULL)) for link in row) for row in links_of(pattern)
    ),
    "windows that hide everything": lambda pattern: tuple(
        tuple(Link.NONE if link is Link.WINDOW else link for link in row)
        for row in links_of(pattern)
    ),
    "no links to segments that are not one's own": lambda pattern: tuple(
        tuple(link if query == key else Link.NONE for key, link in enumerate(row))
        for query, row in enumerate(links_of(pattern))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_random_problems_notice_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_patterns, "links_of", FAULTS[fault])
    with pytest.raises(AssertionError):
        for seed in range(100):
            pattern_problems.check(seed, "cpu")


def test_the_command_runs_the_cpu_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert pattern_problems.main(["--provider", "cpu", "--problems", "3", "--seed", "7"]) == 0
    assert capsys.readouterr().err.startswith("3 problems, 0 wrong")


def test_a_pattern_without_keys_gives_zero() -> None:
    provider_checks.check_a_pattern_without_keys_gives_zero(Cpu())


def test_heads_that_see_different_things_are_declined() -> None:
    grid = GridTokens((8,))
    groups = (HeadGroup(1, (Window((3,)),)), HeadGroup(1, (None,)))
    pattern = AttentionPattern((grid,), (grid,), ((Link.WINDOW,),), groups)
    reason = Cpu().supports(problem_of(pattern))
    assert reason == "takes heads that all see the same, one head group at a time"


def large() -> tuple[Problem, Inputs]:
    """A rank's part of a video: tiles of all kinds, and enough work for several threads."""
    asked = problem_of(patterns.rank_of_a_video(4, 12, text=70), kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    ones = ones_for(asked)
    query, key, value = (torch.randn(x.shape, generator=generator) for x in ones[:3])
    assert ones.key_mask is not None
    shown = torch.rand(ones.key_mask.shape, generator=generator) < 0.7
    return asked, Inputs(query, key, value, shown, 0.3)


def everything(provider: Provider, asked: Problem, inputs: Inputs) -> list[Tensor]:
    """Output, logsumexp and all gradients, logsumexp's own gradient included."""
    query = inputs.query
    results = Forward(torch.empty_like(query), query.new_empty(query.shape[:3]))
    provider.forward(asked, inputs, results)
    given = OutputGradients(query.cos(), query[..., 0].sin())
    gradients = Gradients(*map(torch.empty_like, inputs[:3]))
    provider.backward(asked, inputs, results, given, gradients)
    return [*results, *gradients]


@pytest.mark.parametrize("isa", _native.isas())
def test_a_large_pattern_agrees_with_the_portable_provider(isa: str) -> None:
    asked, inputs = large()
    pairs = zip(
        everything(Cpu(isa), asked, inputs), everything(Portable(), asked, inputs), strict=True
    )
    for actual, expected in pairs:
        assert error(actual, expected.double()) < 3e-5


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("isa", _native.isas())
def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    asked, inputs = large()
    torch.set_num_threads(1)
    expected = everything(Cpu(isa), asked, inputs)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert all(map(torch.equal, everything(Cpu(isa), asked, inputs), expected)), count


# Tiles, the forecast -----------------------------------------------------------------------------


def test_streamed_counts_are_the_geometry() -> None:
    """Along one axis: boxes of a box's dilation groups, against what is at hand of the other grid."""
    for length, window, stride, dilation, causal in (
        (21, 5, 3, 1, False),
        (20, 6, 2, 3, False),
        (19, 4, 4, 2, True),
    ):
        axis = Axis(length, window, stride, dilation, causal)
        for lanes, at_hand in itertools.product((range(length), range(4, 15)), repeat=2):
            for log2_box, of_keys in itertools.product(range(5), (False, True)):
                boxes, streamed = 0, 0
                for first in lanes[:dilation]:
                    positions = [
                        token // dilation for token in lanes[first - lanes.start :: dilation]
                    ]
                    group = first % dilation
                    for start in range(0, len(positions), 2**log2_box):
                        box = positions[start : start + 2**log2_box]
                        see = axis.group(group).seen_by if of_keys else axis.group(group).union
                        tokens = [group + dilation * at for at in see(range(box[0], box[-1] + 1))]
                        boxes += 1
                        streamed += len(set(tokens) & set(at_hand))
                sides = (
                    GridTokens((length,), (lanes.start,), (lanes.stop,)),
                    GridTokens((length,), (at_hand.start,), (at_hand.stop,)),
                )
                queries, keys = sides[::-1] if of_keys else sides
                pattern = AttentionPattern(
                    (queries,),
                    (keys,),
                    ((Link.WINDOW,),),
                    (HeadGroup(1, (Window.of_axes([axis]),)),),
                    partial=True,
                )
                found = native_pattern(pattern).streamed(of_keys, 0, 0, log2_box)
                assert found == (boxes, [streamed])


def test_tiles_hold_all_pairs() -> None:
    for seed in range(300):
        pattern = patterns.draw(seed)
        pattern = pattern.of_group(HeadGroup(1, pattern.head_groups[0].windows))
        assert cpu_tiles.pairs(pattern) >= pattern.pairs


def test_segments_without_a_window_cost_their_tiles() -> None:
    links = ((Link.FULL, Link.NONE, Link.FULL),)
    keys = (GlobalTokens(100),) * 3
    pattern = AttentionPattern((GlobalTokens(150),), keys, links, (HeadGroup(1, ()),))
    # Two tiles of 64 lanes, and one of 32 for the other 22 queries.
    assert cpu_tiles.pairs(pattern) == (128 + 32) * 200
    cost = (128 + 32 * cpu_tiles._PAIR_COST[5]) * (200 + cpu_tiles._TILE)
    assert cpu_tiles.predicted_speedup(pattern) == pytest.approx(150 * 300 / cost)


def test_segments_that_see_the_same_share_tiles() -> None:
    neighborhood = Neighborhood.of((16, 16), (16, 1), prefix=10, suffix=6)
    pattern = AttentionPattern.of_neighborhood(neighborhood, 1)
    # The global tokens fill one tile of 16 lanes; each column is one of 16 lanes.
    assert cpu_tiles.pairs(pattern) == 16 * 272 + 16 * 16 * (16 + 16)


def test_a_halo_makes_the_forecast_that_of_the_ranks_own_tiles() -> None:
    whole = AttentionPattern.of_neighborhood(Neighborhood.of((48, 64), (7, 13)), 4)
    queries = GridTokens((48, 64), (16, 0), (32, 64))
    keys = GridTokens((48, 64), (13, 0), (35, 64))
    part = AttentionPattern((queries,), (keys,), ((Link.WINDOW,),), whole.head_groups)
    # Fewer keys at hand, so that dense attention is cheaper by as much.
    speedup = cpu_tiles.predicted_speedup(part)
    assert speedup == pytest.approx(cpu_tiles.predicted_speedup(whole) * 22 / 48, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_the_forecast_does_not_depend_on_how_a_pattern_is_written(seed: int) -> None:
    neighborhood = Neighborhood.of((40, 40), (9, 9), (1, 4), prefix=20, suffix=9)
    pattern = AttentionPattern.of_neighborhood(neighborhood, 1)
    split = patterns.split(pattern, seed)
    assert len(split.queries) > len(pattern.queries)
    assert cpu_tiles.predicted_speedup(split) == cpu_tiles.predicted_speedup(pattern)
