"""Whole models under torch.func in compiled code, against the same models with masks in eager mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from small_net import policy
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, vjp
from torch.nn import functional as F

import gna_compile
from gna_compile import LayoutError, decide
from gna_compile.graph.tokens.layouts import Layout, TokenFlow

GRID, WINDOW = (4, 6), (3, 5)
POLICY: Any = policy({"window": list(WINDOW)})


class Net(nn.Module):
    """Images [.., 3, 8, 12] to tokens [.., 24, 4], one attention.

    Attributes:
        attention: "fused", "unfused", or "masked" for what a rewritten model computes.
    """

    def __init__(self, attention: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 4)
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(-2).mT
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(-2, -4).unbind(-3)
        return self.out(self.attend(q, k, v).transpose(-2, -3).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.attention == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.mT * 8**-0.5
        if self.attention == "masked":
            scores = scores.masked_fill(~oracle.mask(GRID, WINDOW), -torch.inf)
        return torch.softmax(scores, -1) @ v


Function = Callable[..., Any]


def images(*batch: int) -> Tensor:
    return torch.randn(*batch, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def weights(*models: int) -> dict[str, Tensor]:
    """The weights of a net, or of several, side by side."""
    change = 1 + 0.2 * torch.rand(models, generator=torch.Generator().manual_seed(2))
    return {
        name: weight * change.view(*models, *[1] * weight.dim())
        for name, weight in Net("fused").named_parameters()
    }


def check(function: Callable[..., Function], *inputs: Any, **options: Any) -> None:
    """`function(net)` compiled is what it is in eager mode with masks, and is not dense."""
    net, kind = options.pop("net", "fused"), options.pop("inner", "aot_eager")
    attention = Net(net)
    run = torch.compile(
        function(attention),
        backend="gna",
        options={"policy": POLICY, "inner": kind, **options},
        fullgraph=True,
    )
    result = run(*inputs)
    expected = function(Net("masked"))(*inputs)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    dense = function(Net("unfused"))(*inputs)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(result, dense, rtol=1e-4, atol=1e-4)


def loss_of(net: Net) -> Function:
    return lambda weights, x: functional_call(net, weights, (x,)).square().sum()


# --- vmap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["fused", "unfused"])
@pytest.mark.parametrize(("in_dim", "out_dim"), [*itertools.product([0, 1, -5], [0, 2, -1])])
def test_vmap(in_dim: int, out_dim: int, net: str) -> None:
    check(
        lambda m: lambda x: torch.vmap(lambda y: m(y), in_dims=in_dim, out_dims=out_dim)(x),
        images(3, 2),
        net=net,
    )


@pytest.mark.parametrize(
    ("dims", "is_chunked"), [*itertools.product(itertools.product([0, 1, -4], [0, -1]), [0, 1])]
)
def test_nested_vmap(dims: tuple[int, int], is_chunked: int) -> None:
    chunks: dict[str, Any] = {"chunk_size": 2} if is_chunked else {}

    def function(m: Net) -> Function:
        def inner(x: Tensor) -> Tensor:
            return torch.vmap(lambda y: m(y), in_dims=dims[0], out_dims=dims[1])(x)

        return lambda x: torch.vmap(inner, in_dims=1, out_dims=dims[1], **chunks)(x)

    check(function, images(2, 3, 2))


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_heads(dim: int) -> None:
    def function(m: Net) -> Function:
        def run(x: Tensor) -> Tensor:
            x = m.patch(x).flatten(-2).mT
            q, k, v = m.qkv(x).unflatten(-1, (3, 2, 8)).transpose(-2, -4).unbind(-3)
            return torch.vmap(lambda *heads: m.attend(*heads), in_dims=1, out_dims=dim)(q, k, v)

        return run

    check(function, images(3))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_with_random_numbers(randomness: str) -> None:
    check(
        lambda m: (
            lambda x: torch.vmap(lambda y: m(y) + 0 * torch.randn(()), randomness=randomness)(x)
        ),
        images(3, 2),
    )


@pytest.mark.parametrize("dims", [(0, None), (0, 0), (0, 1), (None, 1)])
def test_ensembles(dims: tuple[int | None, int | None]) -> None:
    stacked = weights(2) if dims[0] == 0 else weights()
    x = images(3) if dims[1] is None else images(2, 3) if dims[1] == 0 else images(3, 2)
    check(
        lambda m: (
            lambda w, x: torch.vmap(lambda w, x: functional_call(m, w, (x,)), in_dims=dims)(w, x)
        ),
        stacked,
        x,
    )


def test_training_through_vmap() -> None:
    def gradients(function: Function, net: Net) -> list[Tensor]:
        net.requires_grad_(True)
        loss = function(images(3, 2)).square().sum()
        return list(torch.autograd.grad(loss, list(net.parameters())))

    def function(m: Net) -> Function:
        return lambda x: torch.vmap(lambda y: m(y), in_dims=1)(x)

    net, masked = Net("fused"), Net("masked")
    options: dict[str, Any] = {"policy": POLICY, "inner": "aot_eager"}
    run = torch.compile(function(net), backend="gna", options=options, fullgraph=True)
    actual, expected = gradients(run, net), gradients(function(masked), masked)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


# --- derivatives ---------------------------------------------------------------------------------

DERIVATIVES: dict[str, Callable[[Net], Function]] = {
    "grad": lambda m: lambda w, x: grad(loss_of(m))(w, x),
    "grad by the image": lambda m: lambda w, x: grad(loss_of(m), argnums=1)(w, x),
    "grad_and_value": lambda m: lambda w, x: grad_and_value(loss_of(m))(w, x),
    "has_aux": lambda m: (
        lambda w, x: grad(lambda w, x: (loss_of(m)(w, x), 2 * x), has_aux=True)(w, x)
    ),
    "vjp": lambda m: lambda w, x: vjp(lambda x: m(x), x)[1](torch.ones(2, 24, 4)),
    "jacrev": lambda m: lambda w, x: jacrev(lambda x: m(x).mean(1))(x),
    "grad of vmap": lambda m: (
        lambda w, x: grad(
            lambda w, x: torch.vmap(lambda x: loss_of(m)(w, x), in_dims=1)(x.unsqueeze(0)).sum()
        )(w, x)
    ),
}


@pytest.mark.parametrize("net", ["fused", "unfused"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str, net: str) -> None:
    check(DERIVATIVES[name], weights(), images(2), net=net)


@pytest.mark.parametrize("in_dim", [0, 1])
def test_gradients_of_each_sample(in_dim: int) -> None:
    check(
        lambda m: lambda w, x: torch.vmap(grad(loss_of(m)), in_dims=(None, in_dim))(w, x),
        weights(),
        images(3, 2),
    )


def test_gradients_of_each_sample_of_each_model() -> None:
    check(
        lambda m: (
            lambda w, x: torch.vmap(
                torch.vmap(grad(loss_of(m)), in_dims=(None, 0)), in_dims=(0, None)
            )(w, x)
        ),
        weights(2),
        images(3, 1),
    )


FORWARD: dict[str, Callable[[Net], Function]] = {
    "jvp": lambda m: lambda x: jvp(lambda x: m(x), (x[0],), (x[1],)),
    "vmap of jvp": lambda m: (
        lambda x: torch.vmap(lambda x, t: jvp(lambda x: m(x), (x,), (t,)))(x, x + 1)
    ),
    "jvp of vmap": lambda m: (
        lambda x: jvp(lambda x: torch.vmap(lambda y: m(y), in_dims=1)(x), (x,), (x + 1,))
    ),
    "jacfwd": lambda m: (
        lambda x: jacfwd(lambda s: m(x[0] * s.unsqueeze(-1).unsqueeze(-1)))(torch.ones(3))
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_of_unfused_attention(name: str) -> None:
    check(FORWARD[name], images(2, 2), net="unfused")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_pytorch_has_no_forward_mode_for_fused_attention_on_cpus(inner: str) -> None:
    """Nothing can be rewritten there: PyTorch gives up before it asks a backend."""
    net, x = Net("fused"), images(2)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(net, (x,), (x,))
    run = torch.compile(lambda x: jvp(lambda y: net(y), (x,), (x,)), backend=inner, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward AD"):
        run(x)


def test_inductor_lowers_them() -> None:
    check(
        lambda m: lambda w, x: torch.vmap(grad(loss_of(m)), in_dims=(None, 0))(w, x),
        weights(),
        images(2, 1),
        inner="inductor",
    )
    check(
        lambda m: lambda x: torch.vmap(lambda y: m(y), in_dims=1)(x),
        images(3, 2),
        inner="inductor",
    )


# --- what is said, and what is verified ----------------------------------------------------------


class Views(nn.Module):
    """A model that calls vmap itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net("fused")

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda view: self.net(view), in_dims=1)(x)


def test_reports_name_the_layer_and_show_one_sample() -> None:
    (row,) = gna_compile.explain(Views(), images(2, 3), policy=POLICY, quiet=True).rows
    assert (row.layer, row.decision, row.tokens, row.layout) == ("net", "gna", 24, "4x6")
    assert "gna.attention.v2" in str(gna_compile.graph_diff(Views(), images(2, 3), policy=POLICY))


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp"])
def test_layouts_are_verified_sample_by_sample(name: str, caplog: pytest.LogCaptureFixture) -> None:
    functions: dict[str, Callable[[Net], Function]] = {
        "vmap": lambda m: lambda x: torch.vmap(lambda y: m(y), in_dims=1)(x),
        "grad": lambda m: lambda x: torch.vmap(grad(lambda y: m(y).sum()))(x),
        "jvp": FORWARD["jvp"],
    }
    check(functions[name], images(2, 2), net="unfused", verify="layouts")
    assert "verified" not in caplog.text


def test_a_wrong_layout_of_a_sample_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(3, 2)
    rule: Any = policy({"window": 3})
    for grid in (GRID, GRID[::-1]):
        torch._dynamo.reset()
        layout = Layout.of_grid(grid, source="forged")
        monkeypatch.setattr(decide, "resolve", lambda *_, layout=layout: layout)
        net = Net("fused")
        run = torch.compile(
            lambda x, net=net: torch.vmap(lambda y: net(y), in_dims=1)(x),
            backend="gna",
            options={"policy": rule, "inner": "eager", "verify": "layouts"},
        )
        if grid == GRID:
            run(x)
        else:
            with pytest.raises(LayoutError, match="do not lie on the grid 6×4"):
                run(x)


def test_keys_of_another_sample_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenFlow, "relation", lambda *_: "self")
    monkeypatch.setattr(decide, "resolve", lambda *_: Layout.of_grid(GRID, source="forged"))

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(-2).mT.unsqueeze(1)

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(tokens(q), tokens(k), tokens(k))

    run = torch.compile(
        lambda x: torch.vmap(attend)(x, x.roll(1, 0)),
        backend="gna",
        options={"policy": POLICY, "inner": "eager", "verify": "layouts"},
    )
    with pytest.raises(LayoutError, match="batch row"):
        run(torch.randn(3, 2, 8, *GRID))


def test_attention_that_is_declined_is_exactly_pytorchs() -> None:
    net, x, w = Net("unfused"), images(2, 2), weights()

    def function(x: Tensor) -> Tensor:
        def of_sample(x: Tensor) -> Tensor:
            return grad(lambda x: grad(loss_of(net), argnums=1)(w, x).square().sum())(x)

        return torch.vmap(of_sample)(x)

    options: dict[str, Any] = {"policy": POLICY, "inner": "inductor"}
    result = torch.compile(function, backend="gna", options=options, fullgraph=True)(x)
    torch._dynamo.reset()
    assert torch.equal(result, torch.compile(function, backend="inductor", fullgraph=True)(x))
