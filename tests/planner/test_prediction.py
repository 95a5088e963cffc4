"""Predicted speedups where they decide: by provider, in decisions, and in reports."""

from __future__ import annotations

import dataclasses
import io
import math
from itertools import product
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import gna_compile
from gna_compile import providers
from gna_compile.geometry import AttentionPattern, Neighborhood
from gna_compile.planner import plan, speedups
from gna_compile.providers import Problem
from gna_compile.providers.cpu import tiles as cpu_tiles
from gna_compile.providers.cpu.provider import Cpu
from gna_compile.providers.cuda import provider as cuda
from gna_compile.providers.portable import cuts
from gna_compile.providers.portable.pieces import pieces_of
from gna_compile.providers.portable.provider import Portable


def problem(neighborhood: Neighborhood, device: str = "cpu", **changes: Any) -> Problem:
    strides = (1, 1, 1, 1)
    pattern = AttentionPattern.of_neighborhood(neighborhood, 12)
    made = Problem(device, torch.bfloat16, 2, 12, 6, 128, pattern, False, strides, strides, strides)
    return dataclasses.replace(made, **changes)


HUNYUAN = Neighborhood.of((30, 48, 80), (18, 24, 24), (1, 8, 8), suffix=256)


def test_each_provider_is_predicted_by_what_it_does() -> None:
    asked = problem(HUNYUAN, "cuda", has_key_mask=True)
    (workload,) = cuda.workloads_of(asked)
    assert (workload.heads, workload.head_dim, workload.element_bytes) == (24, 128, 2)
    assert workload.key_mask
    for name in ("sm90", "sm100"):
        assert cuda.forecast(asked, name).speedup == speedups(plan(workload, name)).predicted
    assert Portable().forecast(asked).speedup is None
    on_cpu = Portable().forecast(problem(HUNYUAN)).speedup
    assert on_cpu == predicted_speedup(HUNYUAN, 2)


@pytest.mark.parametrize("suffix", [0, 5])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_the_portable_providers_cost_is_that_of_its_tiles(stride: int, suffix: int) -> None:
    grid = Neighborhood.of((24, 32), (8, 12), (stride, stride), suffix=suffix)
    cost = 0.0
    piece = pieces_of(AttentionPattern.of_neighborhood(grid, 1))[-1]
    for tiles in product(*cuts.cut_grid(piece).axes):
        queries = math.prod(len(tile.positions) for tile in tiles)
        keys = math.prod(len(tile.keys[0].positions) for tile in tiles)
        masked = not all(tile.full for tile in tiles)
        cost += queries * (keys + suffix) + cuts._GATHERED_KEY * (keys + suffix) + cuts._TILE
        cost += masked * cuts._MASKED_PAIR * queries * keys
    if suffix:
        cost += suffix * grid.tokens + cuts._TILE
    assert predicted_speedup(grid) == pytest.approx(grid.tokens**2 / cost)


def test_a_stride_hint_is_for_the_native_kernels() -> None:
    asked = problem(HUNYUAN)
    hint = "hint: with stride 2x8x8 no key tile would need a mask"
    assert cuda.forecast(asked, "sm90").hint == hint
    assert Portable().forecast(asked).hint == ""
    better = Neighborhood.of((30, 48, 80), (18, 24, 24), (2, 8, 8), suffix=256)
    assert cuda.forecast(problem(better), "sm90").hint == ""


def predicted_speedup(neighborhood: Neighborhood, mask_rows: int = 1) -> float:
    return cuts.predicted_speedup(AttentionPattern.of_neighborhood(neighborhood, 1), mask_rows)


class Net(nn.Module):
    """Images to tokens, then one attention."""

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x)


def explained(size: int, **top: Any) -> gna_compile.Explanation:
    policy = {"version": 1, "min_tokens": 0, "rules": [{"window": 5}], **top}
    return gna_compile.explain(Net(), torch.randn(1, 8, size, size), policy=policy, quiet=True)


@pytest.fixture
def portable_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROVIDERS", [Portable()])


@pytest.mark.usefixtures("portable_only")
def test_a_predicted_slowdown_stays_dense_although_it_saves_flops() -> None:
    [row] = explained(8).rows
    expected = predicted_speedup(Neighborhood.of((8, 8), (5, 5)))
    assert expected < 1
    assert (row.reason, row.predicted_speedup) == ("predicted-slowdown", None)
    assert row.detail == (
        f"predicted speedup {expected:.2f}x (FLOP bound 2.56x) is below min_speedup 1"
    )
    [row] = explained(8, min_speedup=0.9 * expected).rows
    assert row.decision == "gna" and row.predicted_speedup == expected


@pytest.mark.usefixtures("portable_only")
def test_explain_shows_the_prediction_against_the_bound() -> None:
    explanation = explained(64)
    [row] = explanation.rows
    expected = predicted_speedup(Neighborhood.of((64, 64), (5, 5)))
    assert 1 < expected < 163.84
    assert row.as_dict()["predicted_speedup"] == row.predicted_speedup == expected
    text = io.StringIO()
    explanation.print(Console(file=text, width=120))
    assert "speedup" in text.getvalue() and "(bound)" in text.getvalue()
    assert f"{expected:.2f}x" in text.getvalue() and "(163.84x)" in text.getvalue()


@pytest.mark.usefixtures("portable_only")
def test_a_native_provider_is_held_to_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the forecast of a native provider in place of the portable one's, its table decides and hints."""
    monkeypatch.setattr(Portable, "forecast", lambda _, asked: cuda.forecast(asked, "sm90"))
    policy = {"window": 16, "stride": [15, 16]}
    explanation = explained(64, rules=[policy])
    [row] = explanation.rows
    neighborhood = Neighborhood.of((64, 64), (16, 16), (15, 16))
    asked = problem(neighborhood, batch=1, heads=1, head_dim=8, dtype=torch.float32)
    assert row.predicted_speedup == cuda.forecast(asked, "sm90").speedup
    assert row.detail == "hint: with stride 16x16 no key tile would need a mask"
    text = io.StringIO()
    explanation.print(Console(file=text, width=120))
    assert row.detail in text.getvalue()


@pytest.mark.parametrize("first", [64, 16])
def test_prediction_installs_no_guard(first: int) -> None:
    """One graph serves sizes on both sides of what a prediction would decide."""
    policy = {"version": 1, "min_tokens": 0, "min_speedup": 0, "rules": [{"window": 5}]}
    options: dict[str, Any] = {"policy": policy, "inner": "eager"}
    compiled = torch.compile(Net(), backend="gna", options=options)
    image = torch.randn(1, 8, first, first)
    torch._dynamo.mark_dynamic(image, 2)
    torch._dynamo.mark_dynamic(image, 3)
    compiled(image)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(torch.randn(1, 8, 80 - first, 80 - first))


@pytest.mark.parametrize("window", [(64, 64), (16, 16), (13, 13)])
def test_the_cpu_kernels_forecast_counts_its_own_tiles(window: tuple[int, int]) -> None:
    grid = Neighborhood.of((64, 64), window)
    found = Cpu().forecast(problem(grid)).speedup
    tile_bound = grid.tokens**2 / cpu_tiles.pairs(AttentionPattern.of_neighborhood(grid, 1))
    assert found is not None
    assert 0.5 * tile_bound < found < tile_bound
