"""No random model is rewritten on a grid that its tokens do not have, and most grids are seen.

The programs and their judge are in `token_programs`; `make hunt` runs them without end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import oracle
import pytest
from token_identities import Identities, Sizes, Truth, axis_table
from token_programs import Spec, Summary

PARTS = 6
SAMPLES = 45  # of each part

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("wild", [False, True], ids=["tame", "wild"])
def test_no_grid_is_wrong(part: int, wild: bool) -> None:
    summary = Summary()
    for seed in range(part * SAMPLES, (part + 1) * SAMPLES):
        summary.add(Spec.draw(seed, wild))
    assert not summary.errors, summary.errors[0]
    assert not summary.wrong, f"{summary.wrong[0]}\n{summary}"
    assert summary.recall > (0.85 if not wild else 0.7), summary  # of about 70 and 25 sites


def truths(*steps: str | tuple[str, int], sizes: Sizes | None = None) -> list[Truth]:
    """The sites of a program made of these steps, each with the seed that draws the variant."""
    named = tuple((step, 0) if isinstance(step, str) else step for step in steps)
    sizes = sizes or Sizes(1, 2, 4, 6, 3)
    spec = Spec(0, True, False, sizes, 1, named, False)
    maker = spec.build()
    found = Identities(maker).run(sizes)
    return [found[index] for index in sorted(found)]


def variant(step: str, *words: str, after: Sequence[str | tuple[str, int]]) -> tuple[str, int]:
    """A step with the first seed whose variant's name has these words, and is not undone."""
    before = tuple((part, 0) if isinstance(part, str) else part for part in after)
    for seed in range(5000):
        steps = (*before, (step, seed))
        name = Spec(0, True, False, Sizes(1, 2, 4, 6, 3), 1, steps, False).build().names[-1]
        if name.startswith(step) and all(word in name for word in words) and "undone" not in name:
            return step, seed
    raise AssertionError(f"{step} has no variant {words}")


@pytest.mark.parametrize(
    ("stem", "grid"),
    [("image_conv", (4, 6)), ("image_linear", (4, 6)), ("video_conv3d", (2, 4, 6))],
)
def test_a_stem_makes_a_grid(stem: str, grid: tuple[int, ...]) -> None:
    (truth,) = truths(stem, variant("self_attention", "self_attention bnc", after=(stem,)))
    assert truth.expected == (grid,)
    assert not truth.fault((1, *grid))
    assert truth.fault(grid[::-1]) == "another grid"
    assert truth.fault(1, (int(np.prod(grid)) - 1,))


@pytest.mark.parametrize("stem", ["two_images", "packed_two_images", "sequence"])
def test_images_and_sequences_make_no_grid(stem: str) -> None:
    (truth,) = truths(stem, variant("self_attention", "self_attention bnc", after=(stem,)))
    assert truth.expected is None


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("reorder", ("random", "index_copy_ table")),
        ("reorder", ("random", "scatter_ residual")),
        ("reorder", ("reversed", "setitem")),
        ("shift_or_flip", ("roll", "residual")),
        ("shift_or_flip", ("flip", "scale")),
        ("partition_and_stay", ()),
        ("copies", ("stack and embed",)),
        ("copies", ("interleave",)),
        ("second_source", ("frames",)),
        ("specials_between", ("of rows",)),
        ("in_place", ("shift",)),
        ("opaque_operator", ("sort",)),
    ],
)
def test_wild_steps_leave_no_grid(step: str, words: tuple[str, ...]) -> None:
    drawn = variant(step, *words, after=("image_conv",))
    whole = variant("self_attention", "self_attention bnc", after=("image_conv", drawn))
    truth = truths("image_conv", drawn, whole)[-1]
    assert truth.expected is None
    assert all(truth.fault(grid) for grid in ((4, 6), (2, 4, 6), (8, 6), (4, 7)))


def test_other_keys_are_cross_attention() -> None:
    drawn = variant("other_keys", "values rolled", after=("image_conv",))
    truth = truths("image_conv", drawn)[-1]
    assert truth.fault((4, 6)) == "values are not the queries' tokens"


@pytest.mark.parametrize("stride", [1, 2])
def test_two_brute_forces_agree(stride: int) -> None:
    for length in range(1, 13):
        window = max(length // 2, 1)
        expected = oracle.axis_matrix(length, window, min(stride, window), 1, False)
        assert (axis_table(length, stride) == expected).all()
