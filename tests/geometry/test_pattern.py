"""Attention patterns against their oracle, and their one form and encoding."""

from __future__ import annotations

from dataclasses import replace

import pattern_oracle
import patterns
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gna_compile.geometry import (
    AttentionPattern,
    GeometryError,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Link,
    Neighborhood,
    Window,
    canonical,
    decode,
    default_links,
    encode,
    text_of_list,
    write_grid,
)
from gna_compile.geometry.encoding import write

SEEDS = st.integers(0, 2**32)
VIDEO, IMAGE, TEXT = GridTokens((3, 4, 5)), GridTokens((1, 4, 5)), GlobalTokens(7)
WINDOW = Window((3, 2, 3), (1, 2, 1))


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_sees_and_pairs(seed: int) -> None:
    pattern = patterns.draw(seed, longest=4, most_tokens=40)
    visible = pattern_oracle.visible(pattern)
    assert visible.shape == (pattern.heads, pattern.query_tokens, pattern.key_tokens)
    assert pattern.pairs == visible.sum()
    sees = [
        [
            [pattern.sees(head, query, key) for key in range(pattern.key_tokens)]
            for query in range(pattern.query_tokens)
        ]
        for head in range(pattern.heads)
    ]
    assert torch.equal(torch.tensor(sees), visible)


@given(SEEDS)
@settings(max_examples=500, deadline=None)
def test_the_canonical_form_is_the_same_pattern(seed: int) -> None:
    pattern = patterns.draw(seed)
    form = canonical(pattern)
    assert torch.equal(pattern_oracle.visible(form), pattern_oracle.visible(pattern))
    assert pattern_oracle.global_keys(form) == pattern_oracle.global_keys(pattern)
    assert canonical(form) == form
    assert len(form.queries) <= len(pattern.queries) and len(form.keys) <= len(pattern.keys)


@given(SEEDS, SEEDS)
@settings(max_examples=500, deadline=None)
def test_equal_patterns_have_equal_encodings(seed: int, how: int) -> None:
    pattern = patterns.draw(seed)
    assert encode(patterns.split(pattern, how)) == encode(pattern)


@given(SEEDS, SEEDS)
@settings(max_examples=500, deadline=None)
def test_equal_encodings_are_of_equal_patterns(one: int, other: int) -> None:
    first, second = (patterns.draw(seed, longest=3, most_tokens=12) for seed in (one, other))
    if encode(first) == encode(second):
        assert torch.equal(pattern_oracle.visible(first), pattern_oracle.visible(second))
        assert pattern_oracle.global_keys(first) == pattern_oracle.global_keys(second)


@given(SEEDS)
@settings(max_examples=500, deadline=None)
def test_decode_is_the_inverse_of_encode(seed: int) -> None:
    pattern = patterns.draw(seed)
    assert decode(write(pattern)) == pattern
    assert decode(encode(pattern)) == canonical(pattern)


@given(SEEDS, st.data())
@settings(max_examples=500, deadline=None)
def test_any_list_is_decoded_or_refused(seed: int, data: st.DataObject) -> None:
    ints = encode(patterns.draw(seed))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(ints) - 1))
        change = data.draw(st.sampled_from(("drop", "add", "set")))
        value = data.draw(st.integers(-2, 9))
        ints[place : place + (change != "add")] = [] if change == "drop" else [value]
    try:
        pattern = decode(ints)
    except GeometryError:
        return
    assert decode(write(pattern)) == pattern


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_keys_that_are_not_at_hand_are_found(seed: int) -> None:
    pattern = patterns.draw(seed, longest=4, most_tokens=40)
    assert (pattern.missing_key is None) == pattern_oracle.is_complete(pattern)
    assert pattern.partial or pattern.missing_key is None


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_a_neighborhood_is_found_again(seed: int) -> None:
    pattern = patterns.draw(seed)
    for form in (pattern, canonical(pattern)):
        for group in form.head_groups:
            neighborhood = form.of_group(group).neighborhood
            if neighborhood is not None and group.heads:
                again = AttentionPattern.of_neighborhood(neighborhood, group.heads)
                visible = pattern_oracle.visible(again)
                assert torch.equal(visible, pattern_oracle.visible(form.of_group(group)))
                columns = pattern_oracle.global_keys(again), pattern_oracle.global_keys(form)
                # A CUDA launch must have as many columns before a key mask is passed on as it is.
                assert columns[0] == columns[1] or len(columns[0]) != len(columns[1])


def test_a_grid_that_sees_everything_counts_as_global_tokens() -> None:
    image = GridTokens((4, 5))
    segments = (TEXT, image, GridTokens((2, 3)))
    window = Window((2, 3))
    pattern = AttentionPattern(
        segments, segments, default_links(segments), (HeadGroup(2, (window, None)),)
    )
    expected = Neighborhood(window.axes(image.grid), prefix=TEXT.tokens, suffix=6)
    assert canonical(pattern).neighborhood == expected
    dense = replace(pattern, head_groups=(HeadGroup(2, (None, None)),))
    assert canonical(dense).neighborhood.flop_share == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "neighborhood",
    [
        Neighborhood.of((4, 6), (2, 3), (2, 1), prefix=3, suffix=2),
        Neighborhood.of((2, 4, 6), (2, 3, 3), suffix=1),
        Neighborhood.of((12,), (3,), causal=(True,)),
        Neighborhood.of((4, 6), (4, 6), prefix=3),
        Neighborhood.of((9,), (3,), dilation=(3,)),
    ],
)
def test_a_neighborhood_stays_one(neighborhood: Neighborhood) -> None:
    pattern = decode(encode(AttentionPattern.of_neighborhood(neighborhood, 5)))
    assert pattern.neighborhood is not None
    assert pattern.neighborhood.merged == neighborhood.merged
    assert pattern.pairs == 5 * neighborhood.pairs


def test_two_frames_are_not_two_images() -> None:
    frames = (GridTokens((2, 4, 5)),)
    images = (GridTokens((4, 5)), GridTokens((4, 5)))
    two = AttentionPattern(
        images, images, default_links(images), (HeadGroup(1, (Window((2, 3)),) * 2),)
    )
    one = AttentionPattern(
        frames, frames, default_links(frames), (HeadGroup(1, (Window((2, 2, 3)),)),)
    )
    assert two.query_tokens == one.query_tokens
    assert encode(two) != encode(one)
    assert two.neighborhood is None and one.neighborhood is not None


def test_documents_do_not_see_each_other() -> None:
    segments = (TEXT, IMAGE, TEXT, IMAGE)
    links = default_links(segments, documents=(0, 0, 1, 1))
    assert links[0] == (Link.FULL, Link.FULL, Link.NONE, Link.NONE)
    assert links[3] == (Link.NONE, Link.NONE, Link.FULL, Link.WINDOW)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GlobalTokens(-1), "at least 0"),
        (lambda: GridTokens((2, 3), (0, 2), (2, 2)), r"axis 1 of grid \(2, 3\): 2\.\.2 is not"),
        (lambda: GridTokens((2, 3), stop=(2, 4)), r"0\.\.4 is not a non-empty box within 0\.\.3"),
        (lambda: GridTokens((1, 2, 3, 4)), "1 to 3 axes, not 4"),
        (lambda: _self((TEXT, VIDEO), ()), "head group 0 has 0 windows for 1 grids"),
        (lambda: _self((VIDEO,), (Window((4, 2, 3)),)), "head group 0: axis 0 of grid"),
        (lambda: _self((VIDEO,), (Window((2, 3)),)), "window has 2 entries for a grid of 3 axes"),
        (
            lambda: AttentionPattern((TEXT,), (VIDEO,), ((Link.WINDOW,),), (HeadGroup(1, ()),)),
            "which takes two grids",
        ),
        (
            lambda: AttentionPattern(
                (VIDEO,),
                (GridTokens((3, 4, 6)),),
                ((Link.WINDOW,),),
                (HeadGroup(1, (WINDOW,)),),
            ),
            "cannot be aligned",
        ),
        (
            lambda: AttentionPattern(
                (GridTokens((8,), (2,), (5,)),),
                (GridTokens((8,), (2,), (8,)),),
                ((Link.WINDOW,),),
                (HeadGroup(1, (Window((3,)),)),),
            ),
            "key 1 of axis 0 is seen by segment 0",
        ),
        (
            lambda: AttentionPattern((TEXT,), (TEXT,), (), (HeadGroup(1, ()),)),
            "one row of 1 key segments for each of 1 query segments",
        ),
        (lambda: AttentionPattern((), (), (), (HeadGroup(1, ()),)), "at least one segment"),
        (lambda: _self((TEXT,), (), heads=-1), "has -1 heads"),
        (lambda: AttentionPattern((TEXT,), (TEXT,), ((Link.FULL,),), ()), "one head group"),
        (lambda: decode([]), "ends where its version should be"),
        (lambda: decode([7, 0, 1]), "of version 7, not 1"),
        (lambda: decode([*encode(_self((TEXT,), ())), 3]), "goes on after"),
    ],
)
def test_errors(build, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GeometryError, match=message):
        build()


def _self(segments, windows, heads=1) -> AttentionPattern:  # type: ignore[no-untyped-def]
    return AttentionPattern(
        segments, segments, default_links(segments), (HeadGroup(heads, windows),)
    )


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_one_grid_is_written_without_looking_at_sizes(prefix: int, suffix: int, heads: int) -> None:
    neighborhood = Neighborhood.of((4, 6), (2, 3), (2, 1), (2, 1), (True, False), prefix, suffix)
    ints = write_grid((4, 6), (2, 3), (2, 1), (2, 1), (True, False), prefix, suffix, heads)
    assert ints == write(AttentionPattern.of_neighborhood(neighborhood, heads))
    names = write_grid(["h", "w"], ["a", 3], [2, 1], [2, 1], [True, False], "text", suffix, "n")
    size = "" if suffix == 0 else f" + {suffix}"
    window = "window ax3, stride 2x1, dilation 2x1, causal yesxno"
    assert text_of_list(names) == f"text + hxw{size}; n heads: {window}"


def test_a_pattern_in_words() -> None:
    segments = (TEXT, VIDEO, IMAGE)
    pattern = AttentionPattern(
        segments,
        (*segments, GridTokens((8, 4), (2, 0), (6, 4))),
        tuple((*row, Link.NONE) for row in default_links(segments, between_grids=Link.WINDOW)),
        (HeadGroup(2, (WINDOW, None)), HeadGroup(1, (None, None))),
    )
    assert text_of_list(write(pattern)) == (
        "7 + 3x4x5 + 1x4x5 of 7 + 3x4x5 + 1x4x5 + 8x4[2:6, 0:4]; "
        "links full full full none / full window window none / full window window none; "
        "2 heads: window 3x2x3, stride 1x2x1 / full; 1 heads: full / full"
    )


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_every_pattern_has_words(seed: int) -> None:
    pattern = patterns.draw(seed)
    assert text_of_list(write(pattern)).startswith(str(pattern.queries[0]))
