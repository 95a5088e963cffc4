"""The model-level oracle itself: it must mask what it is told to and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_model import Call, attention_calls, masked
from models import build
from oracle import mask as gna_mask
from torch import Tensor, nn


class Attention(nn.Module):
    """One attention, spelt as the options say."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query=query, key=key, value=value, **options)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.second(self.first(x, x, x, **options), x, x)


def by_hand(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor) -> Tensor:
    scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5 + bias
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value.double()).float()


@pytest.mark.parametrize("own", ["none", "bool", "float", "causal"])
def test_the_mask_is_combined_with_the_models_own(own: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 8)
    # Every token sees itself, so that no row is empty.
    given = (torch.rand(9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    visible, bias = given, torch.zeros(9, 9)
    options: dict[str, Any] = {}
    if own == "bool":
        options["attn_mask"] = (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
        visible = visible & options["attn_mask"]
    elif own == "float":
        options["attn_mask"] = bias = torch.randn(9, 9)
    elif own == "causal":
        options["is_causal"] = True
        visible = visible & torch.ones(9, 9, dtype=torch.bool).tril()
    model = Attention()
    with masked(model, {"": given}) as calls:
        output = model(x, x, x, **options)
    assert [call.masked for call in calls] == [True]
    torch.testing.assert_close(output, by_hand(x, x, x, visible, bias))
    assert (output - model(x, x, x, **options)).abs().max() > 0.1


def test_scale_and_grouped_heads_pass_through() -> None:
    torch.manual_seed(1)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    model = Attention()
    everything = torch.ones(6, 6, dtype=torch.bool)
    with masked(model, {"*": everything}):
        output = model(query, key, key, scale=0.7, enable_gqa=True)
    repeated = key.repeat_interleave(2, dim=1)
    expected = by_hand(query * 0.7 * 8**0.5, repeated, repeated, everything, torch.zeros(6, 6))
    torch.testing.assert_close(output, expected)


def test_only_the_named_layer_is_masked_and_the_rest_runs_as_before() -> None:
    torch.manual_seed(2)
    x = torch.randn(1, 1, 7, 8)
    own_token = torch.eye(7, dtype=torch.bool)
    model = Pair()
    with masked(model, {"first": own_token}) as calls:
        output = model(x)
    assert [(call.layer, call.masked) for call in calls] == [("first", True), ("second", False)]
    # A token that sees only itself gets its own value, so the first attention is the identity.
    torch.testing.assert_close(output, F.scaled_dot_product_attention(x, x, x))


def test_a_function_chooses_by_call() -> None:
    x = torch.randn(1, 1, 7, 8)
    model = Pair()

    def second_only(call: Call) -> Tensor | None:
        return torch.eye(7, dtype=torch.bool) if call.index == 1 else None

    with masked(model, second_only) as calls:
        torch.testing.assert_close(model(x), x)
    assert [call.masked for call in calls] == [False, True]


def test_nothing_is_left_behind_even_after_an_error() -> None:
    x = torch.randn(1, 1, 7, 8)
    model = Pair()
    before = model(x)

    def fails_at_the_second(call: Call) -> Tensor | None:
        if call.index == 1:
            raise ZeroDivisionError
        return torch.eye(7, dtype=torch.bool)

    with masked(model, fails_at_the_second) as calls, pytest.raises(ZeroDivisionError):
        model(x)
    assert len(calls) == 2
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert len(calls) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    x = torch.randn(1, 1, 7, 8)
    model = Pair()
    everything = torch.ones(7, 7, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match=r"no attention ran in \['third'\]"),
        masked(model, {"first": everything, "third": everything}),
    ):
        model(x)


def test_a_mask_of_another_size_is_an_error() -> None:
    x = torch.randn(1, 1, 7, 8)
    model = Pair()
    with (
        pytest.raises(ValueError, match=r"'first' is \(6, 6\), its attention \(7, 7\)"),
        masked(model, {"first": torch.ones(6, 6, dtype=torch.bool)}),
    ):
        model(x)


REAL = [
    # name, layers to mask, prefix and suffix around the grid, self- and cross-attentions left alone
    ("flux", "*transformer_blocks.*.attn", 14, 0, 0),
    ("hunyuan-video", "*transformer_blocks.*.attn", 0, 14, 1),
    ("wan", "blocks.*.attn1", 0, 0, 2),
    ("sd3", "transformer_blocks.*.attn", 0, 14, 1),
    ("vit", "layers.*.attention", 1, 0, 0),
    ("timm-vit", "blocks.*.attn", 1, 0, 0),
]


@pytest.mark.parametrize(("name", "layers", "prefix", "suffix", "others"), REAL)
def test_real_models(name: str, layers: str, prefix: int, suffix: int, others: int) -> None:
    built = build(name, batch=2)
    plain = built.run()
    grid = built.grid
    window = tuple(max(1, length // 2) for length in grid)
    everything = gna_mask(grid, grid, prefix=prefix, suffix=suffix)
    with masked(built.model, {layers: everything}) as calls:
        torch.testing.assert_close(built.run(), plain, rtol=1e-5, atol=1e-5)
    assert sum(not call.masked for call in calls) == others
    assert sum(call.masked for call in calls) >= 2
    restricted = gna_mask(grid, window, prefix=prefix, suffix=suffix)
    with masked(built.model, {layers: restricted}) as calls:
        changed = built.run()
    assert sum(not call.masked for call in calls) == others
    assert (changed - plain).abs().max() > 0.02 * plain.std()
    assert [call.masked for call in attention_calls(built.model, built.inputs)] == [False] * len(
        calls
    )
    torch.testing.assert_close(built.run(), plain, rtol=0, atol=0)
