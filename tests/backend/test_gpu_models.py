"""Diffusion transformers on a Hopper GPU: every self-attention by the Hopper kernel, and the numbers.

Heads have the real models' size, 128; everything else is small. The reference is the model in fp32
in eager mode, with the brute-force mask given to SDPA.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_problems import needs_hopper
from masked_model import masked
from model_masks import masks_of
from models import randomize
from torch import Tensor, nn

import gna_compile
from benchmarks.models import CASES, build

pytestmark = needs_hopper

POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 256,
    "min_speedup": 0,
    "key_mask": "global_tokens",
    "rules": [{"window": "1/2", "stride": 2}],
}
TEXT = 77
LAYERS = 2
DEVICE = "cuda"
PROVIDER = "sm90"
DTYPES = [torch.bfloat16, torch.float16]


def made(name: str, dtype: torch.dtype, batch: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    case = CASES[name]
    grid = (32, 24) if len(case.grid) == 2 else (6, 12, 16)
    model, inputs = build(case, grid, TEXT, LAYERS, batch, dtype, True, "cpu")
    randomize(model, seed=0)
    return model.to(DEVICE), moved(inputs)


def moved(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(DEVICE, dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def compiled(model: nn.Module, mode: str | None = None) -> Any:
    torch._dynamo.reset()
    options: dict[str, Any] = {"policy": POLICY} | ({"mode": mode} if mode else {})
    return torch.compile(model, backend="gna", options=options)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(CASES))
@torch.no_grad()
def test_numbers(name: str, dtype: torch.dtype, batch: int) -> None:
    """Not further from fp32 than twice eager mode in the same dtype, and far nearer than dense."""
    model, inputs = made(name, dtype, batch)
    explanation = gna_compile.explain(model, policy=POLICY, quiet=True, **inputs)
    blocks = [row for row in explanation.rows if "context_embedder" not in row.layer]
    assert {row.reason for row in blocks} <= {"", "cross-attention"}
    rewritten = [row for row in blocks if row.decision == "gna"]
    assert len(rewritten) >= LAYERS
    assert {row.provider for row in rewritten} == {PROVIDER}
    masks = masks_of(explanation)

    exact, exact_inputs = copy.deepcopy(model).float(), moved(inputs, torch.float32)
    with masked(exact, masks):
        expected = exact(**exact_inputs)[0]
    with masked(model, masks):
        eager = distance(model(**inputs)[0], expected)
    dense = distance(exact(**exact_inputs)[0], expected)
    ours = distance(compiled(model)(**inputs)[0], expected)
    assert ours <= 2 * eager
    assert ours < dense / 4


@pytest.mark.parametrize("name", list(CASES))
@torch.no_grad()
def test_cuda_graphs(name: str) -> None:
    model, inputs = made(name, torch.bfloat16)
    plain = compiled(model)(**inputs)[0].clone()
    run = compiled(model, "reduce-overhead")
    for _ in range(4):  # recorded by the second, replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(run(**inputs)[0].clone(), plain, rtol=1e-2, atol=1e-2)
