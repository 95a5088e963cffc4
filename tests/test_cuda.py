"""What only a GPU can show; skipped without one."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from masked_model import masked
from test_backend import GRID, PHASED, Net, image, policy

import gna_compile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
    rows = gna_compile.explain(model, x, policy=policy(), quiet=True).rows
    assert {row.reason for row in rows} <= {"", "no-fast-provider"}
    assert all("portable" in row.detail for row in rows if row.reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training(dtype: torch.dtype) -> None:
    model = Net().cuda().to(dtype)
    x = image().cuda().to(dtype)
    options: dict[str, Any] = {"policy": policy(allow_slow_providers=True)}
    run = torch.compile(model, backend="gna", options=options, fullgraph=True)
    actual, wanted = run(x), expected(model, x)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    parameters = list(model.parameters())
    seed = torch.randn_like(actual)
    ours = torch.autograd.grad(actual, parameters, seed)
    theirs = torch.autograd.grad(wanted, parameters, seed)
    for a, b in zip(ours, theirs, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)
