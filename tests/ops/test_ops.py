"""The op as PyTorch sees it: schema, fake, autograd, vmap, autocast, compilation, FLOPs, errors."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gna_compile import providers
from gna_compile.geometry import Neighborhood, write_grid
from gna_compile.ops import derivatives, neighborhood_attention, schema
from gna_compile.ops.flops import attention_flops
from gna_compile.providers import Forecast, Problem

SDPA: Any = torch.nn.functional.scaled_dot_product_attention
FORWARD, BACKWARD = torch.ops.gna.attention.v2, torch.ops.gna.attention_backward.v2
TANGENT = torch.ops.gna.attention_tangent.v2

PLAIN: dict[str, Any] = {
    "grid": (4, 3),
    "window": (2, 3),
    "stride": (1, 2),
    "causal": (False, True),
}
TEXT: dict[str, Any] = {"grid": (9,), "window": (3,), "dilation": (2,), "prefix": 1, "suffix": 2}


def tensors(kind: str, heads: int = 4, kv_heads: int = 2, tokens: int = 12) -> list[Tensor]:
    """query, key, value of batch 2 and head_dim 8 in one memory layout."""

    def one(heads: int) -> Tensor:
        if kind == "BSHD":
            return torch.randn(2, tokens, heads, 8).transpose(1, 2)
        if kind == "expanded":
            return torch.randn(2, 1, tokens, 8).expand(2, heads, tokens, 8)
        if kind == "strided D":
            return torch.randn(2, heads, 8, tokens).transpose(2, 3)
        return torch.randn(2, heads, tokens, 8)

    return [one(heads), one(kv_heads), one(kv_heads)]


def pattern(geometry: dict[str, Any], heads: Any = 4) -> list[Any]:
    """The pattern of one grid, as the op takes it."""
    rank = len(geometry["grid"])
    return write_grid(
        geometry["grid"],
        geometry["window"],
        geometry.get("stride", [1] * rank),
        geometry.get("dilation", [1] * rank),
        geometry.get("causal", [False] * rank),
        geometry.get("prefix", 0),
        geometry.get("suffix", 0),
        heads,
    )


def arguments(geometry: dict[str, Any], key_mask: Tensor | None = None) -> list[Any]:
    """Everything after query, key and value, up to the scale."""
    return [pattern(geometry), key_mask, 0.3]


def attend(*inputs: Tensor, **options: Any) -> Tensor:
    output = neighborhood_attention(*inputs, **options)
    assert isinstance(output, Tensor)
    return output


# Schema and version ------------------------------------------------------------------------------


def test_the_version_stands_for_schema_and_autograd_formula() -> None:
    """Compiled graphs are cached by the op's name, with the backward that it had at the time.

    If this fails, the schema or the autograd formula changed. Then bump the overload's version
    (v2 -> v3, in both schemas and wherever the op is called) before updating the digest, or stale
    caches pair the old backward with the new forward. Only a change of comments or names may keep
    the version.
    """
    source = "".join(
        [
            schema.FORWARD_SCHEMA,
            schema.BACKWARD_SCHEMA,
            inspect.getsource(derivatives._setup_context),
            inspect.getsource(derivatives._gradient),
        ]
    )
    digest = hashlib.sha256(source.encode()).hexdigest()
    assert (FORWARD._overloadname, digest[:16]) == ("v2", "5d01aeb5bbeffc65")


def test_schema() -> None:
    assert str(FORWARD._schema) == f"gna::{schema.FORWARD_SCHEMA}"
    assert str(BACKWARD._schema) == f"gna::{schema.BACKWARD_SCHEMA}"
    assert str(TANGENT._schema) == f"gna::{schema.TANGENT_SCHEMA}"
    assert not FORWARD._schema.is_mutable
    assert torch.Tag.pt2_compliant_tag in FORWARD.tags


@pytest.mark.parametrize("needs", ["", "q", "kv", "qkv"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["BHSD", "BSHD", "expanded", "strided D"])
def test_opcheck(kind: str, masked: bool, needs: str) -> None:
    geometry = TEXT if masked else PLAIN
    key_mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
    inputs = tensors(kind)
    for name, tensor in zip("qkv", inputs, strict=True):
        tensor.requires_grad_(name in needs)
    torch.library.opcheck(FORWARD, (*inputs, *arguments(geometry, key_mask), [0, 2, 1, 3]))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("kind", ["BHSD", "BSHD", "expanded", "strided D"])
def test_opcheck_backward(kind: str, with_lse: bool) -> None:
    inputs = tensors(kind)
    output, lse = FORWARD(*inputs, *arguments(PLAIN), [0, 1, 2, 3])
    grad_lse = torch.randn_like(lse) if with_lse else None
    torch.library.opcheck(
        BACKWARD, (torch.randn_like(output), grad_lse, *inputs, output, lse, *arguments(PLAIN))
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_output_order(order: tuple[int, ...]) -> None:
    inputs = tensors("BSHD")
    output, lse = FORWARD(*inputs, *arguments(PLAIN), order)
    assert output.permute(order).is_contiguous()
    assert lse.is_contiguous()
    assert torch.equal(output, FORWARD(*inputs, *arguments(PLAIN), [0, 1, 2, 3])[0])
    meta = FORWARD(*(x.to("meta") for x in inputs), *arguments(PLAIN), order)
    assert meta[0].stride() == output.stride()
    assert (meta[1].stride(), meta[1].dtype) == (lse.stride(), lse.dtype)


def test_the_public_function_keeps_the_order_of_heads_and_tokens() -> None:
    for kind in ("BHSD", "BSHD"):
        inputs = tensors(kind)
        assert attend(*inputs, **PLAIN).stride() == inputs[0].stride()


@pytest.mark.parametrize("kind", ["BHSD", "BSHD", "expanded", "strided D"])
def test_gradients_have_the_layout_of_empty_like(kind: str) -> None:
    inputs = tensors(kind)
    output, lse = FORWARD(*inputs, *arguments(PLAIN), [0, 1, 2, 3])
    grads = BACKWARD(output, None, *inputs, output, lse, *arguments(PLAIN))
    for grad, tensor in zip(grads, inputs, strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()


# Autograd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["output", "logsumexp", "both"])
@pytest.mark.parametrize("geometry", [PLAIN, TEXT])
def test_gradcheck(geometry: dict[str, Any], outputs: str) -> None:
    inputs = [x[:1, :, :, :3].double().detach().requires_grad_() for x in tensors("BSHD", 2, 1)]
    key_mask = torch.tensor([[True, False, True]]) if "prefix" in geometry else None

    def run(*inputs: Tensor) -> Any:
        pair = neighborhood_attention(*inputs, **geometry, key_mask=key_mask, return_logsumexp=True)
        return {"output": pair[0], "logsumexp": pair[1], "both": pair}[outputs]

    assert torch.autograd.gradcheck(run, inputs)


def test_only_what_needs_a_gradient_gets_one() -> None:
    query, key, value = tensors("BHSD")
    key.requires_grad_()
    output = attend(query, key, value, **PLAIN)
    output.sum().backward()
    assert query.grad is None
    assert value.grad is None
    assert key.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_recorded_where_none_is_wanted(mode: Any) -> None:
    query, key, value = (x.requires_grad_() for x in tensors("BHSD"))
    with mode():
        output = attend(query, key, value, **PLAIN)
    assert not output.requires_grad


def test_second_derivative_is_refused_clearly() -> None:
    inputs = [x.requires_grad_() for x in tensors("BHSD")]
    grads = torch.autograd.grad(attend(*inputs, **PLAIN).square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        grads[0].sum().backward()


# Forward mode and function transforms -------------------------------------------------------------

Pair = tuple[Tensor, Tensor]
MASK = torch.tensor([[True, False, True], [False, True, True]])


def doubles(*shape: int) -> tuple[Tensor, ...]:
    """Three tensors in fp64, of 4 query heads and 2 key heads."""
    return tuple(torch.randn(*shape, 2, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2))


def both(geometry: dict[str, Any]) -> tuple[Callable[..., Pair], Callable[..., Pair]]:
    """The op and the oracle on one problem, as functions of query, key and value."""
    prefix = geometry.get("prefix", 0)
    key_mask = MASK if prefix else None
    visible = oracle.mask(**geometry)

    def op(*inputs: Tensor) -> Any:
        return neighborhood_attention(*inputs, **geometry, key_mask=key_mask, return_logsumexp=True)

    def brute_force(*inputs: Tensor) -> Pair:
        return oracle.attention(*inputs, visible=visible, key_mask=key_mask, prefix=prefix)

    return op, brute_force


def loss_of(function: Callable[..., Pair]) -> Callable[..., Tensor]:
    def loss(*inputs: Tensor) -> Tensor:
        output, lse = function(*inputs)
        return output.square().sum() + lse.sin().sum()

    return loss


def jvp(function: Callable[..., Any], inputs: Any, tangents: Any) -> Any:
    """The outputs and their tangents."""
    return torch.func.jvp(function, tuple(inputs), tuple(tangents))


def dual_tangents(function: Callable[..., Pair], inputs: Any, tangents: Any) -> Any:
    with forward_ad.dual_level():
        outputs = function(*map(forward_ad.make_dual, inputs, tangents))
        return tuple(forward_ad.unpack_dual(output).tangent for output in outputs)


@pytest.mark.parametrize("geometry", [PLAIN, TEXT])
def test_tangents(geometry: dict[str, Any]) -> None:
    op, brute_force = both(geometry)
    inputs, tangents = doubles(), doubles()
    expected = jvp(brute_force, inputs, tangents)
    torch.testing.assert_close(jvp(op, inputs, tangents), expected)
    torch.testing.assert_close(torch.func.linearize(op, *inputs)[1](*tangents), expected[1])
    for needs in (False, True):
        leaves = [x.clone().requires_grad_(needs) for x in inputs]
        torch.testing.assert_close(dual_tangents(op, leaves, tangents), expected[1])


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 2)])
def test_tangents_of_some_operands(moving: tuple[int, ...]) -> None:
    op, brute_force = both(TEXT)
    inputs, tangents = doubles(), doubles()

    def some(function: Callable[..., Pair]) -> Any:
        def run(*changed: Tensor) -> Pair:
            new = dict(zip(moving, changed, strict=True))
            return function(*(new.get(i, x) for i, x in enumerate(inputs)))

        return jvp(run, tuple(inputs[i] for i in moving), tuple(tangents[i] for i in moving))

    torch.testing.assert_close(some(op), some(brute_force))


@pytest.mark.parametrize("kind", ["BHSD", "BSHD", "expanded", "strided D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tangents_in_other_types_and_layouts(kind: str, dtype: torch.dtype) -> None:
    op, brute_force = both(PLAIN)
    inputs, tangents = ([x.to(dtype) for x in tensors(kind)] for _ in range(2))
    _, expected = jvp(
        brute_force, tuple(x.double() for x in inputs), tuple(x.double() for x in tangents)
    )
    (output, lse), actual = jvp(op, inputs, tangents)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for tensor, tangent, right in zip((output, lse), actual, expected, strict=True):
        assert (tangent.dtype, tangent.stride()) == (tensor.dtype, tensor.stride())
        torch.testing.assert_close(tangent.double(), right, rtol=tolerance, atol=tolerance)


def test_hidden_values_do_not_reach_tangents() -> None:
    geometry: dict[str, Any] = {"grid": (8,), "window": (2,), "stride": (2,)}
    op, _ = both(geometry)
    inputs, tangents = (tuple(torch.randn(1, 1, 8, 8) for _ in range(3)) for _ in range(2))
    _, clean = jvp(op, inputs, tangents)
    for x in (*inputs[1:], *tangents[1:]):
        x[:, :, :2] = torch.nan
    _, dirty = jvp(op, inputs, tangents)
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one[:, :, 2:], other[:, :, 2:])
        assert other[:, :, :2].isnan().all()


@pytest.mark.parametrize("geometry", [PLAIN, TEXT])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_gradient_transforms(transform: Any, geometry: dict[str, Any]) -> None:
    op, brute_force = both(geometry)
    inputs = doubles()
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss_of(brute_force)(*leaves), leaves)
    actual = transform(loss_of(op), argnums=(0, 1, 2))(*inputs)
    torch.testing.assert_close(actual, expected)


def test_vjp_and_jacobians() -> None:
    op, brute_force = both(PLAIN)
    inputs = doubles()
    upstream = (inputs[0], inputs[0].sum(-1))
    torch.testing.assert_close(
        torch.func.vjp(op, *inputs)[1](upstream), torch.func.vjp(brute_force, *inputs)[1](upstream)
    )
    torch.testing.assert_close(torch.func.jacfwd(op)(*inputs), torch.func.jacrev(op)(*inputs))


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, 0), (None, 1, 2)])
def test_transforms_under_vmap_and_around_it(dims: tuple[int | None, ...]) -> None:
    op, brute_force = both(TEXT)

    def placed(tensors: Any) -> Any:
        return tuple(
            x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(tensors, dims, strict=True)
        )

    inputs, tangents = placed(doubles(3)), placed(doubles(3))

    def one(tensors: Any, index: int) -> Any:
        return tuple(
            x if dim is None else x.select(dim, index) for x, dim in zip(tensors, dims, strict=True)
        )

    def stacked(function: Any) -> Any:
        results = [function(one(inputs, i), one(tangents, i)) for i in range(3)]
        return tuple(map(torch.stack, zip(*results, strict=True)))

    every = (0, 1, 2)
    expected = stacked(lambda x, _: torch.func.grad(loss_of(brute_force), every)(*x))
    actual = torch.vmap(torch.func.grad(loss_of(op), every), in_dims=dims)(*inputs)
    torch.testing.assert_close(actual, expected)
    expected = stacked(lambda x, t: jvp(brute_force, x, t)[1])
    actual = torch.vmap(lambda *x: jvp(op, x[:3], x[3:])[1], in_dims=dims * 2)(*inputs, *tangents)
    torch.testing.assert_close(actual, expected)
    around = jvp(torch.vmap(op, in_dims=dims), inputs, tangents)[1]
    torch.testing.assert_close(around, expected)


def second_derivatives() -> dict[str, Callable[[], Any]]:
    op, _ = both(PLAIN)
    loss, inputs, tangents = loss_of(op), doubles(), doubles()
    gradient = torch.func.grad(loss)

    def reverse_over_dual() -> Any:
        leaf = inputs[0].clone().requires_grad_()
        return torch.autograd.grad(dual_tangents(op, (leaf, *inputs[1:]), tangents)[0].sum(), leaf)

    def dual_over_reverse(*duals: Tensor) -> Any:
        leaf = duals[0]
        return (torch.autograd.grad(loss(leaf, *duals[1:]), leaf)[0],)

    return {
        "hessian": lambda: torch.func.hessian(loss)(*inputs),
        "jacrev of jacfwd": lambda: torch.func.jacrev(torch.func.jacfwd(loss))(*inputs),
        "jacfwd of jacfwd": lambda: torch.func.jacfwd(torch.func.jacfwd(loss))(*inputs),
        "grad of grad": lambda: torch.func.grad(lambda *x: gradient(*x).sum())(*inputs),
        "jvp of grad": lambda: jvp(gradient, inputs, tangents),
        "grad of jvp": lambda: torch.func.grad(lambda *x: jvp(loss, x, tangents)[1])(*inputs),
        "reverse over dual": reverse_over_dual,
        "dual over reverse": lambda: dual_tangents(
            dual_over_reverse, [x.clone().requires_grad_() for x in inputs], tangents
        ),
    }


@pytest.mark.parametrize("case", second_derivatives())
def test_second_derivatives_are_refused_in_every_mode(case: str) -> None:
    with pytest.raises(NotImplementedError, match="gna::attention can be differentiated once"):
        second_derivatives()[case]()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_transforms_within_a_compiled_function(backend: str) -> None:
    op, brute_force = both(TEXT)
    inputs, tangents = doubles(), doubles()

    def derivatives(inputs: Any, tangents: Any) -> Any:
        return jvp(op, inputs, tangents)[1], torch.func.grad(loss_of(op))(*inputs)

    torch._dynamo.reset()
    tangent, gradient = torch.compile(derivatives, backend=backend, fullgraph=True)(
        inputs, tangents
    )
    torch.testing.assert_close(tangent, jvp(brute_force, inputs, tangents)[1])
    torch.testing.assert_close(gradient, torch.func.grad(loss_of(brute_force))(*inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tangents_through_a_compiled_function(backend: str, dynamic: bool) -> None:
    op, brute_force = both(TEXT)
    inputs, tangents = doubles(), doubles()
    torch._dynamo.reset()
    compiled = torch.compile(op, backend=backend, dynamic=dynamic, fullgraph=True)
    compiled(*inputs)
    _, expected = jvp(brute_force, inputs, tangents)
    torch.testing.assert_close(dual_tangents(compiled, inputs, tangents), expected)


def test_opcheck_tangent() -> None:
    inputs, tangents = tensors("BSHD"), tensors("BHSD")
    _, lse = FORWARD(*inputs, *arguments(TEXT, MASK), [0, 1, 2, 3])
    torch.library.opcheck(TANGENT, (*tangents, *inputs, lse, *arguments(TEXT, MASK), [0, 2, 1, 3]))
    with pytest.raises(ValueError, match=r"tangent_key is .*; it must be torch.float32"):
        TANGENT(tangents[0], *tangents[:2], *inputs, lse, *arguments(TEXT), [0, 2, 1, 3])


def test_checkpoint() -> None:
    inputs = [x.requires_grad_() for x in tensors("BHSD")]
    expected = torch.autograd.grad(attend(*inputs, **PLAIN).square().sum(), inputs)
    output = checkpoint(lambda *x: attend(*x, **PLAIN), *inputs, use_reentrant=False)
    actual = torch.autograd.grad(output.square().sum(), inputs)
    assert all(map(torch.equal, actual, expected))


# vmap --------------------------------------------------------------------------------------------


MAPPED = itertools.product([None, 0, 2], [None, 1], [None, 4], [None, 0, 1])


@pytest.mark.parametrize("dims", [dims for dims in MAPPED if dims != (None,) * 4])
def test_vmap(dims: tuple[int | None, ...]) -> None:
    def mapped(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor[0] if dim is None else tensor.movedim(0, dim)

    values = [torch.randn(3, 2, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    masks = torch.rand(3, 2, 3) < 0.6
    args = [mapped(x, dim) for x, dim in zip([*values, masks], dims, strict=True)]

    def run(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Any:
        return neighborhood_attention(
            query, key, value, **TEXT, key_mask=key_mask, return_logsumexp=True
        )

    actual = torch.vmap(run, in_dims=dims)(*args)
    for index in range(3):
        one = [
            x if dim is None else x.select(dim, index) for x, dim in zip(args, dims, strict=True)
        ]
        for all_results, result in zip(actual, run(*one), strict=True):
            torch.testing.assert_close(all_results[index], result)


def test_nested_vmap() -> None:
    inputs = [torch.randn(2, 3, 2, heads, 12, 8) for heads in (4, 2, 2)]
    actual = torch.vmap(torch.vmap(lambda *x: attend(*x, **PLAIN)))(*inputs)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(actual[i, j], attend(*(x[i, j] for x in inputs), **PLAIN))


@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_through_vmap(with_lse: bool) -> None:
    inputs = [torch.randn(3, 2, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    leaves = [x.requires_grad_() for x in (inputs[0], inputs[1], inputs[2][0].detach())]

    def loss(*inputs: Tensor) -> Tensor:
        output, lse = neighborhood_attention(*inputs, **PLAIN, return_logsumexp=True)
        return output.square().sum() + (lse.sin().sum() if with_lse else 0)

    actual = torch.autograd.grad(torch.vmap(loss, in_dims=(0, 0, None))(*leaves).sum(), leaves)
    one_by_one = sum(loss(leaves[0][i], leaves[1][i], leaves[2]) for i in range(3))
    assert isinstance(one_by_one, Tensor)
    torch.testing.assert_close(actual, torch.autograd.grad(one_by_one, leaves))


@pytest.mark.parametrize("with_lse", [False, True])
def test_many_gradients_at_once(with_lse: bool) -> None:
    # `is_grads_batched` maps over the backward op, of whose inputs only the gradients are mapped.
    inputs = [x.requires_grad_() for x in tensors("BSHD")]
    pair = neighborhood_attention(*inputs, **PLAIN, return_logsumexp=True)
    outputs = pair if with_lse else pair[:1]
    upstream = [torch.randn(5, *x.shape) for x in outputs]
    actual = torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=True, is_grads_batched=True
    )
    for index in range(5):
        expected = torch.autograd.grad(
            outputs, inputs, [x[index] for x in upstream], retain_graph=True
        )
        torch.testing.assert_close(tuple(x[index] for x in actual), expected)


# Autocast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in tensors("BHSD", kv_heads=4)]
    mixed = [inputs[0].to(dtype), *inputs[1:]]
    with torch.autocast("cpu", dtype):
        output = attend(*mixed, **PLAIN)
        dense = SDPA(*mixed)
        same = attend(*(x.to(dtype) for x in inputs), **PLAIN)
    assert output.dtype == dense.dtype == dtype
    assert torch.equal(output, same)
    output.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


def test_autocast_leaves_fp64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*(x.double() for x in tensors("BHSD")), **PLAIN).dtype == torch.float64


@pytest.mark.parametrize("with_lse", [False, True])
def test_a_backward_within_autocast_keeps_its_precision(with_lse: bool) -> None:
    inputs = [x.requires_grad_() for x in tensors("BHSD")]
    pair = neighborhood_attention(*inputs, **PLAIN, return_logsumexp=True)
    outputs = pair if with_lse else pair[:1]
    upstream = [torch.randn_like(x) for x in outputs]
    expected = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(outputs, inputs, upstream)
    assert all(map(torch.equal, actual, expected))


# Compilation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lse", [False, True])
def test_one_dynamic_graph_serves_several_grids(with_lse: bool) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(video: Tensor, other: Tensor) -> Any:
        height, width = video.shape[2], video.shape[3]
        query, key = (x.flatten(2, 3) for x in (video, other))
        pair = neighborhood_attention(
            query,
            key,
            query + key,
            grid=(height, width),
            window=(3, width // 2),
            causal=(True, False),
            return_logsumexp=True,
        )
        return pair[0].square().sum() + (pair[1].sum() if with_lse else 0)

    compiled = torch.compile(run, backend=graphs, fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (7, 5), (3, 11)):
        leaves = [torch.randn(2, heads, height, width, 8, requires_grad=True) for heads in (2, 2)]
        expected = torch.autograd.grad(run(*leaves), leaves)
        actual = torch.autograd.grad(compiled(*leaves), leaves)
        torch.testing.assert_close(actual, expected)
    assert graphs.frame_count == 1


def test_a_wrong_grid_is_found_while_compiling() -> None:
    torch._dynamo.reset()
    wrong = PLAIN | {"grid": (4, 4)}
    compiled = torch.compile(lambda *x: attend(*x, **wrong), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=re.escape("query has 12 tokens, but 4x4 makes 16")):
        compiled(*tensors("BHSD"))


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return attend(*inputs, **PLAIN)

    inputs = tuple(tensors("BSHD"))
    program = torch.export.export(Model(), inputs)
    assert torch.equal(program.module()(*inputs), attend(*inputs, **PLAIN))
    targets = [node.target for node in program.graph.nodes]
    assert FORWARD in targets


# FLOPs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [PLAIN, TEXT])
def test_flops_are_the_visible_pairs(geometry: dict[str, Any]) -> None:
    inputs = [x.requires_grad_() for x in tensors("BHSD")]
    pairs = int(oracle.mask(**geometry).sum())
    with FlopCounterMode(display=False) as counter:
        output = attend(*inputs, **geometry)
    assert counter.get_total_flops() == 4 * 2 * 4 * 8 * pairs
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 4 * 8 * pairs


def test_full_windows_cost_what_pytorch_counts_for_attention() -> None:
    inputs = [x.requires_grad_() for x in tensors("BHSD", kv_heads=4)]
    with FlopCounterMode(display=False) as counter:
        attend(*inputs, grid=(12,), window=(12,)).sum().backward()
    shape = inputs[0].shape
    dense = flop_counter.sdpa_flop_count(shape, shape, shape)
    dense += flop_counter.sdpa_backward_flop_count(shape, shape, shape, shape)
    assert counter.get_total_flops() == dense


def test_flops_of_known_sizes_only_need_hints() -> None:
    expected = 4 * 2 * 4 * 8 * Neighborhood.of((4, 3), (2, 3), (1, 2), None, (False, True)).pairs
    actual = attention_flops((2, 4, 12, 8), (2, 2, 12, 8), pattern(PLAIN))
    assert actual == expected


# Degenerate sizes and bad input ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads"), [(0, 4, 2), (2, 0, 0), (0, 0, 0), (2, 0, 3)]
)
def test_nothing_gives_nothing(batch: int, heads: int, kv_heads: int) -> None:
    inputs = [torch.randn(batch, n, 12, 8, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    output, lse = neighborhood_attention(*inputs, **PLAIN, return_logsumexp=True)
    assert output.shape == (batch, heads, 12, 8)
    assert lse.shape == (batch, heads, 12)
    grads = torch.autograd.grad((output.sum() + lse.sum()), inputs)
    for grad, tensor in zip(grads, inputs, strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


def broken(**changes: Any) -> dict[str, Any]:
    query, key, value = tensors("BHSD")
    return {"query": query, "key": key, "value": value} | PLAIN | changes


ERRORS = [
    (
        broken(query=torch.randn(4, 12, 8)),
        ValueError,
        "query has shape (4, 12, 8); it must be [batch,",
    ),
    (broken(key=torch.randn(2, 12, 8)), ValueError, "key has shape (2, 12, 8); it must be [batch,"),
    (
        broken(key=torch.randn(2, 2, 12, 8).half()),
        ValueError,
        "key is torch.float16 on cpu, query torch.float32 on cpu; dtype and device must be the same",
    ),
    (
        broken(value=torch.randn(2, 2, 12, 8, device="meta")),
        Exception,
        "device",
    ),
    (
        broken(query=torch.ones(2, 4, 12, 8, dtype=torch.long)),
        ValueError,
        "key is torch.float32 on cpu, query torch.int64",
    ),
    (
        broken(
            **{
                name: torch.ones(2, 4, 12, 8, dtype=torch.long)
                for name in ("query", "key", "value")
            }
        ),
        ValueError,
        "query is torch.int64; it must be a floating-point type",
    ),
    (broken(key=torch.randn(2, 3, 12, 8)), ValueError, "value has shape (2, 2, 12, 8) for a query"),
    (
        broken(key=torch.randn(2, 3, 12, 8), value=torch.randn(2, 3, 12, 8)),
        ValueError,
        "query has 4 heads and key 3; key's must divide query's",
    ),
    (
        broken(key=torch.randn(2, 0, 12, 8), value=torch.randn(2, 0, 12, 8)),
        ValueError,
        "query has 4 heads and key 0",
    ),
    (broken(value=torch.randn(2, 2, 12, 16)), ValueError, "it must be (2, 2, 12, 8)"),
    (broken(key=torch.randn(1, 2, 12, 8)), ValueError, "it must be (2, 2, 12, 8)"),
    (broken(key=torch.randn(2, 2, 13, 8)), ValueError, "key has 13 tokens, but 4x3 makes 12"),
    (
        broken(**{name: torch.randn(2, 2, 12, 0) for name in ("query", "key", "value")}, scale=1.0),
        ValueError,
        "head_dim is 0; it must be at least 1",
    ),
    (
        broken(**{name: torch.randn(2, 2, 12, 0) for name in ("query", "key", "value")}),
        ValueError,
        "head_dim is 0; it must be at least 1",
    ),
    (broken(query=None), TypeError, "query is a NoneType; it must be a tensor"),
    (broken(key_mask=[True]), TypeError, "key_mask is a list; it must be a tensor"),
    (
        broken(grid=(3, 3)),
        ValueError,
        "query has 12 tokens, but 3x3 makes 9; pass the grid that the tokens lie on",
    ),
    (broken(window=(2, 4)), ValueError, "axis 1 of grid (4, 3): window 4 is larger"),
    (broken(window=(2,)), ValueError, "window has 1 entries for a grid of 2 axes (4, 3)"),
    (broken(stride=(3, 1)), ValueError, "stride 3 must lie between 1 and the window 2"),
    (broken(prefix=-1), ValueError, "prefix -1 must be at least 0"),
    (
        broken(key_mask=torch.ones(2, 12, dtype=torch.bool)),
        ValueError,
        "key_mask has shape (2, 12); it must be [batch, global keys] = [2, 0]",
    ),
    (
        broken(key_mask=torch.ones(2, 0)),
        ValueError,
        "key_mask is torch.float32 on cpu; it must be torch.bool on cpu",
    ),
    (broken(provider="magic"), ValueError, "there is no provider 'magic'; there are"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(call: dict[str, Any], kind: type[Exception], message: str) -> None:
    call = dict(call)
    inputs = [call.pop(name) for name in ("query", "key", "value")]
    # Twice: what was refused once must not be remembered as good.
    for _ in range(2):
        with pytest.raises(kind, match=re.escape(message)):
            neighborhood_attention(*inputs, **call)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (Tensor.to_sparse, "has the layout torch.sparse_coo; it must be torch.strided"),
    "blocks": (
        lambda x: x.to_sparse_bsr((4, 4)),
        "has the layout torch.sparse_bsr; it must be torch.strided",
    ),
    "mkldnn": (Tensor.to_mkldnn, "has the layout torch._mkldnn; it must be torch.strided"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "is a nested tensor; it must have"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "is a nested tensor; it must have",
    ),
}


@pytest.mark.parametrize("name", ["query", "key", "value", "key_mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_without_strides(layout: str, name: str) -> None:
    convert, message = LAYOUTS[layout]
    call: dict[str, Any] = broken()
    call[name] = convert(torch.randn(2, 4, 12, 8))
    with pytest.raises(ValueError, match=re.escape(f"{name} {message}")):
        neighborhood_attention(**call)
    if layout in ("sparse", "blocks", "mkldnn"):
        inputs = [call[x] for x in ("query", "key", "value")]
        with pytest.raises(ValueError, match=re.escape(f"{name} {message}")):
            FORWARD(*inputs, *arguments(PLAIN, call.get("key_mask")), [0, 1, 2, 3])


def test_errors_of_the_op_itself() -> None:
    inputs = tensors("BHSD")
    for order in ([0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4]):
        with pytest.raises(
            ValueError, match=r"output_order .* must be a permutation of 0, 1, 2, 3"
        ):
            FORWARD(*inputs, *arguments(PLAIN), order)
    output, lse = FORWARD(*inputs, *arguments(PLAIN), [0, 1, 2, 3])
    for bad in (
        [output[:1], None],
        [output.double(), None],
        [output, lse[:, :1]],
        [output, lse.half()],
    ):
        with pytest.raises(ValueError, match=r"grad_(output|logsumexp) is .*; it must be"):
            BACKWARD(*bad, *inputs, output, lse, *arguments(PLAIN))


def test_no_provider_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        name = "never"
        fast_on = frozenset({"cpu"})

        def supports(self, problem: Problem) -> str:
            return f"never takes {problem.head_dim}"

        def forecast(self, problem: Problem) -> Forecast:
            return Forecast()

        def forward(self, *_: Any) -> None:
            raise AssertionError("not called here")

        backward = forward

    with monkeypatch.context() as patch:
        patch.setattr(providers, "PROVIDERS", [Never()])
        with pytest.raises(RuntimeError, match=r"no provider can .*never: never takes 8"):
            attend(*tensors("BHSD"), **PLAIN)
        with pytest.raises(RuntimeError, match="provider 'never' cannot"):
            attend(*tensors("BHSD"), **PLAIN, provider="never")
    # What was chosen from one list of providers is not remembered for another.
    attend(*tensors("BHSD"), **PLAIN)
    monkeypatch.setattr(providers, "PROVIDERS", [Never(), *providers.PROVIDERS])
    attend(*tensors("BHSD"), **PLAIN, provider="portable")


@pytest.mark.parametrize("geometry", [PLAIN, TEXT])
def test_defaults_against_the_oracle(geometry: dict[str, Any]) -> None:
    inputs: list[Any] = [*tensors("BHSD")]
    expected, expected_lse = oracle.attention(*inputs, visible=oracle.mask(**geometry))
    output, lse = neighborhood_attention(*inputs, **geometry, return_logsumexp=True)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
