"""A compiled model that stays dense though its policy has windows: one warning, and only then."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import build
from token_nets import OPTIONS, WIDTH, Attn, Net, Tokens, image, policy
from torch import Tensor, nn

import gna_compile


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The warnings so far."""
    with caplog.at_level(logging.WARNING, "gna_compile"), torch.no_grad():
        yield caplog.messages


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gna_compile"]


def options(rules: Any) -> dict[str, Any]:
    return {**OPTIONS, "policy": rules}


def run(model: nn.Module, rules: Any, *inputs: Any, **kwargs: Any) -> None:
    torch.compile(model, backend="gna", options=options(rules))(*inputs, **kwargs)


def test_a_pattern_that_matches_no_layer(caplog: pytest.LogCaptureFixture) -> None:
    built = build("wan")
    rules = policy({"layers": "transformer_blocks.*.attn1", "window": 3}, name="mine")
    gna_compile.explain(built.model, policy=rules, quiet=True, **built.inputs)
    assert messages(caplog) == []
    for _ in range(2):
        run(built.model, rules, **built.inputs)
    run(build("wan").model, rules, **built.inputs)
    (message,) = messages(caplog)
    assert "'mine'" in message
    assert "none of 2 attention sites of WanTransformer3DModel" in message
    assert "no-rule (2): no rule matches blocks.0.attn1" in message
    assert "transformer_blocks.*.attn1" in message
    assert "gna_compile.explain" in message
    torch._dynamo.reset()
    run(built.model, rules, **built.inputs)
    assert len(messages(caplog)) == 2


def test_a_catch_all_behind_the_pattern(caplog: pytest.LogCaptureFixture) -> None:
    rules = policy({"layers": "layers.*", "window": 3}, {"dense": True})
    run(Net(), rules, image(6, 8))
    (message,) = messages(caplog)
    assert "rule-dense (2): no rule with a window matches blocks.0.attn" in message


def test_blocks_that_have_lost_their_names(caplog: pytest.LogCaptureFixture) -> None:
    built = build("wan")
    model: Any = built.model
    rules = policy({"layers": "blocks.*.attn1", "window": 3})
    model.compile_repeated_blocks(backend="gna", options=options(rules))
    model(**built.inputs)
    (message,) = messages(caplog)
    assert "blocks.0.attn1 is compiled by itself" in message
    assert "gna_compile.prepare(model, policy)" in message


def test_blocks_alone_show_no_grid(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    for block in model.blocks:
        block.compile(backend="gna", options=options(policy()))
    model(image(6, 8))
    (message,) = messages(caplog)
    assert "layout-unknown" in message
    assert 'layout={"grid": [...]}' in message


def test_a_prepared_model(caplog: pytest.LogCaptureFixture) -> None:
    model = gna_compile.prepare(Net(), policy({"layers": "blocks.*.attention", "window": 3}))
    for block in model.blocks:
        block.compile(backend="gna", options=OPTIONS)
    model(image(6, 8))
    (message,) = messages(caplog)
    assert "no rule matches blocks.0.attn" in message


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (policy(min_tokens=1000), "too-few-tokens (2)"),
        (policy({"window": "full"}), "window-covers-grid (2)"),
        (policy(layout={"grid": [8, 6]}), "layout-mismatch (2)"),
    ],
)
def test_the_most_frequent_reason(
    rules: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(Net(), rules, image(6, 8))
    (message,) = messages(caplog)
    assert f"none of 2 attention sites of Net was rewritten; most often {reason}" in message


def test_nothing_is_said_where_dense_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    run(Net(), policy({"dense": True}), image(6, 8))
    run(Net(), policy({"layers": "blocks.1", "window": 3}, {"dense": True}), image(6, 8))
    phased = policy({"phases": "early", "dense": True}, {"window": 3}, phases=["early"])
    with gna_compile.phase("early"):
        run(Net(), phased, image(6, 8))
    assert messages(caplog) == []


class Broken(Net):
    """Compiled in several graphs, of which only the last has a layer with a window."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return super().forward(image) + x.mean()


def test_a_model_in_several_graphs(caplog: pytest.LogCaptureFixture) -> None:
    run(Broken(), policy({"layers": "blocks.1", "window": 3}), image(6, 8))
    assert messages(caplog) == []
    run(Broken(), policy({"layers": "blocks.7", "window": 3}), image(6, 8))
    assert len(messages(caplog)) == 1


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k = self.to_q(x)[:, None], self.to_q(text)[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]


class TwoKinds(Net):
    """Blocks of two classes, the first of which have no self-attention, or no window."""

    def __init__(self, first: type[nn.Module]) -> None:
        super().__init__()
        self.first_blocks = nn.ModuleList(first() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.first_blocks:
            x = block(x, x[:, :5]) if isinstance(block, Cross) else block(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("first", [Cross, Attn])
def test_blocks_of_two_kinds(first: Any, caplog: pytest.LogCaptureFixture) -> None:
    def compiled(rules: Any) -> None:
        model = TwoKinds(first)
        gna_compile.prepare(model, rules, layout={"grid": [6, 8]})
        for block in (*model.first_blocks, *model.blocks):
            block.compile(backend="gna", options=OPTIONS)
        model(image(6, 8))

    compiled(policy({"layers": "blocks.*.attn", "window": 3}))
    assert messages(caplog) == []
    torch._dynamo.reset()
    compiled(policy({"layers": "blocks.*.attn", "window": "full"}))
    (message,) = messages(caplog)
    assert "most often" in message


def test_cross_attention_alone_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(1, 48, WIDTH)
    run(Cross(), policy(), x, x[:, :5])
    assert messages(caplog) == []


def test_a_function(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Tokens(), torch.randn(1, 48, WIDTH)
    torch.compile(lambda x: model(x), backend="gna", options=options(policy()))(x)
    (message,) = messages(caplog)
    assert "layout-unknown" in message
