"""The op on any attention pattern: head groups, what it refuses, what older versions called."""

from __future__ import annotations

from typing import Any

import pattern_oracle
import patterns
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gna_compile.geometry import (
    AttentionPattern,
    GlobalTokens,
    GridTokens,
    HeadGroup,
    Window,
    default_links,
    encode,
)
from gna_compile.ops import schema

FORWARD = torch.ops.gna.attention.v2
SEGMENTS = (GlobalTokens(2), GridTokens((4, 5)), GlobalTokens(3))


def of_groups(*groups: HeadGroup) -> AttentionPattern:
    return AttentionPattern(SEGMENTS, SEGMENTS, default_links(SEGMENTS), groups)


HEADS = of_groups(
    HeadGroup(2, (Window((2, 3), (2, 1)),)),
    HeadGroup(4, (None,)),
    HeadGroup(2, (Window((4, 2), (1, 1), (1, 2), (True, False)),)),
)


def tensors(pattern: AttentionPattern, kv_heads: int = 4, transposed: bool = True) -> list[Tensor]:
    def one(heads: int, tokens: int) -> Tensor:
        if transposed:
            return torch.randn(2, tokens, heads, 8, dtype=torch.float64).transpose(1, 2)
        return torch.randn(2, heads, tokens, 8, dtype=torch.float64)

    keys = pattern.key_tokens
    return [one(pattern.heads, pattern.query_tokens), one(kv_heads, keys), one(kv_heads, keys)]


@pytest.mark.parametrize("provider", ["cpu", "portable"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_head_groups(provider: str, is_masked: bool) -> None:
    inputs = tensors(HEADS)
    mask = torch.rand(2, HEADS.global_keys) < 0.7 if is_masked else None
    dtype = torch.float32 if provider == "cpu" else torch.float64
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    output, lse = FORWARD(*leaves, encode(HEADS), mask, 0.3, [0, 2, 1, 3], provider)
    exact = [x.requires_grad_() for x in inputs]
    expected = pattern_oracle.attention(*exact, pattern=HEADS, key_mask=mask, scale=0.3)
    given = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad((output, lse), leaves, [x.to(dtype) for x in given])
    expected_grads = torch.autograd.grad(expected, exact, given)
    for actual, right in zip((output, lse, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-4, atol=1e-4)
    assert output.stride()[1] < output.stride()[2]


def test_head_groups_with_transforms_and_in_compiled_code() -> None:
    inputs = tensors(HEADS)
    expected, _ = pattern_oracle.attention(*inputs, pattern=HEADS)
    ints = encode(HEADS)

    def attend(*operands: Tensor) -> Tensor:
        output: Tensor = FORWARD(*operands, ints, None, 8**-0.5, [0, 1, 2, 3])[0]
        return output

    stacked = [torch.stack([x, x.flip(0)], dim=1) for x in inputs]
    mapped = torch.vmap(attend, in_dims=1)(*stacked)
    torch.testing.assert_close(mapped[0], expected)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.autograd.gradcheck(attend, [x[:1].requires_grad_() for x in inputs], fast_mode=True)
    torch.autograd.gradcheck(
        attend, [x[:1].requires_grad_() for x in inputs], fast_mode=True, check_forward_ad=True
    )


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_pattern(seed: int, is_masked: bool) -> None:
    pattern = patterns.draw(seed)
    torch.manual_seed(seed % 1000)
    inputs = [x.requires_grad_() for x in tensors(pattern, kv_heads=pattern.heads)]
    mask = torch.rand(2, pattern.global_keys) < 0.7 if is_masked else None
    pair = FORWARD(*inputs, encode(pattern), mask, 0.3, [0, 1, 2, 3])
    expected = pattern_oracle.attention(*inputs, pattern=pattern, key_mask=mask, scale=0.3)
    given_gradient = torch.randn_like(expected[0])
    grads = torch.autograd.grad(pair[0], inputs, given_gradient)
    expected_grads = torch.autograd.grad(expected[0], inputs, given_gradient)
    torch.testing.assert_close((*pair, *grads), (*expected, *expected_grads))
    mapped = torch.vmap(lambda *x: FORWARD(*x, encode(pattern), None, 0.3, [0, 1, 2, 3])[0])
    alone, _ = pattern_oracle.attention(*inputs, pattern=pattern, scale=0.3)
    torch.testing.assert_close(mapped(*(x[:, None] for x in inputs))[:, 0], alone)


def test_heads_of_any_group_are_those_of_it_alone() -> None:
    inputs = tensors(HEADS, kv_heads=8)
    output, lse = FORWARD(*inputs, encode(HEADS), None, 0.3, [0, 1, 2, 3])
    first = 0
    for group in HEADS.head_groups:
        heads = slice(first, first + group.heads)
        own = [x[:, heads] for x in inputs]
        alone = FORWARD(*own, encode(HEADS.of_group(group)), None, 0.3, [0, 1, 2, 3])
        assert torch.equal(output[:, heads], alone[0]) and torch.equal(lse[:, heads], alone[1])
        first = heads.stop


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "heads left out": (
        {"pattern": of_groups(HeadGroup(6, (None,)))},
        "query has 8 heads, but the pattern's head groups have 6",
    ),
    "a group that splits a key head": (
        {"pattern": of_groups(HeadGroup(3, (None,)), HeadGroup(5, (Window((2, 3)),)))},
        "head group 0 has 3 heads, but 2 query heads share a key head",
    ),
    "another grid": (
        {
            "pattern": AttentionPattern(
                SEGMENTS[:2],
                SEGMENTS[:2],
                default_links(SEGMENTS[:2]),
                (HeadGroup(8, (Window((2, 3)),)),),
            )
        },
        r"query has 25 tokens, but 2 \+ 4x5 makes 22",
    ),
    "a list of another version": ({"ints": [9, 0]}, "is of version 9, not 1: compile the model"),
    "a list that ends": ({"ints": encode(HEADS)[:-2]}, "ends where its causal should be"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    facts, message = ERRORS[name]
    ints = facts.get("ints") or encode(facts["pattern"])
    inputs = tensors(HEADS)
    for device in ("cpu", "meta"):
        operands = [x.to(device) for x in inputs]
        if device == "meta" and name == "a group that splits a key head":
            continue  # what runs it is asked when it runs
        with pytest.raises(ValueError, match=message):
            FORWARD(*operands, ints, None, 0.3, [0, 1, 2, 3])


def test_what_an_older_version_compiled_is_refused() -> None:
    for old in schema.OLD_SCHEMAS:
        name = old.split("(")[0]
        op = getattr(torch.ops.gna, name.split(".")[0]).v1
        assert str(op._schema) == f"gna::{old}"
    q = torch.randn(1, 1, 4, 8)
    call = (q, q, q, [4], [2], [1], [1], [False], 0, 0, None, 0.3, [0, 1, 2, 3])
    with pytest.raises(RuntimeError, match=r"an older gna-compile.*compile the model again"):
        torch.ops.gna.attention.v1(*call)
