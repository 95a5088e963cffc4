"""Random problems for the CUDA kernels."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from gna_compile import ops
from gna_compile.providers.cuda.library import library
from gna_compile.providers.cuda.provider import current_capability

PROBLEMS_PER_BLOCK = 30


# Largest ||error|| / ||expected||, and largest error of a logsumexp.
TOLERANCE = {torch.float16: (1.5e-3, 1e-3), torch.bfloat16: (8e-3, 1e-3)}


needs_hopper = pytest.mark.skipif(
    library("sm90") is None or current_capability() != (9, 0),
    reason="needs the CUDA kernels and a GPU of compute capability 9.0",
)


ROOT = Path(__file__).parents[2]


NVCC = shutil.which("nvcc")


class RandomProblem:
    """One problem, all of it drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        rank = rng.choice([1, 2, 2, 3, 3])
        longest = {1: 1500, 2: 40, 3: 13}[rank]
        self.geometry: dict[str, Any] = {
            name: [] for name in ("grid", "window", "stride", "dilation", "causal")
        }
        dilated = rng.random() < 0.3
        for _ in range(rank):
            length = rng.randint(1, longest)
            dilation = (
                rng.randint(1, min(length, 8 if rng.random() < 0.8 else 12)) if dilated else 1
            )
            window = rng.choice([rng.randint(1, length // dilation), length // dilation])
            stride = rng.choice([1, rng.randint(1, window), window])
            values = (length, window, stride, dilation, rng.random() < 0.2)
            for name, value in zip(self.geometry, values, strict=True):
                self.geometry[name].append(value)
        self.prefix = rng.choice([0, 0, rng.randint(0, 5), rng.randint(0, 300)])
        self.suffix = rng.choice([0, 0, rng.randint(0, 5), rng.randint(0, 300)])
        self.batch = rng.choice([1, 1, 2, 3])
        self.kv_heads = rng.choice([1, 2])
        self.heads = self.kv_heads * rng.choice([1, 1, 2, 3])
        self.head_dim = rng.choice([64, 128, 64, 128, 8 * rng.randint(1, 16)])
        self.dtype = rng.choice(list(TOLERANCE))
        self.scale = rng.choice([None, None, 0.3, 1.0, -0.1, 0.0])
        self.masks_keys = rng.random() < 0.4
        self.size = rng.choice([1.0, 1.0, 4.0])
        self.plants = 0  # how many values and keys are not finite

    def __repr__(self) -> str:
        return str({name: value for name, value in vars(self).items() if name != "rng"})

    def tensor(self, heads: int, tokens: int) -> Tensor:
        """Random values in one of the memory layouts that callers have; NaN around them."""
        batch, head_dim = self.batch, self.head_dim
        generator = torch.Generator("cuda").manual_seed(self.rng.getrandbits(40))

        def values(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device="cuda").to(self.dtype)

        layout = self.rng.choice(["BHSD", "BSHD", "SBHD", "fused", "padded", "expanded", "offset"])
        if layout == "BSHD":
            return values(batch, tokens, heads, head_dim).transpose(1, 2)
        if layout == "SBHD":
            return values(tokens, batch, heads, head_dim).permute(1, 2, 0, 3)
        if layout == "fused":
            whole = values(batch, tokens, 3, heads, head_dim)
            whole[:, :, ::2] = torch.nan
            return whole[:, :, 1].transpose(1, 2)
        if layout == "padded":
            whole = torch.full(
                (batch, heads, tokens + 3, head_dim + 16), torch.nan, device="cuda"
            ).to(self.dtype)
            inner = whole[:, :, 2:-1, 8:-8]
            inner.copy_(values(batch, heads, tokens, head_dim))
            return inner
        if layout == "expanded":
            return values(batch, 1, tokens, head_dim).expand(batch, heads, tokens, head_dim)
        if layout == "offset":
            flat = values(batch * heads * tokens * head_dim + 7)
            return flat[7:].view(batch, heads, tokens, head_dim)
        return values(batch, heads, tokens, head_dim)


def deviation(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; inf where not the same elements are NaN, inf or -inf."""
    for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(is_special(actual), is_special(expected)):
            return math.inf
    actual, expected = (x.double().nan_to_num(0, 0, 0) for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def plant(problem: RandomProblem, tensor: Tensor, *poison: float) -> None:
    """Writes some of what is not finite somewhere."""
    for _ in range(problem.plants):
        place = tuple(problem.rng.randrange(size) for size in tensor.shape)
        tensor[place] = problem.rng.choice(poison)


def check(problem: RandomProblem, provider: str) -> tuple[float, float] | None:
    """Errors of output and logsumexp, or None if the provider declines."""
    visible = oracle.mask(**problem.geometry, prefix=problem.prefix, suffix=problem.suffix).cuda()
    tokens = visible.shape[0]
    query = problem.tensor(problem.heads, tokens) * problem.size
    key, value = (problem.tensor(problem.kv_heads, tokens) for _ in range(2))
    # An infinite key can leave a visible value a weight of 0, and 0 times inf is NaN in the oracle.
    plant(problem, key, math.nan)
    plant(problem, value, math.nan, math.inf, -math.inf)
    key_mask, global_tokens = None, problem.prefix + problem.suffix
    if problem.masks_keys:
        shown = [problem.rng.random() < 0.5 for _ in range(problem.batch * global_tokens)]
        key_mask = torch.tensor(shown, dtype=torch.bool, device="cuda")
        key_mask = key_mask.view(problem.batch, global_tokens)
    try:
        output, logsumexp = ops.neighborhood_attention(
            query,
            key,
            value,
            **problem.geometry,
            prefix=problem.prefix,
            suffix=problem.suffix,
            key_mask=key_mask,
            scale=problem.scale,
            return_logsumexp=True,
            provider=provider,
        )
    except RuntimeError as error:
        if "dilation" in str(error):
            return None
        raise
    expected = oracle.attention(
        query,
        key,
        value,
        visible=visible,
        key_mask=key_mask,
        scale=problem.scale,
        prefix=problem.prefix,
    )
    finite = expected[1].isfinite()
    difference = (logsumexp.double() - expected[1])[finite].abs()
    lse_error = float(difference.nan_to_num(math.inf).amax()) if finite.any() else 0.0
    return deviation(output, expected[0]), lse_error


def assert_right(problem: RandomProblem, provider: str = "sm90") -> None:
    errors = check(problem, provider)
    if errors is None:
        return
    of_output, of_lse = TOLERANCE[problem.dtype]
    assert errors[0] < of_output, (errors, problem)
    assert errors[1] < of_lse, (errors, problem)
