"""The geometry against worked cases, the definition written again, and its own inverse."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gna_compile.geometry import Axis, GeometryError, Neighborhood

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "gna_vectors.json").read_text())[
    "vectors"
]
NAMES = ("grid", "window", "stride", "dilation", "causal")


@st.composite
def axes(draw: st.DrawFn, longest: int = 48, longest_dilation: int = 6) -> Axis:
    length = draw(st.integers(1, longest))
    dilation = draw(st.integers(1, min(length, longest_dilation)))
    window = draw(st.integers(1, length // dilation))
    stride = draw(st.integers(1, window))
    return Axis(length, window, stride, dilation, draw(st.booleans()))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Axis, range]:
    """An axis of dilation 1 and a non-empty box of its tokens."""
    axis = draw(axes(longest_dilation=1))
    start = draw(st.integers(0, axis.length - 1))
    return axis, range(start, draw(st.integers(start + 1, axis.length)))


def matrix(axis: Axis) -> np.ndarray:
    return oracle.axis_matrix(axis.length, axis.window, axis.stride, axis.dilation, axis.causal)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_worked_cases(vector: dict[str, Any]) -> None:
    neighborhood = Neighborhood.of(*(vector[name] for name in NAMES))
    grid = neighborhood.grid
    for query, expected in enumerate(vector["attended"]):
        place = np.unravel_index(query, grid)
        keys = [axis.keys(int(at)) for axis, at in zip(neighborhood.axes, place, strict=True)]
        flat = np.ravel_multi_index(np.meshgrid(*keys, indexing="ij"), grid).ravel().tolist()
        assert sorted(flat) == expected
    assert neighborhood.pairs == sum(map(len, vector["attended"]))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_oracle_itself_on_worked_cases(vector: dict[str, Any]) -> None:
    mask = oracle.mask(*(vector[name] for name in NAMES))
    assert [row.nonzero().flatten().tolist() for row in mask] == vector["attended"]


@given(axes())
def test_keys_and_sees(axis: Axis) -> None:
    see = matrix(axis)
    for query in range(axis.length):
        assert list(axis.keys(query)) == np.flatnonzero(see[query]).tolist()
        assert [axis.sees(query, key) for key in range(axis.length)] == see[query].tolist()


@given(axes())
def test_a_query_sees_itself_unless_its_leader_looks_away(axis: Axis) -> None:
    if axis.causal or axis.stride == 1:
        assert all(axis.sees(query, query) for query in range(axis.length))


@given(axes())
def test_pairs(axis: Axis) -> None:
    assert axis.pairs == matrix(axis).sum()
    assert axis.is_full == bool(matrix(axis).all()) or axis.length == 1


@given(boxes())
def test_union_and_intersection(case: tuple[Axis, range]) -> None:
    axis, queries = case
    rows = matrix(axis)[queries.start : queries.stop]
    assert list(axis.union(queries)) == np.flatnonzero(rows.any(axis=0)).tolist()
    assert list(axis.intersection(queries)) == np.flatnonzero(rows.all(axis=0)).tolist()


@given(boxes())
def test_seen_by(case: tuple[Axis, range]) -> None:
    axis, keys = case
    columns = matrix(axis)[:, keys.start : keys.stop]
    assert list(axis.seen_by(keys)) == np.flatnonzero(columns.any(axis=1)).tolist()


@given(axes())
def test_groups_are_the_axis(axis: Axis) -> None:
    see = np.zeros((axis.length, axis.length), dtype=bool)
    for index in range(axis.dilation):
        group = axis.group(index)
        assert group.dilation == 1
        members = slice(index, None, axis.dilation)
        see[members, members] = matrix(group)
    assert (see == matrix(axis)).all()


@given(st.lists(axes(longest=6), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 3))
def test_neighborhood_counts(parts: list[Axis], prefix: int, suffix: int) -> None:
    columns: dict[str, Any] = {
        name: [getattr(axis, name.replace("grid", "length")) for axis in parts] for name in NAMES
    }
    neighborhood = Neighborhood.of(**columns, prefix=prefix, suffix=suffix)
    mask = oracle.mask(**columns, prefix=prefix, suffix=suffix)
    assert neighborhood.tokens == mask.shape[0]
    assert neighborhood.global_tokens == prefix + suffix
    assert neighborhood.pairs == int(mask.sum())
    assert neighborhood.flop_share == int(mask.sum()) / mask.numel()
    if neighborhood.is_full:
        assert bool(mask.all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 7, 300_000_000])
def test_a_billion_tokens_take_no_time(causal: bool, stride: int) -> None:
    start = time.perf_counter()
    axis = Axis(1_000_000_007, 300_000_001, stride, 3, causal)
    neighborhood = Neighborhood((axis,), prefix=5, suffix=6)
    assert 0 < neighborhood.flop_share < 1
    group = axis.group(1)
    box = range(100_000_000, 200_000_000)
    assert axis.sees(999_999_999, axis.keys(999_999_999)[-1])
    assert len(group.union(box)) >= len(group.intersection(box))
    assert len(group.seen_by(box)) > 0
    assert time.perf_counter() - start < 0.5


def test_causal_pairs_at_any_length_follow_the_recurrence() -> None:
    # Past the first window, one more stride group adds the same number of pairs every time.
    window, stride = 1000, 7
    at = [Axis(10**9 + stride * step, window, stride, 1, True).pairs for step in range(3)]
    assert at[2] - at[1] == at[1] - at[0] == sum(range(window - stride + 1, window + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "grid length 0 must be at least 1"),
        ((8, 0), "window 0 must be at least 1"),
        ((8, -2), "window -2 must be at least 1"),
        ((8, 3, 4), "stride 4 must lie between 1 and the window 3"),
        ((8, 3, 0), "stride 0 must lie between 1 and the window 3"),
        ((8, 3, 1, 0), "dilation 0 must be at least 1"),
        ((8, 9), "window 9 is larger than the grid's 8 tokens"),
        ((8, 3, 1, 3), "window 3 x dilation 3 = 9 is larger than the grid's 8 tokens"),
    ],
)
def test_axis_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(GeometryError) as caught:
        Axis(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": [4, 4], "window": [3]}, "window has 1 entries for a grid of 2 axes (4, 4)"),
        ({"grid": [4], "window": [3], "causal": []}, "causal has 0 entries"),
        ({"grid": [4, 5], "window": [3, 6]}, "axis 1 of grid (4, 5): window 6"),
        ({"grid": [], "window": []}, "1 to 3 axes, not 0"),
        ({"grid": [2] * 4, "window": [2] * 4}, "1 to 3 axes, not 4"),
        ({"grid": [4], "window": [3], "prefix": -1}, "prefix -1 must be at least 0"),
        ({"grid": [4], "window": [3], "suffix": -2}, "suffix -2 must be at least 0"),
    ],
)
def test_neighborhood_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError) as caught:
        Neighborhood.of(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["union", "intersection", "seen_by"])
def test_boxes_must_lie_in_one_group(name: str) -> None:
    with pytest.raises(GeometryError, match=r"dilation 2 is defined per group"):
        getattr(Axis(8, 3, 1, 2), name)(range(2))
    for box in (range(0), range(7, 9), range(-1, 2), range(0, 4, 2)):
        with pytest.raises(GeometryError, match=r"not a non-empty box within 0\.\.7"):
            getattr(Axis(8, 3), name)(box)
