"""What the Hopper kernel gave on real hardware (tests/support/save_cases.py), against what runs here."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from save_cases import CASES, PATH, SavedCase, checksum
from torch import Tensor

from gna_compile import ops

# Largest ||error|| / ||expected|| of the output, and largest error of a logsumexp.
TOLERANCE = {torch.float16: (1.5e-3, 1e-3), torch.bfloat16: (8e-3, 1e-3)}


@pytest.fixture(scope="module")
def saved() -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = torch.load(PATH, weights_only=True)["results"]
    assert list(results) == list(CASES)
    return results


def by_oracle(case: SavedCase, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    query, key, value = inputs
    prefix = case.geometry.get("prefix", 0)
    visible = oracle.mask(**case.geometry)
    return oracle.attention(
        query, key, value, visible=visible, key_mask=case.key_mask, prefix=prefix
    )


def by_op(
    case: SavedCase, inputs: tuple[Tensor, Tensor, Tensor], provider: str
) -> tuple[Tensor, Tensor]:
    output, logsumexp = ops.neighborhood_attention(
        *inputs,
        **case.geometry,
        key_mask=case.key_mask,
        return_logsumexp=True,
        provider=provider,
    )
    return output, logsumexp


def check(case: SavedCase, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    of_output, of_logsumexp = TOLERANCE[case.dtype]
    output, logsumexp = (tensor.double() for tensor in actual)
    wanted, wanted_logsumexp = (case.rows(tensor).double() for tensor in expected)
    assert output.shape == wanted.shape
    assert logsumexp.shape == wanted_logsumexp.shape
    assert output.isfinite().all()
    assert (output - wanted).norm() < of_output * wanted.norm()
    assert (logsumexp - wanted_logsumexp).abs().max() < of_logsumexp


@pytest.mark.parametrize("name", list(CASES))
def test_saved_results(saved: dict[str, dict[str, Any]], name: str) -> None:
    """Output and logsumexp of the kernel are those of float64 and of the providers here."""
    case, result = CASES[name], saved[name]
    inputs = case.inputs(list(CASES).index(name))
    assert checksum(*inputs) == result["inputs"]
    assert result["output"].dtype == case.dtype
    actual = result["output"], result["logsumexp"]
    check(case, actual, by_oracle(case, inputs))
    for provider in ("cpu", "portable"):
        check(case, actual, by_op(case, inputs, provider))


@pytest.mark.parametrize("name", list(CASES))
def test_cases_and_their_check(name: str) -> None:
    """The check accepts a provider's results, and no others."""
    case = CASES[name]
    inputs = case.inputs(list(CASES).index(name))
    output, logsumexp = by_op(case, inputs, "portable")
    actual = case.rows(output), case.rows(logsumexp)
    expected = by_oracle(case, inputs)
    check(case, actual, expected)
    query, key, value = inputs
    other = by_oracle(case, (query, key.flip(2), value))
    with pytest.raises(AssertionError):
        check(case, actual, other)


def test_inputs_are_the_same_everywhere() -> None:
    case = CASES["1d"]
    inputs = case.inputs(0)
    expected = "c6e7ed7115f687a2e2741fd6fb62896ab4f45957d1fdb515c52e8eb7db850ee2"
    assert checksum(*inputs) == expected
    assert all(tensor.abs().max() <= 2 and tensor.std() > 1 for tensor in inputs)


def test_a_file_of_results_is_small() -> None:
    rows = {
        name: -(-case.batch * case.heads * case.tokens // case.step) for name, case in CASES.items()
    }
    assert all(count >= 50 for count in rows.values()), rows
    size = sum(rows[name] * (2 * case.head_dim + 4) for name, case in CASES.items())
    assert size < 360 << 10
