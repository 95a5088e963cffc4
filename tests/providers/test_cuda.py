"""What only a GPU can show; skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from flex_problems import check_random_problem
from masked_model import masked
from small_net import GRID, PHASED, Block, Net, image, policy
from torch import Tensor

import gna_compile
from gna_compile import ops, providers
from gna_compile.providers import Provider
from gna_compile.providers.flex.provider import Flex, unusable
from gna_compile.providers.portable.provider import Portable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
_REASON = unusable(torch.bfloat16, 128)
needs_flex = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

# Largest error of an output, relative to the largest value around 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def expected(model: Net, x: torch.Tensor) -> torch.Tensor:
    with masked(model, {"*": oracle.mask(GRID, (3, 3)).cuda()}):
        return model(x)


def test_phases_keep_one_cuda_graph_each() -> None:
    rules = {**PHASED, "allow_slow_providers": True}
    model = Net().cuda()
    options: dict[str, Any] = {"policy": rules, "mode": "reduce-overhead"}
    run = torch.compile(model, backend="gna", options=options, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = image().cuda()
            sparse = run(x).clone()
            with gna_compile.phase("warmup"):
                dense = run(x).clone()
            torch.testing.assert_close(sparse, expected(model, x), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(dense, model(x), rtol=1e-3, atol=1e-3)


def test_without_a_fast_provider_a_site_stays_dense() -> None:
    model, x = Net().cuda(), image().cuda()
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.heads = 4  # of size 8: too small for FlexAttention
    rows = gna_compile.explain(model, x, policy=policy(), quiet=True).rows
    assert {row.reason for row in rows} == {"no-fast-provider"}
    assert all("head_dim 8" in row.detail and "portable" in row.detail for row in rows)


@needs_flex
def test_flex_serves_what_no_native_kernel_does() -> None:
    model, x = Net().cuda(), image().cuda()
    rows = gna_compile.explain(model, x, policy=policy(), quiet=True).rows
    assert {row.reason for row in rows} == {""}
    assert {row.provider for row in rows} == {"flex"}


@pytest.mark.parametrize("provider", [pytest.param(Flex(), marks=needs_flex), Portable()])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(
    dtype: torch.dtype, mode: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", [provider])
    model = Net().cuda().to(dtype)
    x = image().cuda().to(dtype)
    options: dict[str, Any] = {"policy": policy(allow_slow_providers=True), "mode": mode}
    run = torch.compile(model, backend="gna", options=options, fullgraph=True)
    for _ in range(3):
        check_training(model, run, x)


def check_training(model: Net, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    actual, wanted = run(x), expected(model, x)
    dtype = x.dtype
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    parameters = list(model.parameters())
    seed = torch.randn_like(actual)
    ours = torch.autograd.grad(actual, parameters, seed)
    theirs = torch.autograd.grad(wanted, parameters, seed)
    for a, b in zip(ours, theirs, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


# FlexAttention, which compiles each problem anew: few problems, each of another kind ---------------


@needs_flex
@pytest.mark.parametrize("seed", range(16))
def test_flex_on_random_problems(seed: int) -> None:
    dtype = list(TOLERANCE)[seed % 3]
    check_random_problem(seed, "cuda", dtype, {1: 1500, 2: 40, 3: 12}, TOLERANCE[dtype])


@needs_flex
@pytest.mark.parametrize("hidden", [float("nan"), float("inf")])
def test_flex_keeps_hidden_padding_out(hidden: float) -> None:
    geometry: dict[str, Any] = {"grid": (20, 20), "window": (5, 5), "prefix": 3, "suffix": 2}
    inputs = [torch.randn(2, 2, 405, 64, device="cuda") for _ in range(3)]
    key_mask = torch.tensor([[False, True, True, True, False], [True] * 5], device="cuda")
    results = []
    for value in (0.0, hidden):
        leaves = [x.clone() for x in inputs]
        for leaf in leaves[1:]:
            leaf[0, :, [0, -1]] = value
        leaves = [x.requires_grad_() for x in leaves]
        output = ops.neighborhood_attention(*leaves, **geometry, key_mask=key_mask, provider="flex")
        assert isinstance(output, Tensor)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


@needs_flex
def test_flex_gives_empty_rows_zero() -> None:
    query, key, value = (torch.rand(1, 1, 6, 16, device="cuda") + 1 for _ in range(3))
    key[0, 0, :2] = -torch.inf
    output, lse = ops.neighborhood_attention(
        query,
        key,
        value,
        grid=(6,),
        window=(2,),
        stride=(2,),
        provider="flex",
        return_logsumexp=True,
    )
    assert (output[0, 0, :2] == 0).all() and output.isfinite().all()
    assert lse[0, 0].isneginf().tolist() == [True, True, False, False, False, False]


@needs_flex
def test_flex_in_a_cuda_graph() -> None:
    geometry: dict[str, Any] = {"grid": (40, 40), "window": (9, 9), "prefix": 7}
    inputs = [torch.randn(1, 2, 1607, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def run() -> Tensor:
        output = ops.neighborhood_attention(*inputs, **geometry, provider="flex")
        assert isinstance(output, Tensor)
        return output

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in inputs:
        x.normal_()
    graph.replay()
    torch.testing.assert_close(captured, run())
