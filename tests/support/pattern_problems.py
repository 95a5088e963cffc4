"""Random problems of any attention pattern, by a provider called directly, against the oracle in float64.

Each problem draws its pattern, heads, dtype, memory layouts and key mask, and how the provider works
on it (`WAYS`). Results are compared forward and backward, those of the portable provider in the
forward-mode tangents, too; then again with NaN or infinity in some keys, whose results must be the
same wherever they are hidden. Everything that a provider writes holds NaN before, so an element that
nobody wrote is an error.

`make patterns` runs 100 000 of them; PATTERNS_ARGS='--provider cpu --problems 1000 --seed 7' others.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import pattern_oracle
import patterns
import pytest
import torch
from problems import error
from torch import Tensor

from gna_compile import _native
from gna_compile.geometry import AttentionPattern, GridTokens, Segment, canonical
from gna_compile.providers import Forward, Gradients, Inputs, OutputGradients, Problem, Provider
from gna_compile.providers.cpu import provider as cpu
from gna_compile.providers.cpu import tiles as cpu_tiles
from gna_compile.providers.cpu.native_pattern import Box, Boxes
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.portable import cuts, tile_tensors, walk
from gna_compile.providers.portable import provider as portable
from gna_compile.providers.portable.pieces import Piece
from gna_compile.providers.portable.provider import Portable
from gna_compile.providers.portable.tangents import write_tangents
from gna_compile.providers.portable.tiles import tiles

# Largest error allowed in output, gradients, logsumexp, and the tangents of output and logsumexp,
# relative to the largest value around 1.
TOLERANCE = {
    torch.float64: (1e-11, 1e-11, 1e-11, 1e-11, 1e-11),
    torch.float32: (1e-5, 3e-5, 1e-5, 3e-5, 3e-5),
    torch.float16: (3e-3, 1e-2, 1e-4, 1e-2, 1e-3),
    # The backward starts from an output that was rounded to bf16.
    torch.bfloat16: (2e-2, 1e-1, 1e-4, 4e-2, 1e-4),
}

_visible = lru_cache(maxsize=2)(pattern_oracle.visible)


class PatternProblem:
    """One problem, all of it drawn from a seed.

    Attributes:
        worst: the largest error so far, as a share of what is allowed.
    """

    def __init__(self, seed: int, dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)) -> None:
        self.seed, self.worst = seed, 0.0
        rng = self.rng = random.Random(seed)
        self.kv_heads = rng.choice([1, 1, 2])
        self.heads = self.kv_heads * rng.choice([1, 1, 2, 3])
        self.pattern = self._pattern()
        self.batch = rng.choice([1, 1, 2])
        self.head_dim = rng.choice([1, 4, 8, 20])
        self.dtype = rng.choice([torch.float32, torch.float32, *dtypes])
        self.scale = rng.choice([self.head_dim**-0.5, 0.3, 1.0, -0.5])
        self.lse_gradient = rng.random() < 0.4
        self.key_mask = self._key_mask() if rng.random() < 0.5 else None
        self.query = self.tensor(self.heads, self.pattern.query_tokens)
        self.key, self.value = (
            self.tensor(self.kv_heads, self.pattern.key_tokens) for _ in range(2)
        )
        self.given = OutputGradients(
            self.tensor(self.heads, self.pattern.query_tokens),
            self.any_layout(self._like_logsumexp().normal_(generator=self._generator()))
            if self.lse_gradient
            else None,
        )

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.pattern}, {self.dtype}, {self.pattern!r}"

    def _pattern(self) -> AttentionPattern:
        rng = self.rng
        longest, most = rng.choice([(3, 40), (5, 80), (7, 80), (20, 80)])
        pattern = patterns.draw(rng.getrandbits(40), longest, most)
        group = replace(rng.choice(pattern.head_groups), heads=self.heads)
        pattern = pattern.of_group(group)
        form = rng.randrange(4)
        if form == 0:
            return patterns.split(pattern, rng.getrandbits(40))
        return canonical(pattern) if form == 1 else pattern

    def _key_mask(self) -> Tensor:
        columns = len(pattern_oracle.global_keys(self.pattern))
        shown = self.rng.choice([0.0, 0.5, 0.5, 0.9])
        rows = [[self.rng.random() < shown for _ in range(columns)] for _ in range(self.batch)]
        return torch.tensor(rows, dtype=torch.bool).view(self.batch, columns)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.getrandbits(40))

    def _like_logsumexp(self) -> Tensor:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        shape = (self.batch, self.heads, self.pattern.query_tokens)
        return torch.full(shape, torch.nan, dtype=dtype)

    def tensor(self, heads: int, tokens: int) -> Tensor:
        """Random [batch, heads, tokens, head_dim] in any memory layout."""
        values = torch.randn(self.batch, heads, tokens, self.head_dim, generator=self._generator())
        return self.any_layout(values.to(self.dtype))

    def any_layout(self, tensor: Tensor) -> Tensor:
        """The same with its dimensions in another order in memory, perhaps with NaN around it."""
        kind = self.rng.random()
        if kind < 0.3:
            return tensor
        order = list(range(tensor.ndim))
        if kind < 0.6:
            order[1:3] = 2, 1
        else:
            self.rng.shuffle(order)
        sizes = [tensor.shape[dim] for dim in order]
        margin = 2 if self.rng.random() < 0.3 else 0
        whole = tensor.new_full([size + margin for size in sizes], torch.nan)
        for dim, size in enumerate(sizes):
            whole = whole.narrow(dim, margin // 2, size)
        return whole.permute([order.index(dim) for dim in range(tensor.ndim)]).copy_(tensor)

    def unwritten(self, like: Tensor) -> Tensor:
        return self.any_layout(torch.full_like(like, torch.nan))

    @property
    def visible(self) -> Tensor:
        """Bool [batch, query tokens, key tokens], key mask included."""
        seen = _visible(self.pattern)[:1].repeat(self.batch, 1, 1)
        if self.key_mask is not None:
            seen[..., pattern_oracle.global_keys(self.pattern)] &= self.key_mask[:, None]
        return seen

    def inputs(self, key: Tensor, value: Tensor) -> Inputs:
        return Inputs(self.query, key, value, self.key_mask, self.scale)

    def problem(self, inputs: Inputs) -> Problem:
        return Problem(
            device="cpu",
            dtype=self.dtype,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            pattern=self.pattern,
            has_key_mask=self.key_mask is not None,
            query_strides=inputs.query.stride(),
            key_strides=inputs.key.stride(),
            value_strides=inputs.value.stride(),
        )

    def run(self, provider: Provider, inputs: Inputs) -> tuple[Forward, Gradients]:
        """The provider's results and gradients."""
        problem = self.problem(inputs)
        assert provider.supports(problem) is None, self
        speedup = provider.forecast(problem).speedup
        assert speedup is not None and speedup > 0, self
        results = Forward(self.unwritten(inputs.query), self._like_logsumexp())
        provider.forward(problem, inputs, results)
        gradients = Gradients(*map(self.unwritten, inputs[:3]))
        provider.backward(problem, inputs, results, self.given, gradients)
        return results, gradients

    def expect(self, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Asserts that they are near each other."""
        share = error(actual, expected.double()) / tolerance
        assert share < 1, self
        self.worst = max(self.worst, share)

    def oracle(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return pattern_oracle.attention(
            query,
            key,
            value,
            pattern=self.pattern,
            key_mask=self.key_mask,
            scale=self.scale,
        )


# How providers work on a problem ------------------------------------------------------------------

Way = Callable[[PatternProblem, pytest.MonkeyPatch], Provider]


def portable_way(problem: PatternProblem, context: pytest.MonkeyPatch) -> Provider:
    """The fused or the exact way, a random cut, a small workspace, a small mask."""
    rng = random.Random(problem.seed)
    context.setattr(cuts, "MAX_MASK", rng.choice([1, 200, 1 << 22]))
    context.setattr(tile_tensors, "WORKSPACE", rng.choice([1, 4096, 1 << 26]))
    if rng.random() < 0.4:
        context.setattr(portable, "_bounded", lambda *_: False)
    seed = rng.getrandbits(40) if rng.random() < 0.6 else None

    def cut(piece: Piece, mask_rows: int) -> cuts.Cut:
        # Does not depend on what was asked before.
        if seed is None:
            return cuts.cut_grid.__wrapped__(piece, mask_rows)
        rng = random.Random(seed)
        return cuts.Cut(
            tuple(
                tuple(tiles(axis, rng.randint(1, len(axis.queries)), rng.random() < 0.5))
                for axis in piece.axes
            )
        )

    context.setattr(walk, "cut_grid", cut)
    return Portable()


def cpu_way(problem: PatternProblem, context: pytest.MonkeyPatch) -> Provider:
    """Any instruction set, random boxes."""
    return isa_way(random.Random(problem.seed).choice(_native.isas()))(problem, context)


def isa_way(isa: str) -> Way:
    """The CPU kernel of one instruction set, random boxes."""

    def way(problem: PatternProblem, context: pytest.MonkeyPatch) -> Provider:
        rng = random.Random(problem.seed)
        if rng.random() < 0.8:
            set_random_boxes(context, rng)
        return Cpu(isa)

    return way


def set_boxes(context: pytest.MonkeyPatch, choose: Callable[[AttentionPattern], Boxes]) -> None:
    """Has the CPU provider work on these boxes."""
    context.setattr(cpu_tiles, "choose_boxes", choose)
    cpu._constants.cache_clear()


def set_random_boxes(context: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Has the CPU provider work on random boxes, drawn for every grid, if it needs one or not."""

    def boxes(segments: Sequence[Segment]) -> tuple[Box, ...]:
        return tuple(
            rng.choice(list(cpu_tiles.candidates(segment.rank)))
            if isinstance(segment, GridTokens)
            else ()
            for segment in segments
        )

    set_boxes(context, lambda pattern: Boxes(boxes(pattern.queries), boxes(pattern.keys)))


WAYS: dict[str, tuple[Way, tuple[torch.dtype, ...]]] = {
    "portable": (portable_way, tuple(TOLERANCE)),
    "cpu": (cpu_way, (torch.float32, torch.float16, torch.bfloat16)),
}
"""By the provider's name: how it works on a problem, and the dtypes that it takes."""


# Checks -------------------------------------------------------------------------------------------


def check(seed: int, name: str = "portable", way: Way | None = None) -> float:
    """Raises AssertionError unless the provider is right about the problem of this seed.

    Args:
        seed: of the problem.
        name: of the provider.
        way: how it works; the usual way if None.

    Returns:
        the largest error, as a share of what is allowed.
    """
    usual, dtypes = WAYS[name]
    problem = PatternProblem(seed, dtypes)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(pattern_oracle, "visible", _visible)
        provider = (way or usual)(problem, context)
        results, gradients = _check_results(problem, provider)
        if name == "portable":
            _check_tangents(problem, results.logsumexp)
        _check_hidden_keys(problem, provider, results, gradients)
    return problem.worst


def _check_results(problem: PatternProblem, provider: Provider) -> tuple[Forward, Gradients]:
    results, gradients = problem.run(provider, problem.inputs(problem.key, problem.value))
    leaves = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    expected = problem.oracle(*leaves)
    of_output, of_gradients, of_logsumexp = TOLERANCE[problem.dtype][:3]
    problem.expect(results.output, expected[0], of_output)
    problem.expect(results.logsumexp, expected[1], of_logsumexp)
    blind = ~problem.visible.any(-1)[:, None].expand_as(results.logsumexp)
    assert (results.output[blind] == 0).all() and results.logsumexp[blind].isneginf().all(), problem
    upstream = [given.double() for given in problem.given if given is not None]
    wanted = torch.autograd.grad(expected[: len(upstream)], leaves, upstream)
    for gradient, exact in zip(gradients, wanted, strict=True):
        problem.expect(gradient, exact, of_gradients)
    assert (gradients.query[blind] == 0).all(), problem
    unseen = ~problem.visible.any(1)[:, None].expand(problem.key.shape[:3])
    assert all((gradient[unseen] == 0).all() for gradient in gradients[1:]), problem
    return results, gradients


def _check_tangents(problem: PatternProblem, logsumexp: Tensor) -> None:
    inputs = problem.inputs(problem.key, problem.value)
    given = [
        problem.any_layout(torch.randn(x.shape, generator=problem._generator()).to(x.dtype))
        for x in inputs[:3]
    ]
    tangents = Forward(problem.unwritten(inputs.query), problem._like_logsumexp())
    moving = inputs._replace(query=given[0], key=given[1], value=given[2])
    write_tangents(problem.problem(inputs), inputs, moving, logsumexp, tangents)
    operands = tuple(x.double() for x in inputs[:3])
    wanted = torch.func.jvp(problem.oracle, operands, tuple(x.double() for x in given))[1]
    # The derivative of a logsumexp of nothing is 0 here, as in the backward.
    blind = ~problem.visible.any(-1)[:, None].expand_as(logsumexp)
    for tangent, exact, tolerance in zip(
        tangents, wanted, TOLERANCE[problem.dtype][3:], strict=True
    ):
        exact[blind] = 0
        problem.expect(tangent, exact, tolerance)


def _check_hidden_keys(
    problem: PatternProblem, provider: Provider, results: Forward, gradients: Gradients
) -> None:
    """Poisoned keys change only what sees them, directly or through the row that sees them."""
    rng, visible = problem.rng, problem.visible
    count = rng.randint(1, 3)
    tokens = rng.sample(range(visible.shape[2]), min(count, visible.shape[2]))
    poison = rng.choice([torch.nan, torch.inf, -torch.inf])
    key, value = problem.key.clone(), problem.value.clone()
    for tensor in rng.choice([[key, value], [key], [value]]):
        tensor[:, :, tokens] = poison
    dirty_results, dirty_gradients = problem.run(provider, problem.inputs(key, value))
    dirty_rows = visible[:, :, tokens].any(-1)
    dirty_keys = (visible & dirty_rows[..., None]).any(1)
    dirty_keys[:, tokens] |= visible[:, :, tokens].any(1)
    of_output, of_gradients, of_logsumexp = TOLERANCE[problem.dtype][:3]
    for actual, before, dirty, tolerance in [
        (dirty_results.output, results.output, dirty_rows, of_output),
        (dirty_results.logsumexp, results.logsumexp, dirty_rows, of_logsumexp),
        (dirty_gradients.query, gradients.query, dirty_rows, of_gradients),
        (dirty_gradients.key, gradients.key, dirty_keys, of_gradients),
        (dirty_gradients.value, gradients.value, dirty_keys, of_gradients),
    ]:
        clean = ~dirty[:, None].expand(actual.shape[:3])
        problem.expect(actual[clean], before[clean], 2 * tolerance)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--provider", choices=list(WAYS), default="portable")
    options = parser.parse_args(arguments)
    began, wrong, worst = time.perf_counter(), 0, 0.0
    for count in range(1, options.problems + 1):
        seed = options.seed + count - 1
        try:
            worst = max(worst, check(seed, options.provider))
        except Exception as failure:
            wrong += 1
            print(f"seed {seed}: {type(failure).__name__} {failure}", flush=True)
        if count % 1000 == 0 or count == options.problems:
            seconds = time.perf_counter() - began
            print(
                f"{count} problems, {wrong} wrong, {seconds:.0f} s, "
                f"errors up to {worst:.0%} of what is allowed",
                file=sys.stderr,
                flush=True,
            )
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
