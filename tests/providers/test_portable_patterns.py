"""The portable provider on any attention pattern: random problems, memory, host reads, its forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pattern_problems
import patterns
import provider_checks
import pytest
import torch
from pattern_problems import PatternProblem
from problems import Watch, ones_for, problem_of

from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Neighborhood,
    Window,
    default_links,
)
from gna_compile.providers import Forward, Gradients, Inputs, OutputGradients, Problem
from gna_compile.providers.portable import cuts, exact, pieces, tile_tensors, tiles, walk
from gna_compile.providers.portable import provider as portable
from gna_compile.providers.portable.pieces import Piece, pieces_of
from gna_compile.providers.portable.provider import Portable
from gna_compile.providers.portable.tangents import write_tangents
from gna_compile.providers.portable.tiles import KeyRun

BLOCKS = 4
PROBLEMS_PER_BLOCK = 200


def run_all(asked: Problem, inputs: Inputs) -> None:
    """Forward, backward and tangents."""
    results = Forward(
        torch.empty_like(inputs.query), inputs.query.new_empty(inputs.query.shape[:3])
    )
    Portable().forward(asked, inputs, results)
    for given in (OutputGradients(*results), OutputGradients(results.output, None)):
        gradients = Gradients(*map(torch.empty_like, inputs[:3]))
        Portable().backward(asked, inputs, results, given, gradients)
    tangents = Forward(*map(torch.empty_like, results))
    write_tangents(asked, inputs, inputs, results.logsumexp, tangents)


# Results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(BLOCKS))
def test_block_of_random_patterns(block: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for index in range(PROBLEMS_PER_BLOCK):
        pattern_problems.check(block * PROBLEMS_PER_BLOCK + index)
    torch.set_num_threads(threads)


def test_random_problems_have_what_can_go_wrong() -> None:
    """Each feature of a pattern is in at least one problem of twenty."""
    seen: dict[str, int] = {}
    count = 200
    for seed in range(count):
        drawn = PatternProblem(seed)
        of_pattern = pieces_of(drawn.pattern)
        features = {
            "is not one grid": drawn.pattern.neighborhood is None,
            "partial": drawn.pattern.partial,
            "queries are not the keys": drawn.pattern.queries != drawn.pattern.keys,
            "blind rows": not drawn.visible.any(-1).all(),
            "unseen keys": not drawn.visible.any(1).all(),
            "several key grids": any(len(piece.key_grids) > 1 for piece in of_pattern),
            "several pieces": len(of_pattern) > 1,
            "several ranges of linked keys": any(len(piece.linked) > 1 for piece in of_pattern),
            "several ranges of queries": any(len(piece.queries) > 1 for piece in of_pattern),
            "an axis that does not limit": any(
                not all(axis.limited) for piece in of_pattern for axis in piece.axes
            ),
            "dilation": any(axis.dilation > 1 for piece in of_pattern for axis in piece.axes),
            "key mask": drawn.key_mask is not None and not drawn.key_mask.all(),
            "grouped-query heads": drawn.heads > drawn.kv_heads,
        }
        for name, has in features.items():
            seen[name] = seen.get(name, 0) + has
    assert min(seen.values()) >= count // 20, seen


def _without_blind_rows(*args: Any, **kwargs: Any) -> Piece:
    return replace(Piece(*args, **kwargs), may_be_blind=False)


_tokens = tiles._tokens

FAULTS: dict[str, tuple[object, str, Any]] = {
    "no mask": (walk, "join_hidden", lambda *_: None),
    "no masks of axes": (
        tiles,
        "KeyRun",
        lambda keys, tokens, full: KeyRun(keys, tokens, full=True),
    ),
    "keys that start with the grid": (
        tiles,
        "_tokens",
        lambda positions, offset, dilation, first: _tokens(
            positions, offset, dilation, min(first, 0)
        ),
    ),
    "no window grids": (walk, "_key_boxes", lambda *_: ([], [])),
    "no blind rows": (pieces, "Piece", _without_blind_rows),
    "hidden values times zero": (
        exact,
        "product",
        lambda weights, values, *_, **__: weights @ values,
    ),
    "any values in the fused way": (portable, "_bounded", lambda *_: True),
    "no gradients of keys": (tile_tensors.Tile, "add_keys", lambda *_: None),
}


def test_the_command_runs_as_many_problems_as_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pattern_problems.main(["--problems", "3", "--seed", "7"]) == 0
    assert capsys.readouterr().err.startswith("3 problems, 0 wrong")


@pytest.mark.parametrize("fault", FAULTS)
def test_random_problems_notice_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    pieces_of.cache_clear()
    walk._pieces.cache_clear()
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        for seed in range(200):
            pattern_problems.check(seed)
    pieces_of.cache_clear()
    walk._pieces.cache_clear()


def test_a_pattern_without_keys_gives_zero() -> None:
    provider_checks.check_a_pattern_without_keys_gives_zero(Portable())


# Memory, host reads ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fused", "exact"])
def test_memory_is_bounded(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "exact":
        monkeypatch.setattr(portable, "_bounded", lambda *_: False)
    monkeypatch.setattr(tile_tensors, "WORKSPACE", 1 << 20)
    monkeypatch.setattr(cuts, "MAX_MASK", 1 << 17)
    cuts.cut_grid.cache_clear()
    asked = problem_of(patterns.rank_of_a_video(3, 32))
    inputs = ones_for(asked)
    with Watch() as watch:
        run_all(asked, inputs)
    cuts.cut_grid.cache_clear()
    pairs = asked.pattern.query_tokens * asked.pattern.key_tokens
    assert watch.largest < 4 * inputs.query.numel() < pairs / 10


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_devices_are_never_read_on_the_host(kv_heads: int) -> None:
    # A meta tensor has no values: any read of one raises, as it would break a CUDA graph's capture.
    asked = problem_of(patterns.rank_of_a_video(2, 6), kv_heads, "meta")
    run_all(asked, ones_for(asked))


# Pieces, the forecast ----------------------------------------------------------------------------


def test_queries_with_the_same_links_are_one_piece_and_neighboring_keys_one_range() -> None:
    text, grid = GlobalTokens(3), GridTokens((4, 5))
    segments = (text, text, grid, text, GridTokens((7,)))
    group = HeadGroup(1, (Window((3, 3)), None))
    pattern = AttentionPattern(segments, segments, default_links(segments), (group,))
    rows, window = pieces_of(pattern)
    assert rows.queries == (range(6), range(26, 36)) and rows.linked == (range(36),)
    assert window.queries == (range(6, 26),)
    assert window.linked == (range(6), range(26, 36))
    assert not rows.axes and len(window.axes) == 2


def speedup(pattern: AttentionPattern) -> float:
    forecast = Portable().forecast(problem_of(pattern, pattern.heads)).speedup
    assert forecast is not None
    return forecast


@pytest.mark.parametrize("seed", range(5))
def test_the_forecast_does_not_depend_on_how_a_pattern_is_written(seed: int) -> None:
    neighborhood = Neighborhood.of((40, 40), (9, 9), (1, 4), prefix=20, suffix=9)
    pattern = AttentionPattern.of_neighborhood(neighborhood, 3)
    split = patterns.split(pattern, seed)
    assert len(split.queries) > len(pattern.queries)
    assert speedup(split.of_group(HeadGroup(3, split.head_groups[0].windows))) == speedup(pattern)


def parts(count: int, shown: Sequence[int]) -> AttentionPattern:
    """Queries that see some of the segments, each of 100 keys."""
    links = (tuple(Link.FULL if n in shown else Link.NONE for n in range(count)),)
    keys = (GlobalTokens(100),) * count
    return AttentionPattern((GlobalTokens(50),), keys, links, (HeadGroup(1, ()),))


def test_the_forecast_is_the_cost_of_the_tiles() -> None:
    tile, gathered = cuts._TILE, cuts._GATHERED_KEY
    assert speedup(parts(4, [1, 2])) == 50 * 400 / (50 * 200 + tile)
    assert speedup(parts(4, [0, 3])) == 50 * 400 / (50 * 200 + gathered * 200 + tile)
    # One tile of 64 queries; its window has the 64 keys of two of the three rows, each a segment.
    grid = (4, 64)
    queries = GridTokens(grid, (1, 0), (2, 64))
    keys = tuple(GridTokens(grid, (row, 0), (row + 1, 64)) for row in range(3))
    pattern = AttentionPattern(
        (queries,),
        (*keys, GlobalTokens(10)),
        ((Link.WINDOW, Link.WINDOW, Link.WINDOW, Link.FULL),),
        (HeadGroup(1, (Window((2, 64)),)),),
        partial=True,
    )
    cost = 64 * 128 + gathered * 128 + tile + 10 * (64 + gathered)
    assert speedup(pattern) == 64 * 202 / cost


def test_a_halo_makes_the_forecast_that_of_the_ranks_own_tiles() -> None:
    whole = AttentionPattern.of_neighborhood(Neighborhood.of((48, 64), (7, 13)), 4)
    queries = GridTokens((48, 64), (16, 0), (32, 64))
    keys = GridTokens((48, 64), (13, 0), (35, 64))
    part = AttentionPattern((queries,), (keys,), ((Link.WINDOW,),), whole.head_groups)
    # Fewer keys at hand, so that dense attention is cheaper by as much.
    assert speedup(part) == pytest.approx(speedup(whole) * 22 / 48, rel=0.1)


def test_heads_that_see_different_things_are_declined() -> None:
    grid = GridTokens((8,))
    groups = (HeadGroup(1, (Window((3,)),)), HeadGroup(1, (None,)))
    pattern = AttentionPattern((grid,), (grid,), ((Link.WINDOW,),), groups)
    reason = Portable().supports(problem_of(pattern))
    assert reason == "takes heads that all see the same, one head group at a time"
