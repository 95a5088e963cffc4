"""Ten thousand random problems, forward and backward, against the float64 brute force.

Each problem also draws how a provider works on it. The portable one: the fused or the exact way, a
random cut of the grid instead of the cheapest (which would be one box, on grids this small), a
workspace that forces chunks. The CPU kernel, on fewer problems for each instruction set: random
boxes. All fresh memory is NaN, so an element that nobody wrote is an error.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import torch
from pattern_problems import set_random_boxes
from problems import error
from torch import Tensor

from gna_compile import _native, ops, providers
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.portable import provider as portable
from gna_compile.providers.portable import tile_tensors, walk
from gna_compile.providers.portable.cuts import Cut, cut_grid
from gna_compile.providers.portable.pieces import Piece
from gna_compile.providers.portable.provider import Portable
from gna_compile.providers.portable.tiles import tiles

BLOCKS = 40
PROBLEMS_PER_BLOCK = 260
BLOCKS_OF_EACH_ISA = 3

# Largest error allowed in output, gradients and logsumexp, relative to the largest value around 1.
TOLERANCE = {
    torch.float64: (1e-11, 1e-11, 1e-11),
    torch.float32: (1e-5, 2e-5, 1e-5),
    torch.float16: (3e-3, 6e-3, 1e-4),
    torch.bfloat16: (2e-2, 4e-2, 1e-4),
}


@dataclass
class RandomProblem:
    """One problem, all of it drawn from a seed."""

    seed: int
    rng: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        rank = rng.choice([1, 1, 2, 2, 3])
        longest = {1: 40, 2: 9, 3: 5}[rank]
        self.geometry: dict[str, Any] = {
            name: [] for name in ("grid", "window", "stride", "dilation", "causal")
        }
        for _ in range(rank):
            length = rng.randint(1, longest)
            dilation = rng.choice([1, 1, rng.randint(1, min(length, 4))])
            window = rng.choice([rng.randint(1, length // dilation), length // dilation])
            stride = rng.choice([1, rng.randint(1, window), window])
            values = (length, window, stride, dilation, rng.random() < 0.25)
            for name, value in zip(self.geometry, values, strict=True):
                self.geometry[name].append(value)
        self.prefix = rng.choice([0, 0, rng.randint(0, 5)])
        self.suffix = rng.choice([0, 0, rng.randint(0, 5)])
        self.batch = rng.choice([1, 2, 3])
        self.kv_heads = rng.choice([1, 2])
        self.heads = self.kv_heads * rng.choice([1, 1, 2, 3])
        self.head_dim = rng.choice([1, 4, 8, 16, 20])
        self.dtype = rng.choice([torch.float32] * 3 + list(TOLERANCE))
        self.scale = rng.choice([None, 0.3, 1.0, -0.5, 0.0])
        self.masks_keys = rng.random() < 0.4
        self.lse_gradient = rng.random() < 0.4
        self.fused = rng.random() < 0.7
        self.workspace = rng.choice([1, 4096, 1 << 26])
        self.random_cut = rng.random() < 0.8

    def tensor(self, *shape: int) -> Tensor:
        """Random values in one of the memory layouts that callers have."""
        batch, heads, tokens, head_dim = shape
        generator = torch.Generator().manual_seed(self.rng.getrandbits(40))

        def values(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(self.dtype)

        layout = self.rng.choice(
            ["BHSD", "BSHD", "SBHD", "fused", "padded", "reversed D", "expanded", "offset"]
        )
        if layout == "BSHD":
            return values(batch, tokens, heads, head_dim).transpose(1, 2)
        if layout == "SBHD":
            return values(tokens, batch, heads, head_dim).permute(1, 2, 0, 3)
        if layout == "fused":
            return values(batch, tokens, 3, heads, head_dim)[:, :, 1].transpose(1, 2)
        if layout == "padded":
            return values(batch, heads, tokens + 3, head_dim + 5)[:, :, 2:-1, 1:-4]
        if layout == "reversed D":
            return values(batch, heads, head_dim, tokens).transpose(2, 3)
        if layout == "expanded":
            return values(batch, 1, tokens, head_dim).expand(batch, heads, tokens, head_dim)
        if layout == "offset":
            flat = values(batch * heads * tokens * head_dim + 7)
            return flat[7:].view(shape)
        return values(*shape)

    def cut(self) -> Any:
        """Cuts the grid into boxes of random sizes."""
        sizes = [self.rng.randint(1, length) for length in self.geometry["grid"]]
        merges = [self.rng.random() < 0.5 for _ in sizes]

        def cut(piece: Piece, _: int) -> Cut:
            return Cut(tuple(map(tuple, map(tiles, piece.axes, sizes, merges))))

        return cut


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills all uninitialized memory with NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_block_of_random_problems(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", [Portable()])
    bounded = portable._bounded
    for index in range(PROBLEMS_PER_BLOCK):
        problem = RandomProblem(block * PROBLEMS_PER_BLOCK + index)
        monkeypatch.setattr(portable, "_bounded", bounded if problem.fused else lambda *_: False)
        monkeypatch.setattr(tile_tensors, "WORKSPACE", problem.workspace)
        cut = problem.cut() if problem.random_cut else cut_grid
        monkeypatch.setattr(walk, "cut_grid", cut)
        check(problem)


@pytest.mark.parametrize("block", range(BLOCKS_OF_EACH_ISA))
@pytest.mark.parametrize("isa", _native.isas())
def test_block_of_random_problems_on_the_cpu_kernel(
    isa: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel leaves fp64 to the portable provider.
    monkeypatch.setattr(providers, "PROVIDERS", [Cpu(isa), Portable()])
    for index in range(PROBLEMS_PER_BLOCK):
        problem = RandomProblem(1_000_000 + block * PROBLEMS_PER_BLOCK + index)
        set_random_boxes(monkeypatch, problem.rng)
        check(problem)


def check(problem: RandomProblem) -> None:
    visible = oracle.mask(**problem.geometry, prefix=problem.prefix, suffix=problem.suffix)
    tokens = visible.shape[0]
    query = problem.tensor(problem.batch, problem.heads, tokens, problem.head_dim)
    key, value = (
        problem.tensor(problem.batch, problem.kv_heads, tokens, problem.head_dim) for _ in range(2)
    )
    inputs = query, key, value = [x.detach().requires_grad_() for x in (query, key, value)]
    key_mask, global_tokens = None, problem.prefix + problem.suffix
    if problem.masks_keys:
        shown = [problem.rng.random() < 0.5 for _ in range(problem.batch * global_tokens)]
        key_mask = torch.tensor(shown, dtype=torch.bool).view(problem.batch, global_tokens)
    outputs = ops.neighborhood_attention(
        query,
        key,
        value,
        **problem.geometry,
        prefix=problem.prefix,
        suffix=problem.suffix,
        key_mask=key_mask,
        scale=problem.scale,
        return_logsumexp=True,
    )
    expected = oracle.attention(
        query,
        key,
        value,
        visible=visible,
        key_mask=key_mask,
        scale=problem.scale,
        prefix=problem.prefix,
    )
    of_output, of_grads, of_lse = TOLERANCE[problem.dtype]
    assert outputs[0].dtype == problem.dtype
    assert error(outputs[0], expected[0]) < of_output, problem
    assert error(outputs[1], expected[1]) < of_lse, problem

    grad_output = problem.tensor(*query.shape)
    grad_lse = problem.tensor(*query.shape[:3], 1)[..., 0].to(outputs[1].dtype)
    count = 2 if problem.lse_gradient else 1
    upstream = [grad_output, grad_lse][:count]
    grads = torch.autograd.grad(outputs[:count], inputs, upstream)
    expected_grads = torch.autograd.grad(
        expected[:count], inputs, [grad.double() for grad in upstream]
    )
    for name, grad, expected_grad in zip("qkv", grads, expected_grads, strict=True):
        assert error(grad, expected_grad.double()) < of_grads, (name, problem)
