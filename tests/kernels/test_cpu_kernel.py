"""The CPU kernel on every instruction set: values, strides, threads, forks, memory.

Its numbers are tested in test_random_problems.py; here is what small problems do not show.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import provider_checks
import pytest
import torch
from pattern_problems import set_boxes
from problems import problem
from torch import Tensor

from gna_compile import _native, ops, providers
from gna_compile.geometry import Neighborhood
from gna_compile.providers.cpu.native_pattern import Boxes
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.problem import Forward, Inputs

ISAS = _native.isas()

# Tiles of all kinds, and enough work for several threads.
LARGE: dict[str, Any] = {
    "grid": (5, 13, 14),
    "window": (2, 8, 6),
    "stride": (1, 2, 3),
    "dilation": (2, 1, 2),
    "causal": (True, False, False),
    "prefix": 70,
    "suffix": 9,
}


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on each instruction set."""
    monkeypatch.setattr(providers, "PROVIDERS", [Cpu(request.param)])
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs_of(
    geometry: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 40,
) -> list[Tensor]:
    tokens = math.prod(geometry["grid"]) + geometry.get("prefix", 0) + geometry.get("suffix", 0)
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(2, tokens, count, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    ]


def key_mask_of(geometry: dict[str, Any]) -> Tensor:
    return torch.arange(2 * (geometry["prefix"] + geometry["suffix"])).view(2, -1) % 3 != 0


def everything(inputs: list[Tensor], geometry: dict[str, Any], **options: Any) -> list[Tensor]:
    """Output, logsumexp and all gradients, logsumexp's own gradient included."""
    query, key, value = leaves = [x.detach().requires_grad_() for x in inputs]
    pair: Any = ops.neighborhood_attention(
        query, key, value, **geometry, **options, return_logsumexp=True
    )
    grads = [torch.sin(torch.arange(x.numel()).view(x.shape)).to(x.dtype) for x in pair]
    return [*pair, *torch.autograd.grad(pair, leaves, grads)]


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_problem_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    inputs, key_mask = inputs_of(LARGE, dtype), key_mask_of(LARGE)
    actual = everything(inputs, LARGE, key_mask=key_mask)
    query, key, value = leaves = [x.detach().double().requires_grad_() for x in inputs]
    visible = oracle.mask(**LARGE)
    expected = list(
        oracle.attention(
            query, key, value, visible=visible, key_mask=key_mask, prefix=LARGE["prefix"]
        )
    )
    grads = [torch.sin(torch.arange(x.numel()).view(x.shape)).double() for x in expected]
    expected += torch.autograd.grad(expected, leaves, grads)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        worst = (one.double() - other).abs().max() / other.abs().max().clamp(min=1)
        assert worst < tolerance, index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("box", [(1, 4), (2, 2)])
@pytest.mark.parametrize("poison", provider_checks.POISON)
@pytest.mark.parametrize("where", provider_checks.WHERE)
def test_poison_reaches_the_rows_that_see_it_and_no_others(
    where: str,
    poison: float,
    box: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of a prefix, a grid and a suffix.
    boxes = ((), box, ())
    set_boxes(monkeypatch, lambda _: Boxes(boxes, boxes))
    provider_checks.check_poison_reaches_the_rows_that_see_it_and_no_others(where, poison, dtype)


@pytest.mark.parametrize("poison", provider_checks.PADDING)
def test_padding_may_hold_anything(poison: float) -> None:
    provider_checks.check_padding_may_hold_anything(poison)


@pytest.mark.parametrize("low", [-math.inf, -3e38])
def test_rows_of_minus_infinity_give_zero(low: float) -> None:
    provider_checks.check_rows_of_minus_infinity_give_zero(low)


def test_extreme_logits() -> None:
    # Weights of one key only, from logits that exp alone would overflow on.
    query, key, value = inputs_of({"grid": (40,)})
    output = ops.neighborhood_attention(query, key, value, grid=(40,), window=(9,), scale=3000.0)
    expected, _ = oracle.attention(
        query, key, value, visible=oracle.mask((40,), (9,)), scale=3000.0
    )
    assert isinstance(output, Tensor)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head_dim", [1, 2, 7, 8, 15, 17, 33, 96, 130, 256])
def test_head_sizes(head_dim: int) -> None:
    geometry: dict[str, Any] = {"grid": (9, 11), "window": (4, 5)}
    query, key, value = inputs = inputs_of(geometry, heads=2, kv_heads=1, head_dim=head_dim)
    expected, expected_lse = oracle.attention(query, key, value, visible=oracle.mask(**geometry))
    output, lse, *_ = everything(inputs, geometry)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_every_memory_layout_gives_the_same_bits() -> None:
    geometry: dict[str, Any] = {"grid": (7, 9), "window": (3, 4), "prefix": 2}
    inputs = inputs_of(geometry, heads=2, kv_heads=2, head_dim=12)
    expected = everything(inputs, geometry)
    for order in itertools.permutations(range(4)):
        inverse = [order.index(dim) for dim in range(4)]
        moved = [x.permute(order).contiguous().permute(inverse) for x in inputs]
        assert all(map(torch.equal, everything(moved, geometry), expected)), order


def test_expanded_tensors() -> None:
    geometry: dict[str, Any] = {"grid": (30,), "window": (7,)}
    one = inputs_of(geometry, heads=1, kv_heads=1)
    expanded = [x[:1].expand(2, 4, -1, -1) for x in one]
    plain = [x.contiguous() for x in expanded]
    assert all(map(torch.equal, everything(expanded, geometry), everything(plain, geometry)))
    query, key, value = (x.detach().requires_grad_() for x in plain)
    output = ops.neighborhood_attention(query, key, value, **geometry)
    assert isinstance(output, Tensor)
    # The gradient of a sum has strides of 0.
    grads = torch.autograd.grad(output.sum(), (query, key, value), retain_graph=True)
    dense = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert all(map(torch.equal, grads, dense))


# Threads, forks, memory --------------------------------------------------------------------------


def test_results_are_bitwise_repeatable() -> None:
    provider_checks.check_results_are_bitwise_repeatable()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    inputs, key_mask = inputs_of(LARGE, dtype), key_mask_of(LARGE)
    torch.set_num_threads(1)
    expected = everything(inputs, LARGE, key_mask=key_mask)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        actual = everything(inputs, LARGE, key_mask=key_mask)
        assert all(map(torch.equal, actual, expected)), count


@pytest.mark.usefixtures("threads")
def test_concurrent_callers() -> None:
    torch.set_num_threads(2)
    inputs, key_mask = inputs_of(LARGE), key_mask_of(LARGE)
    expected = everything(inputs, LARGE, key_mask=key_mask)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(everything, inputs, LARGE, key_mask=key_mask) for _ in range(8)]
        for run in runs:
            assert all(map(torch.equal, run.result(), expected))


@pytest.mark.usefixtures("threads")
def test_a_forked_process_can_go_on(isa: str) -> None:
    torch.set_num_threads(3)
    query, key, value = inputs_of(LARGE)
    facts = problem(Neighborhood.of(**LARGE), batch=2, heads=4, kv_heads=2, head_dim=query.shape[3])
    inputs = Inputs(query, key, value, None, 0.2)
    output, again = torch.empty_like(query), torch.empty_like(query)
    lse = torch.empty(query.shape[:3])
    Cpu(isa).forward(facts, inputs, Forward(output, lse))
    child = os.fork()
    if child == 0:
        # Only the kernel: PyTorch's own thread pool does not survive a fork.
        Cpu(isa).forward(facts, inputs, Forward(again, lse))
        same = again.numpy().tobytes() == output.numpy().tobytes()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


MEMORY = """
import resource, sys, torch
from gna_compile.geometry import AttentionPattern, Neighborhood
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.problem import Forward, Gradients, Inputs, OutputGradients, Problem

torch.set_num_threads(2)
neighborhood = Neighborhood.of((16384,), (1024,))
query, key, value, output, grad_output, *grads = (
    torch.full((1, 4, 16384, 64), 0.5) for _ in range(8)
)
lse = torch.zeros(1, 4, 16384)
strides = query.stride()
def problem(n):
    pattern = AttentionPattern.of_neighborhood(n, 4)
    return Problem("cpu", query.dtype, 1, 4, 4, 64, pattern, False, strides, strides, strides)
def run(facts, q, k, v, o, l, go, gs):
    provider = Cpu(sys.argv[1])
    inputs, results = Inputs(q, k, v, None, 0.1), Forward(o, l)
    provider.forward(facts, inputs, results)
    provider.backward(facts, inputs, results, OutputGradients(go, None), Gradients(*gs))
# Once on few tokens, for what is loaded and allocated only once.
small = [x[:, :, :64] for x in (query, key, value, output)]
run(problem(Neighborhood.of((64,), (9,))), *small, lse[:, :, :64].contiguous(), small[0],
    [x[:, :, :64] for x in grads])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(problem(neighborhood), query, key, value, output, lse, grad_output, grads)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / (3 * query.numel() * 4))
"""


def test_extra_memory_is_a_twentieth_of_the_inputs_at_most(isa: str) -> None:
    command = [sys.executable, "-c", MEMORY, isa]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.05
