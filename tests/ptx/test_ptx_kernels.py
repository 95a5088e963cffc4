"""Our Hopper and Blackwell kernels, host code and all, in the interpreter, against float64.

The ordinary tests take a few minutes; what is marked `prove` takes longer: `make prove`.
"""

from __future__ import annotations

import ctypes
import math
import os
import random

import pytest
from ptx import build, interpreter
from ptx.attention import ARCHITECTURES, Attention, library, random_attention
from ptx.mutations import MUTATIONS, PROBLEMS, Mutation, caught
from torch import Tensor

from gna_compile.providers.cuda.library import LAYOUT

pytestmark = pytest.mark.skipif(
    build.CXX is None or build.NVCC is None, reason="needs nvcc and a C++ compiler"
)

prove = pytest.mark.skipif("GNA_PROVE" not in os.environ, reason="long: make prove")

KERNELS = list(ARCHITECTURES)
FEW, MANY = 16, 128  # random problems
SCHEDULES = 12  # from one seed in so many, all kinds of schedules: see Schedule in core/block.cpp


@pytest.mark.parametrize("problem", ["plain", "globals", "long", "wide", "skewed", "steep"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_problem_under_all_kinds_of_schedules(kernel: str, problem: str) -> None:
    attention = PROBLEMS[problem](kernel)
    counts = set()
    for schedule in range(SCHEDULES):
        counted = attention.check(kernel, schedule=schedule)
        counts.add((counted.products, counted.loads, counted.stores))
    # The work does not depend on the schedule.
    assert len(counts) == 1


@pytest.mark.parametrize("problem", ["plain", "globals", "long", "wide", "skewed", "steep"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_demands_it_is_done_again(kernel: str, problem: str) -> None:
    """Carefully, that is, and then every store is made twice: as with a NaN that is visible."""
    attention, poisoned = (PROBLEMS[problem](kernel) for _ in range(2))
    poisoned.poison["value"] = [((0, 0, attention.tokens // 2, 0), math.nan)]
    once, twice = (which.check(kernel).stores for which in (attention, poisoned))
    is_steep = problem == "steep" and kernel == "sm90"
    assert twice == (once if is_steep else 2 * once)


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_only_global_queries_that_are_asked_for_are_computed(kernel: str, poisoned: bool) -> None:
    """By tiles, those of the fallback included: all other rows stay what they were."""
    attention = PROBLEMS["some globals"](kernel)
    if poisoned:
        attention.poison["value"] = [((0, 0, attention.tokens // 2, 0), math.nan)]
    end = attention.prefix + attention.suffix
    for number, asked in enumerate(
        [attention.global_queries, range(0), range(end - 1, end), range(1)]
    ):
        attention.global_queries = asked
        attention.check(kernel, schedule=number, multiprocessors=1 + number % 3)


class Jump(Attention):
    """Values that later, larger scores must make vanish, whatever their size."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        query, key, value, _ = super().inputs()
        late = self.tokens // 2
        query.fill_(1.0)
        key[:, :, :late], key[:, :, late:] = 0.0, 2.0
        value[:, :, :late], value[:, :, late:] = 1e36, 1.0
        return query, key, value, None


@pytest.mark.parametrize("kernel", KERNELS)
def test_huge_values_vanish_beside_larger_scores(kernel: str) -> None:
    log2 = 8 if kernel == "sm100" else 7
    Jump([(512, 512, 1, 1, False, log2, 7)], scale=1.0).check(kernel)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_share_the_work(kernel: str, multiprocessors: int) -> None:
    attention = PROBLEMS["plain"](kernel)
    attention.batch = 2
    attention.check(kernel, schedule=multiprocessors, multiprocessors=multiprocessors)


@pytest.mark.parametrize("problem", ["plain", "long"])
def test_compute_capability_10_3(problem: str) -> None:
    """Its exponentials are computed otherwise."""
    attention = PROBLEMS[problem]("sm100")
    attention.minor = 3
    for schedule in range(4):
        attention.check("sm100", schedule=schedule)


def _check_random(kernel: str, seeds: range) -> None:
    for seed in seeds:
        attention = random_attention(seed, kernel)
        for schedule in (seed, seed + 7, seed + 14):
            attention.check(kernel, schedule=schedule, multiprocessors=1 + seed % 3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_random_problems(kernel: str) -> None:
    _check_random(kernel, range(FEW))


@prove
@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("kernel", KERNELS)
def test_many_random_problems(kernel: str, block: int) -> None:
    _check_random(kernel, range(FEW + block * MANY // 8, FEW + (block + 1) * MANY // 8))


def _with_poison(seed: int, kernel: str) -> Attention:
    """Some values, and perhaps a key, that are not finite: hidden ones must have no influence."""
    rng = random.Random(seed)
    attention = random_attention(1000 + seed, kernel)
    attention.scale = None

    def place() -> tuple[int, ...]:
        sizes = attention.batch, attention.kv_heads, attention.tokens, attention.head_dim
        return tuple(rng.randrange(size) for size in sizes)

    kinds = [math.nan, math.inf, -math.inf]
    attention.poison["value"] = [
        (place(), rng.choice(kinds)) for _ in range(rng.choice([1, 3, 20]))
    ]
    attention.poison["key"] = [(place(), math.nan) for _ in range(rng.choice([0, 1]))]
    return attention


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_hidden_may_be_anything(kernel: str) -> None:
    for schedule in range(2):
        PROBLEMS["fallback"](kernel).check(kernel, schedule=schedule)


@prove
@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_hidden_may_be_anything_at_all(kernel: str, block: int) -> None:
    for seed in range(6 * block, 6 * block + 6):
        _with_poison(seed, kernel).check(kernel, schedule=seed, multiprocessors=1 + seed % 3)


def test_the_host_declines_what_the_copy_engine_cannot_do() -> None:
    attention = Attention([(200, 10, 1, 9, False, 7, 7)])
    with pytest.raises(interpreter.PtxError, match="too long for"):
        attention.run("sm90")


def test_the_host_names_the_value_and_the_rule() -> None:
    outside = Attention([(20, 9, 1, 1, False, 3, 3), (24, 17, 1, 1, False, 9, 4)])
    with pytest.raises(interpreter.PtxError, match="axis 1: log2_query_box is 9, not 0 to 7"):
        outside.run("sm90")
    smaller = Attention([(20, 9, 1, 1, False, 3, 3), (24, 17, 1, 1, False, 4, 3)])
    with pytest.raises(interpreter.PtxError, match=r"key boxes hold 2\^6 tokens, not 2\^7"):
        smaller.run("sm90")
    beyond = Attention([(300, 9, 1, 1, False, 7, 7)], prefix=3, suffix=4)
    beyond.global_queries = range(5, 8)
    with pytest.raises(interpreter.PtxError, match="global_end is 8, not 0 to 7"):
        beyond.run("sm90")
    beyond.global_queries = range(6, 5)
    with pytest.raises(interpreter.PtxError, match="global_begin is 6, not 0 to global_end, which"):
        beyond.run("sm90")


@pytest.mark.parametrize("kernel", KERNELS)
def test_structs_are_laid_out_as_python_declares_them(kernel: str) -> None:
    layout = (ctypes.c_int32 * len(LAYOUT))()
    library(kernel).functions.gna_layout(layout)
    assert tuple(layout) == LAYOUT


# A few that are found in different ways: a deadlock, races of three kinds, a wrong result.
OF_EACH_KIND = {
    "sm90: keys are released before the scores are there",
    "sm90: no proxy fence before the output is stored",
    "sm90: too many bytes are expected",
    "sm90: a box starts one key further",
    "sm100: scores are read without a fence after the barrier",
    "sm100: a stage of keys is released before the second half has used it",
    "sm100: halves store to each other's rows",
}


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, id=m.name, marks=() if m.name in OF_EACH_KIND else prove) for m in MUTATIONS],
)
def test_planted_bugs_are_caught(mutation: Mutation) -> None:
    assert caught(mutation) is not None


def test_the_chosen_bugs_exist() -> None:
    assert {m.name for m in MUTATIONS} >= OF_EACH_KIND
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 20
