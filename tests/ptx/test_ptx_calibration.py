"""The interpreter against hardware: what an H200 gave for the cases of tests/support/save_cases.py.

The tensors are the same bit for bit, the kernel and its boxes are, and so should the results be but for
the last bits of sums and exponentials, which hardware computes in an order and a precision of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ptx import build
from ptx.attention import Attention
from save_cases import CASES, PATH, SavedCase
from torch import Tensor

from gna_compile.geometry import Neighborhood
from gna_compile.planner import Workload, plan

pytestmark = pytest.mark.skipif(
    build.CXX is None or build.NVCC is None or not PATH.is_file(),
    reason="needs nvcc, a C++ compiler and results of hardware",
)

# Measured: deviations up to 6e-5 (float64's is 2e-3 in bf16), logsumexp up to 1.5e-6, 99.5 to 100 % of the
# elements bit for bit the same.
LARGEST_DEVIATION = 1.2e-4
LARGEST_ERROR = 3e-6  # of a logsumexp
LEAST_SAME = 0.99


@dataclass
class Saved(Attention):
    case: SavedCase | None = None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        assert self.case is not None
        return *self.case.inputs(self.seed), self.case.key_mask


def _attention(name: str) -> Saved:
    case = CASES[name]
    geometry = case.geometry
    rank = len(geometry["grid"])
    filled = {"stride": (1,) * rank, "dilation": (1,) * rank, "causal": (False,) * rank, **geometry}
    names = ("grid", "window", "stride", "dilation", "causal")
    sizes = {"prefix": geometry.get("prefix", 0), "suffix": geometry.get("suffix", 0)}
    neighborhood = Neighborhood.of(*(filled[name] for name in names), **sizes)
    has_mask = case.key_mask is not None
    workload = Workload(neighborhood, case.heads, case.head_dim, key_mask=has_mask)
    cut = plan(workload, "sm90")
    boxes = [[extent.bit_length() - 1 for extent in box] for box in (cut.query_box, cut.key_box)]
    axes = list(zip(*(filled[name] for name in names), *boxes, strict=True))
    return Saved(
        axes,
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        seed=list(CASES).index(name),
        layout="BHSD",
        case=case,
        **sizes,
    )


@pytest.fixture(scope="module")
def saved() -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = torch.load(PATH, weights_only=True)["results"]
    return results


@pytest.mark.parametrize("name", list(CASES))
def test_results_are_those_of_hardware(saved: dict[str, dict[str, Any]], name: str) -> None:
    attention = _attention(name)
    case = CASES[name]
    output, logsumexp, _ = attention.run("sm90", schedule=len(name), multiprocessors=3)
    actual, expected = case.rows(output).double(), saved[name]["output"].double()
    deviation = float((actual - expected).norm() / expected.norm())
    error = float((case.rows(logsumexp) - saved[name]["logsumexp"]).abs().max())
    same = float((actual == expected).double().mean())
    assert deviation < LARGEST_DEVIATION
    assert error < LARGEST_ERROR
    assert same > LEAST_SAME
