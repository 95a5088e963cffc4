"""The shared C++ header (csrc/include/gna) against `geometry/axis.py`, exhaustively on small axes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from gna_compile import _native
from gna_compile.geometry import Axis

LONGEST = 9


def axes(longest: int = LONGEST) -> Iterator[Axis]:
    """Every axis of dilation 1 up to a length."""
    for length in range(1, longest + 1):
        for window in range(1, length + 1):
            for stride, causal in itertools.product(range(1, window + 1), (False, True)):
                yield Axis(length, window, stride, 1, causal)


def native(axis: Axis) -> tuple[int, int, int, bool]:
    return (axis.length, axis.window, axis.stride, axis.causal)


def boxes(axis: Axis) -> Iterator[range]:
    for begin in range(axis.length):
        for end in range(begin + 1, axis.length + 1):
            yield range(begin, end)


def test_keys_of_a_query() -> None:
    for axis in axes(14):
        for query in range(axis.length):
            assert range(*_native.keys_of(native(axis), query)) == axis.keys(query), (axis, query)


@pytest.mark.parametrize("name", ["union", "intersection", "seen_by"])
def test_boxes(name: str) -> None:
    function = getattr(_native, name if name == "seen_by" else f"{name}_of")
    for axis in axes():
        for box in boxes(axis):
            actual = range(*function(native(axis), box.start, box.stop))
            expected = getattr(axis, name)(box)
            assert list(actual) == list(expected), (axis, box)


def test_all_seen_by() -> None:
    for axis in axes():
        for box in boxes(axis):
            begin, end = _native.all_seen_by(native(axis), box.start, box.stop)
            expected = [q for q in range(axis.length) if all(axis.sees(q, key) for key in box)]
            assert list(range(begin, end)) == expected, (axis, box)


def test_long_axes() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        length = rng.randint(1, 1 << 30)
        window = rng.randint(1, length)
        stride = rng.choice([1, window, rng.randint(1, window)])
        axis = Axis(length, window, stride, 1, rng.random() < 0.5)
        begin = rng.randrange(length)
        box = range(begin, rng.randint(begin + 1, length))
        for function, expected in (
            (_native.union_of, axis.union(box)),
            (_native.intersection_of, axis.intersection(box)),
            (_native.seen_by, axis.seen_by(box)),
        ):
            assert function(native(axis), box.start, box.stop) == (expected.start, expected.stop)


def test_group_length() -> None:
    for length, dilation in itertools.product(range(1, 30), range(1, 12)):
        if dilation > length:
            continue
        for group in range(dilation):
            expected = Axis(length, 1, 1, dilation).group(group).length
            assert _native.group_length(length, dilation, group) == expected


def test_axis_bits_are_the_tokens_of_the_interval() -> None:
    for log2_inner, log2_extent in itertools.product(range(5), range(5)):
        extent = 1 << log2_extent
        words = max(4 * (extent << log2_inner) // 32, 1)
        for begin, end in itertools.product(range(-2, extent + 3), repeat=2):
            for word in range(words):
                bits = _native.axis_bits(begin, end, log2_inner, log2_extent, word)
                tokens = range(32 * word, 32 * word + 32)
                expected = [begin <= (t >> log2_inner) % extent < end for t in tokens]
                assert [bool(bits >> bit & 1) for bit in range(32)] == expected


def test_the_axes_words_combine_to_the_mask_of_a_box() -> None:
    rng = random.Random(1)
    for _ in range(200):
        log2 = [rng.randint(0, 3) for _ in range(3)]
        parts = [rng.choice(list(axes(9))) for _ in range(3)]
        queries = [rng.randrange(axis.length) for axis in parts]
        first_keys = [rng.randrange(axis.length) for axis in parts]
        inner = [log2[1] + log2[2], log2[2], 0]
        keys = 1 << sum(log2)
        for word in range(-(-keys // 32)):
            bits = (1 << 32) - 1
            for axis, query, first, log2_inner, log2_extent in zip(
                parts, queries, first_keys, inner, log2, strict=True
            ):
                begin, end = _native.keys_of(native(axis), query)
                bits &= _native.axis_bits(begin - first, end - first, log2_inner, log2_extent, word)
            for bit in range(min(32, keys - 32 * word)):
                place = [
                    first + ((32 * word + bit) >> log2_inner) % (1 << log2_extent)
                    for first, log2_inner, log2_extent in zip(first_keys, inner, log2, strict=True)
                ]
                seen = all(
                    axis.sees(query, key)
                    for axis, query, key in zip(parts, queries, place, strict=True)
                )
                assert bool(bits >> bit & 1) == seen
