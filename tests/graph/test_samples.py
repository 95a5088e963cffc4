"""Attention under torch.func: what is rewritten is self-attention on the claimed grid, sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_programs import CHANNELS, HEIGHT, WIDTH, program, tokens, truth
from small_net import policy
from torch import Tensor, fx
from torch.func import functional_call, grad, hessian, jvp, vjp
from torch.nn import functional as F

from gna_compile import backend
from gna_compile.decision import Decision
from gna_compile.graph.tokens.cells import UNKNOWN, Source, Tokens, lattice
from gna_compile.graph.tokens.samples import Samples
from gna_compile.graph.tokens.weights import is_weight
from gna_compile.options import Options
from gna_compile.reasons import Reason

WINDOW, STRIDE = (2, 3), (2, 1)
POLICY = policy({"window": list(WINDOW), "stride": list(STRIDE)})


def compiled(
    function: Callable[..., Any],
    *inputs: Any,
    the_policy: Any = POLICY,
    dynamic: bool | None = None,
    **options: Any,
) -> tuple[Any, list[Decision]]:
    """The result of the compiled function, and the decisions on its attention."""
    found: list[Decision] = []
    decide = backend.decide_graph

    def watched(*args: Any) -> Any:
        plan = decide(*args)
        found.extend(plan.decisions["default"])
        return plan

    torch._dynamo.reset()
    options = {"policy": the_policy, "inner": "eager", **options}
    with mock.patch.object(backend, "decide_graph", watched):
        run = torch.compile(
            function, backend="gna", options=options, fullgraph=True, dynamic=dynamic
        )
        return run(*inputs), found


def decision_on(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Decision:
    _, (decision,) = compiled(function, *inputs, **kwargs)
    return decision


def masked_attention(grid: tuple[int, ...]) -> Callable[..., Tensor]:
    visible = oracle.mask(grid, WINDOW, STRIDE)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1) @ value

    return attend


def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def on_itself(x: Tensor) -> Tensor:
    x = tokens(x)
    return F.scaled_dot_product_attention(x, x, x)


def images(*batch: int) -> Tensor:
    return torch.randn(*batch, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


# --- programs of known truth ---------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 120, 24))
def test_random_programs_are_rewritten_only_where_it_is_true(first: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + 24):
        the_program = program(seed)
        true = truth(the_program)
        if true is None:
            continue
        x = images(*the_program.batch)
        attend = F.scaled_dot_product_attention if seed % 2 else unfused
        dense = the_program.run(x, attend)
        result, (decision,) = compiled(lambda x, p=the_program, a=attend: p.run(x, a), x)
        outcomes[decision.reason.value if decision.reason else "rewritten"] += 1
        if decision.layout is None or not decision.is_rewritten:
            torch.testing.assert_close(result, dense, msg=the_program.text)
            continue
        grid = tuple(map(int, decision.layout.grid))
        assert true.is_self(), the_program.text
        assert true.is_raster(grid), the_program.text
        expected = the_program.run(x, masked_attention(grid))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert outcomes["rewritten"] > 0
    assert sum(outcomes.values()) > outcomes["rewritten"]


def test_the_truth_tells_programs_apart() -> None:
    found = [truth(program(seed)) for seed in range(200)]
    known = [true for true in found if true is not None]
    raster = [true for true in known if true.is_self() and true.is_raster((HEIGHT, WIDTH))]
    assert 10 < len(raster) < len(known) - 10


# --- samples of tokens ---------------------------------------------------------------------------


@st.composite
def numbered(draw: st.DrawFn, count: int = 1) -> list[Tokens]:
    """Tensors that were made of one source by moves that only numpy knows."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    whole = lattice(Source("x", "input", shape))
    (source,) = whole.cells
    found = []
    for _ in range(count):
        axes = [np.broadcast_to(axis, shape) for axis in whole.cells[source] if axis is not None]
        for _ in range(draw(st.integers(0, 3))):
            dim = draw(st.integers(0, len(shape) - 1))
            if draw(st.booleans()):
                axes = [np.flip(axis, dim) for axis in axes]
            else:
                axes = [np.roll(axis, 1, dim) for axis in axes]
        if count == 1 and draw(st.booleans()):
            axes[0] = np.where(axes[0] == axes[0].max(), UNKNOWN, axes[0])
        found.append(Tokens(shape, {source: tuple(axis.astype(np.int32) for axis in axes)}))
    return found


def spelled_out(whole: Tokens) -> dict[Source, list[Any]]:
    return {
        source: [None if a is None else np.broadcast_to(a, whole.shape).tolist() for a in axes]
        for source, axes in whole.cells.items()
    }


@given(numbered(), st.data())
def test_all_samples_put_together_are_the_tensor(
    tensors: list[Tokens], data: st.DataObject
) -> None:
    (whole,) = tensors
    dim = data.draw(st.integers(0, len(whole.shape) - 1))
    samples = Samples()
    one = samples.one(whole, dim)
    if one is None:
        return
    assert one.shape == whole.shape[:dim] + whole.shape[dim + 1 :]
    again = samples.all(one, dim, whole.shape[dim])
    assert again.shape == whole.shape
    (known,) = spelled_out(whole).values()
    (found,) = spelled_out(again).values()
    for axis, other in zip(np.array(known), np.array(found), strict=True):
        # A cell that is not known in one sample is not known in any.
        assert (other[other != UNKNOWN] == axis[other != UNKNOWN]).all()
        assert (other[axis == UNKNOWN] == UNKNOWN).all()


@given(numbered(2), st.data())
def test_samples_are_alike_exactly_if_the_tensors_are(
    tensors: list[Tokens], data: st.DataObject
) -> None:
    one, other = tensors
    dim = data.draw(st.integers(0, len(one.shape) - 1))
    samples = Samples()
    left, right = (samples.one(whole, dim) for whole in tensors)
    assert left is not None
    assert right is not None
    assert (spelled_out(left) == spelled_out(right)) == (spelled_out(one) == spelled_out(other))


def test_samples_of_two_vmaps_have_two_sources() -> None:
    whole = lattice(Source("x", "input", (3, 4)))
    one, other = Samples().one(whole, 0), Samples().one(whole, 0)
    assert one is not None
    assert other is not None
    assert one.cells.keys() != other.cells.keys()


def test_what_was_made_of_one_sample_is_another_sources_of_the_next() -> None:
    samples = Samples()
    made = lattice(Source("conv2d", "stem", (4, 5), spatial={0, 1}))
    together = samples.all(made, 0, 3)
    ((source, axes),) = together.cells.items()
    assert source.extents == (3, 4, 5)
    assert source.spatial == {1, 2}
    assert [None if a is None else a.shape for a in axes] == [(3, 1, 1), (1, 4, 1), (1, 1, 5)]


# --- single cases --------------------------------------------------------------------------------


def test_keys_that_are_no_sample_are_other_tokens() -> None:
    x = images(3, 2)
    queries = decision_on(
        lambda x: torch.vmap(
            lambda q: F.scaled_dot_product_attention(tokens(q), tokens(x[0]), tokens(x[0]))
        )(x),
        x,
    )
    assert queries.reason is Reason.LAYOUT_UNKNOWN
    keys = decision_on(
        lambda x: torch.vmap(
            lambda a: torch.vmap(
                lambda b: F.scaled_dot_product_attention(tokens(a), tokens(b), tokens(b))
            )(x)
        )(x),
        x,
    )
    assert keys.reason is Reason.LAYOUT_UNKNOWN


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.roll(1, 0),
        lambda x: x.flip(0),
        lambda x: x[:1],
        lambda x: torch.cat([x[:1], x[1:].flip(0)]),
    ],
)
def test_keys_of_another_sample_are_other_tokens(move: Callable[[Tensor], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(tokens(q), tokens(k), tokens(k))

    found = decision_on(
        lambda x: torch.vmap(attend)(x, move(x).expand_as(x)),
        images(3, 2),
    )
    assert found.reason in (Reason.LAYOUT_UNKNOWN, Reason.CROSS_ATTENTION)


def test_a_write_to_one_sample_is_a_write_to_the_tensor() -> None:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        torch.vmap(lambda t: t.copy_(t.flip(-1)))(x)
        return on_itself(x)

    assert decision_on(write, images(3, 2)).reason is Reason.LAYOUT_UNKNOWN
    nested = decision_on(lambda x: torch.vmap(write)(x), images(3, 2))
    assert nested.reason is Reason.LAYOUT_UNKNOWN


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_vmap_over_the_tokens_leaves_no_grid(dim: int) -> None:
    x = images(2, 3)
    found = decision_on(
        lambda x: torch.vmap(lambda t: F.scaled_dot_product_attention(t, t, t), in_dims=dim)(x), x
    )
    assert not found.is_rewritten


def test_global_tokens_of_the_same_source_are_no_global_tokens() -> None:
    def attend(a: Tensor, x: Tensor) -> Tensor:
        z = torch.cat([tokens(a), tokens(x[0])], -2)
        return F.scaled_dot_product_attention(z, z, z)

    found = decision_on(lambda x: torch.vmap(lambda a: attend(a, x))(x), images(3, 2))
    assert found.reason is Reason.LAYOUT_UNKNOWN


def test_a_declared_grid_holds_for_each_sample() -> None:
    x = torch.randn(3, 2, HEIGHT * WIDTH, 8)
    declared = {**POLICY, "layout": {"grid": [HEIGHT, WIDTH]}}

    def attend(x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x)

    found = decision_on(lambda x: torch.vmap(attend)(x), x, the_policy=declared)
    assert found.layout is not None
    assert found.layout.grid == (HEIGHT, WIDTH)
    assert decision_on(lambda x: torch.vmap(attend)(x), x).reason is Reason.LAYOUT_UNKNOWN


@pytest.mark.parametrize("is_sample", [False, True])
def test_masks_of_global_tokens(is_sample: bool) -> None:
    x, text = torch.randn(3, 2, HEIGHT * WIDTH, 8), torch.randn(3, 2, 4, 8)
    visible = torch.arange(4 + HEIGHT * WIDTH) != 2
    shown = visible.expand(3, 2, 1, 1, -1) if is_sample else visible.expand(2, 1, 1, -1)
    rule = {"window": list(WINDOW), "stride": list(STRIDE), "key_mask": "global_tokens"}
    declared = {**policy(rule), "layout": {"grid": [HEIGHT, WIDTH], "prefix": 4}}

    def attend(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of_sample(x: Tensor, text: Tensor, shown: Tensor) -> Tensor:
            z = torch.cat([text, x], 1).unsqueeze(1)
            return attention(z, z, z, attn_mask=shown)

        return lambda *inputs: torch.vmap(of_sample, in_dims=(0, 0, 0 if is_sample else None))(
            *inputs
        )

    see = oracle.mask((HEIGHT, WIDTH), WINDOW, STRIDE, prefix=4)

    def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        scores = (q @ k.mT * 8**-0.5).masked_fill(~(see & attn_mask), -torch.inf)
        return torch.softmax(scores, -1) @ v

    function = attend(F.scaled_dot_product_attention)
    result, (found,) = compiled(function, x, text, shown, the_policy=declared)
    assert found.is_rewritten
    torch.testing.assert_close(result, attend(masked)(x, text, shown), rtol=1e-4, atol=1e-4)
    checked = decision_on(function, x, text, shown, the_policy=declared, verify_masks=True)
    assert checked.reason is (Reason.MASK if is_sample else None)


def test_a_second_derivative_stays_dense() -> None:
    def loss(x: Tensor) -> Tensor:
        x = tokens(x)
        return unfused(x, x, x).square().sum()

    def twice(x: Tensor) -> Tensor:
        return grad(lambda y: grad(loss)(y).square().sum())(x)

    x = images(2)
    for function in (twice, lambda x: jvp(grad(loss), (x,), (x,))[1]):
        result, (found,) = compiled(function, x)
        assert found.reason is Reason.SECOND_DERIVATIVE
        torch.testing.assert_close(result, function(x))
    _, (found,) = compiled(lambda x: hessian(lambda s: loss(x * s))(torch.ones(1)), x)
    assert found.reason is Reason.SECOND_DERIVATIVE


def test_a_gradient_inside_training_stays_dense() -> None:
    def step(x: Tensor, scale: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            x = tokens(x * scale)
            return unfused(x, x, x).square().sum()

        return grad(loss)(x).square().sum()

    x = images(2)
    scale = torch.ones((), requires_grad=True)
    result, (found,) = compiled(step, x, scale, inner="aot_eager")
    assert found.reason is Reason.SECOND_DERIVATIVE
    torch.testing.assert_close(
        torch.autograd.grad(result, scale), torch.autograd.grad(step(x, scale), scale)
    )
    with torch.no_grad():
        assert decision_on(step, x, scale).is_rewritten


def test_a_subgraph_inside_a_transform_stays_dense() -> None:
    def inside(x: Tensor) -> Tensor:
        return torch.vmap(
            lambda t: torch.utils.checkpoint.checkpoint(on_itself, t, use_reentrant=False)
        )(x)

    found: list[Decision] = []

    def look(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        plan = backend.decide_graph(gm, inputs, Options.parse({"policy": POLICY}))
        found.extend(plan.decisions["default"])
        return lambda *_: (torch.zeros(3),)

    torch.compile(inside, backend=look, fullgraph=True)(images(3, 2))
    (decision,) = found
    assert decision.reason is Reason.OPAQUE
    assert "inside vmap" in decision.detail


def test_a_vmap_inside_a_subgraph_is_rewritten() -> None:
    found = decision_on(
        lambda x: torch.utils.checkpoint.checkpoint(
            lambda x: torch.vmap(on_itself)(x), x, use_reentrant=False
        ),
        images(3, 2),
        inner="aot_eager",
    )
    assert found.is_rewritten


@pytest.mark.skipif(
    torch.__version__.startswith(("2.11", "2.12")),
    reason="this torch cannot trace a product of symbolic sizes under vmap",
)
def test_sizes_may_be_symbols() -> None:
    x = images(3, 2)

    def function(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.vmap(lambda t: attend(tokens(t), tokens(t), tokens(t)), in_dims=1)

    result, (found,) = compiled(
        lambda x: function(F.scaled_dot_product_attention)(x), x, dynamic=True
    )
    assert found.is_rewritten
    expected = function(masked_attention((HEIGHT, WIDTH)))(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


# --- weights -------------------------------------------------------------------------------------


def weights_in(function: Callable[..., Any], *inputs: Any) -> set[str]:
    found: set[str] = set()

    def look(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.update(n.name for n in gm.graph.find_nodes(op="placeholder") if is_weight(n))
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=look, fullgraph=True)(*inputs)
    return {name.removeprefix("l_").removesuffix("_") for name in found}


def test_an_input_is_a_weight_if_it_is_used_as_nothing_else() -> None:
    x, w, b = torch.randn(2, 5, 8), torch.randn(8, 8), torch.randn(8)
    assert weights_in(lambda x, w, b: F.linear(x, w, b), x, w, b) == {"w", "b"}
    assert weights_in(lambda x, w, b: F.linear(x, w, b) + w.sum(), x, w, b) == {"b"}
    assert weights_in(lambda x, w: F.linear(w, w), x, w) == set()
    assert weights_in(lambda x, w: x @ w, x, w) == set()
    assert weights_in(
        lambda x, w: torch.vmap(lambda w: F.linear(x, w))(w), x, torch.randn(3, 8, 8)
    ) == {"w"}
    assert weights_in(lambda x, w: grad(lambda w: F.linear(x, w).sum())(w), x, w) == {"w"}
    assert weights_in(lambda x, w: vjp(lambda w: F.linear(x, w), w)[1](x), x, w) == {"w"}


def test_weights_of_a_functional_call_carry_no_tokens() -> None:
    layer = torch.nn.Conv2d(CHANNELS, 8, 1).requires_grad_(False)
    weights = dict(layer.named_parameters())
    plain = {name: weight.detach() for name, weight in weights.items()}
    for given_weights in (weights, plain):
        found = decision_on(
            lambda w, x: on_itself(functional_call(layer, w, (x,))), given_weights, images(2)
        )
        assert found.is_rewritten
