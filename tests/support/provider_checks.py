"""What every provider must get right about hidden and non-finite values, and about repeating itself.

Each check runs the op, so it tests the provider that the caller's `providers.PROVIDERS` chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import oracle
import torch
from problems import ones_for, problem_of
from torch import Tensor

from gna_compile import ops
from gna_compile.geometry import AttentionPattern, GlobalTokens, HeadGroup, Link
from gna_compile.providers import Forward, Gradients, OutputGradients, Provider

SDPA: Any = torch.nn.functional.scaled_dot_product_attention
POISON = [math.nan, math.inf, -math.inf]
PADDING = [*POISON, 3e38]
WHERE = ["query", "key", "value", "grad"]
GEOMETRY: dict[str, Any] = {
    "grid": (5, 6),
    "window": (2, 3),
    "stride": (2, 1),
    "causal": (False, True),
    "prefix": 1,
    "suffix": 2,
}


def poisoned(where: str, poison: float, tokens: int) -> dict[str, Tensor]:
    """query, key, value and the output's gradient, one of them with a poisoned element a head."""
    generator = torch.Generator().manual_seed(tokens + ord(where[0]))
    tensors = {
        name: torch.randn(2, heads, tokens, 4, generator=generator)
        for name, heads in (("query", 4), ("key", 2), ("value", 2), ("grad", 4))
    }
    for batch, head in itertools.product(range(2), range(tensors[where].shape[1])):
        token = int(torch.randint(tokens, (), generator=generator))
        tensors[where][batch, head, token, head % 4] = poison
    return tensors


def same_where_finite(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Non-finite in the same places, and the same elsewhere."""
    assert torch.equal(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(
        actual.nan_to_num(0, 0, 0).double(),
        expected.detach().nan_to_num(0, 0, 0),
        rtol=tolerance,
        atol=tolerance,
    )


def check_poison_reaches_the_rows_that_see_it_and_no_others(
    where: str, poison: float, dtype: torch.dtype = torch.float32
) -> None:
    """One poisoned element a head in query, key, value or the output's gradient."""
    mask = oracle.mask(**GEOMETRY)
    tensors = poisoned(where, poison, mask.shape[0])
    names = ("query", "key", "value")
    inputs = query, key, value = [tensors[name].to(dtype).requires_grad_() for name in names]
    key_mask = torch.tensor([[True, False, True], [False, True, True]])
    output, lse = ops.neighborhood_attention(
        *inputs, **GEOMETRY, key_mask=key_mask, return_logsumexp=True
    )
    expected, expected_lse = oracle.attention(
        query, key, value, visible=mask, key_mask=key_mask, prefix=1
    )
    if where != "grad":
        assert not expected.isfinite().all()
        if poison == poison and where == "value":
            assert torch.equal(output.isposinf(), expected.isposinf())
            assert torch.equal(output.isneginf(), expected.isneginf())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    same_where_finite(output.detach(), expected, tolerance)
    same_where_finite(lse.detach(), expected_lse, tolerance)
    grads = torch.autograd.grad(output, inputs, tensors["grad"].to(dtype))
    # The second oracle's rows must be taken one by one if the gradient is what is poisoned.
    expected_grads = torch.autograd.grad(
        oracle._row_by_row(*_repeated(inputs), seen=_seen(mask, key_mask), scale=0.5)[0],
        inputs,
        tensors["grad"].to(dtype).double(),
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        same_where_finite(grad, expected_grad.double(), tolerance)


def _repeated(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.double() for x in inputs)
    return query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)


def _seen(mask: Tensor, key_mask: Tensor) -> Tensor:
    seen = mask[None].repeat(2, 1, 1)
    seen[:, :, :1] &= key_mask[:, None, :1]
    seen[:, :, -2:] &= key_mask[:, None, 1:]
    return seen


def check_padding_may_hold_anything(poison: float) -> None:
    """Hidden global keys, whatever they hold, change nothing."""
    grid: dict[str, Any] = {"grid": (7,), "window": (3,), "prefix": 2, "suffix": 2}
    clean = [torch.randn(1, 2, 11, 8) for _ in range(3)]
    dirty = [x.clone() for x in clean]
    for tensor in dirty[1:]:
        tensor[:, :, [0, 10]] = poison
    key_mask = torch.tensor([[False, True, True, False]])
    results = []
    for inputs in (clean, dirty):
        leaves = [x.requires_grad_() for x in inputs]
        output = ops.neighborhood_attention(*leaves, **grid, key_mask=key_mask)
        assert isinstance(output, Tensor)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def check_rows_of_minus_infinity_give_zero(low: float) -> None:
    """Token 0 and 1 see keys that make all their logits -inf, by value or by overflow."""
    query, key, value = torch.rand(1, 1, 6, 4) + 1, torch.rand(1, 1, 6, 4), torch.rand(1, 1, 6, 4)
    key[0, 0, :2] = low
    inputs = [x.requires_grad_() for x in (query, key, value)]
    output, lse = ops.neighborhood_attention(
        *inputs, grid=(6,), window=(2,), stride=(2,), scale=4.0, return_logsumexp=True
    )
    assert (output[0, 0, :2] == 0).all()
    assert lse[0, 0].isneginf().tolist() == [True, True, False, False, False, False]
    dense = SDPA(*inputs, attn_mask=oracle.mask((6,), (2,), (2,)), scale=4.0)
    torch.testing.assert_close(output, dense)
    grads = torch.autograd.grad(output[:, :, 2:].sum(), inputs)
    for grad, leaf in zip(grads, inputs, strict=True):
        if leaf is query and low == -math.inf:
            # As in dense attention: weight 0 times a key of -inf.
            assert grad[0, 0, :2].isnan().all()
            grad = grad[:, :, 2:]
        else:
            assert (grad[0, 0, :2] == 0).all()
        assert grad.isfinite().all()


def check_results_are_bitwise_repeatable() -> None:
    geometry: dict[str, Any] = {"grid": (12, 12), "window": (5, 5), "prefix": 3}
    inputs = [torch.randn(1, 4, 147, 16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 4, 147, 16)
    runs = []
    for _ in range(2):
        output = ops.neighborhood_attention(*inputs, **geometry)
        assert isinstance(output, Tensor)
        runs.append([output, *torch.autograd.grad(output, inputs, grad)])
    assert all(map(torch.equal, *runs))


def check_a_pattern_without_keys_gives_zero(provider: Provider) -> None:
    pattern = AttentionPattern(
        (GlobalTokens(3),), (GlobalTokens(0),), ((Link.FULL,),), (HeadGroup(2, ()),)
    )
    asked = problem_of(pattern)
    inputs = ones_for(asked)
    results = Forward(inputs.query.clone(), inputs.query.new_zeros(inputs.query.shape[:3]))
    provider.forward(asked, inputs, results)
    assert (results.output == 0).all() and results.logsumexp.isneginf().all()
    gradients = Gradients(*(torch.full_like(x, torch.nan) for x in inputs[:3]))
    provider.backward(asked, inputs, results, OutputGradients(*results), gradients)
    assert (gradients.query == 0).all()
