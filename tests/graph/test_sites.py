"""Attention sites in graphs that Dynamo really makes: every form, its fields, and what is no site."""

from __future__ import annotations

import itertools
import math
import operator
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import OLD_TORCH
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import gna_compile.ops  # noqa: F401 - registers the op that sites are rewritten to
from gna_compile.graph import nodes
from gna_compile.graph.mutation import shares_memory, written_by
from gna_compile.graph.nodes import tensor_of
from gna_compile.graph.pattern import HeadWindows, Windows
from gna_compile.graph.rewrite import evaluate, memory_order, rewrite
from gna_compile.graph.sites import find
from gna_compile.graph.sites.find import Site, describe, find_sites
from gna_compile.graph.sites.module_names import ModuleRef, qualified_name, rebase
from gna_compile.graph.tokens.layouts import Layout
from gna_compile.policy import Parameters
from gna_compile.reasons import Reason

BATCH, HEADS, TOKENS, SIZE = 2, 3, 12, 8


@dataclass
class Graph:
    """A captured graph, the sites in it, and the inputs that it runs on, sizes as plain ints."""

    gm: fx.GraphModule
    sites: list[Site]
    inputs: list[Any] = field(default_factory=list)


def concrete(item: Any) -> Any:
    return item.node.hint if isinstance(item, torch.SymInt) else item


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[Graph]:
    """The graphs of one call, with the sites found while the backend runs, as in real use."""
    graphs: list[Graph] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Graph(gm, find_sites(gm), [concrete(item) for item in inputs]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return graphs


def sites_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Site]:
    return [site for graph in capture(function, *args, **kwargs) for site in graph.sites]


def site_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Site:
    found = sites_of(function, *args, **kwargs)
    assert len(found) == 1, [describe(site) for site in found]
    return found[0]


def rewritable(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.obstacle is None]


def reason_of(site: Site) -> Reason | None:
    return None if site.obstacle is None else site.obstacle[0]


def qkv(
    *shape: int, dtype: torch.dtype = torch.float32, count: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    shape = shape or (BATCH, HEADS, TOKENS, SIZE)
    q, k, v = (torch.randn(shape, dtype=dtype) for _ in range(count))
    return q, k, v


class Check(fx.Interpreter):
    """Runs a graph; at each rewritable site compares the site's fields with the node's value.

    Operands are read when the output is computed, as a rewritten graph reads them.
    """

    def __init__(self, graph: Graph, tolerance: float) -> None:
        super().__init__(graph.gm, garbage_collect_values=False)
        self.expected = {site.node: site for site in rewritable(graph.sites)}
        self.tolerance = tolerance
        self.checked = 0

    def run_node(self, node: fx.Node) -> Any:
        site = self.expected.get(node)
        if site is None:
            return super().run_node(node)
        assert site.query is not None
        assert site.key is not None
        assert site.value is not None
        q, k, v = (self.env[n].to(site.dtype) for n in (site.query, site.key, site.value))
        k = k.transpose(-1, -2) if site.key_transposed else k
        grouped = q.dim() == 4 and k.shape[1] != q.shape[1]
        attention = F.scaled_dot_product_attention(
            q, k, v, scale=site.scale, is_causal=site.is_causal, enable_gqa=grouped
        )
        value = super().run_node(node)
        assert attention.shape == value.shape
        torch.testing.assert_close(attention, value, rtol=self.tolerance, atol=self.tolerance)
        self.checked += 1
        return value


def check_numbers(graphs: list[Graph], tolerance: float = 1e-5) -> int:
    checked = 0
    for graph in graphs:
        check = Check(graph, tolerance)
        check.run(*graph.inputs)
        checked += check.checked
    return checked


# --- fused ---------------------------------------------------------------------------------------

FUSED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
    "keyword": lambda q, k, v: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False
    ),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, dropout_p=0.0),
    "torch._C._nn": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
    "aten packet": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
    "aten default": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("form", FUSED)
def test_fused_calling_forms(form: str, dynamic: bool | None) -> None:
    q, k, v = qkv()
    graphs = capture(FUSED[form], q, k, v, dynamic=dynamic)
    (site,) = graphs[0].sites
    assert site.form == "sdpa"
    assert site.obstacle is None
    assert site.owner is graphs[0].gm
    operands = (site.query, site.key, site.value)
    assert len(set(operands)) == 3
    assert all(operand is not None and operand.op == "placeholder" for operand in operands)
    assert (site.mask, site.mask_form, site.dropout, site.is_causal) == (None, "", 0.0, False)
    assert site.scale is None
    assert not site.key_transposed
    sizes = (site.batch, site.heads, site.kv_heads, site.tokens, site.key_tokens, site.head_dim)
    if dynamic:
        assert all(isinstance(size, torch.SymInt) for size in sizes)
    else:
        assert sizes == (BATCH, HEADS, HEADS, TOKENS, TOKENS, SIZE)
    assert site.dtype == torch.float32
    assert site.device == torch.device("cpu")
    assert check_numbers(graphs) == 1


def test_fused_scale_causal_and_mask() -> None:
    q, k, v = qkv()
    mask = torch.zeros(BATCH, 1, 1, TOKENS, dtype=torch.bool)

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
            F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
            F.scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask.float(), scale=2),
        )

    graphs = capture(function, q, k, v, mask)
    one, two, three, four = graphs[0].sites
    assert (one.is_causal, one.scale) == (True, 0.3)
    assert (two.is_causal, two.scale) == (True, None)
    assert three.mask is not None
    assert (three.mask.op, three.mask_form) == ("placeholder", "sdpa")
    assert four.mask is not None
    assert (four.mask.name, four.mask_form, four.scale) == ("float_1", "sdpa", 2.0)
    assert not any(site.obstacle for site in graphs[0].sites)


def test_fused_grouped_heads_need_the_flag() -> None:
    q = torch.randn(2, 6, 12, 8)
    k = torch.randn(2, 2, 12, 8)

    graphs = capture(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), q, k)
    (site,) = graphs[0].sites
    assert (site.heads, site.kv_heads, site.obstacle) == (6, 2, None)
    assert check_numbers(graphs) == 1
    one_head = k[:, :1]
    site = site_of(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, one_head)
    assert reason_of(site) is Reason.SHAPE


def test_fused_three_dimensional_operands_have_one_head() -> None:
    q, k, v = qkv(4, 12, 8)
    graphs = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)
    (site,) = graphs[0].sites
    assert (site.batch, site.heads, site.kv_heads, site.tokens) == (4, 1, 1, 12)
    assert site.obstacle is None
    assert check_numbers(graphs) == 1


def test_fused_cross_attention_has_its_own_key_tokens() -> None:
    q, k = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 5, 8)
    site = site_of(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k)
    assert (site.tokens, site.key_tokens, site.obstacle) == (12, 5, None)


@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 1, 5)])
def test_all_dimensions_before_the_heads_are_batch(leading: tuple[int, ...]) -> None:
    shape = (*leading, HEADS, TOKENS, SIZE)
    written = [WRITTEN[name].function for name in ("matmul methods", "key scaled", "einsum dots")]
    for function in (FUSED["positional"], *written):
        graphs = capture(function, *qkv(*shape))
        (site,) = graphs[0].sites
        assert site.obstacle is None, describe(site)
        assert (site.batch, site.heads, site.kv_heads) == (math.prod(leading), HEADS, HEADS)
        assert (site.tokens, site.key_tokens, site.head_dim) == (TOKENS, TOKENS, SIZE)
        assert check_numbers(graphs) == 1


UNFIT: dict[str, tuple[Reason, Callable[[Tensor], Tensor], tuple[int, ...], torch.dtype]] = {
    "two dimensions": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (12, 8),
        torch.float32,
    ),
    "five dimensions and four": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x[0], x[0]),
        (1, 2, 2, 12, 8),
        torch.float32,
    ),
    "one frame's keys for all frames": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1]),
        (2, 2, 2, 12, 8),
        torch.float32,
    ),
    "a mask over five dimensions": (
        Reason.MASK,
        lambda x: F.scaled_dot_product_attention(
            x, x, x, torch.ones(2, 1, 1, 12, dtype=torch.bool)
        ),
        (3, 2, 2, 12, 8),
        torch.float32,
    ),
    "one key for the whole batch": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x[:1], x[:1]),
        (2, 2, 12, 8),
        torch.float32,
    ),
    "one query for the whole batch": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x[:1], x, x),
        (2, 2, 12, 8),
        torch.float32,
    ),
    "no tokens": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (2, 2, 0, 8),
        torch.float32,
    ),
    "empty batch": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (0, 2, 12, 8),
        torch.float32,
    ),
    "negative scale": (
        Reason.SHAPE,
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=-1.0),
        (2, 2, 12, 8),
        torch.float32,
    ),
    "fp64": (
        Reason.DTYPE,
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (2, 2, 12, 8),
        torch.float64,
    ),
    "head_dim 4": (
        Reason.HEAD_SIZE,
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (2, 2, 12, 4),
        torch.float32,
    ),
    "head_dim 264": (
        Reason.HEAD_SIZE,
        lambda x: F.scaled_dot_product_attention(x, x, x),
        (2, 2, 12, 264),
        torch.float32,
    ),
    "another head_dim of values": (
        Reason.HEAD_SIZE,
        lambda x: F.scaled_dot_product_attention(x, x, x[..., :8]),
        (2, 2, 12, 16),
        torch.float32,
    ),
    "active dropout": (
        Reason.DROPOUT,
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.25),
        (2, 2, 12, 8),
        torch.float32,
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_fused_obstacles(case: str) -> None:
    reason, function, shape, dtype = UNFIT[case]
    site = site_of(function, torch.randn(shape, dtype=dtype))
    assert reason_of(site) is reason
    assert f", {reason.value}: " in describe(site)


@pytest.mark.parametrize("size", [8, 256])
def test_fused_extreme_head_sizes_are_taken(size: int) -> None:
    x = torch.randn(1, 1, 4, size)
    assert site_of(lambda x: F.scaled_dot_product_attention(x, x, x), x).obstacle is None


def test_fused_under_autocast_has_the_nodes_dtype() -> None:
    q, k, v = qkv()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k.bfloat16(), v)

    graphs = capture(function, q, k, v)
    (site,) = graphs[0].sites
    assert (site.dtype, site.obstacle) == (torch.bfloat16, None)
    assert check_numbers(graphs, 1e-2) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fused_in_gradient_contexts(context: Callable[[], Any]) -> None:
    q, k, v = qkv()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with context():
            return F.scaled_dot_product_attention(q, k, v)

    assert site_of(function, q, k, v).obstacle is None


class Options(nn.Module):
    """Attention with float attributes, which `dynamic=True` makes symbolic."""

    def __init__(self, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout, scale=self.scale)


class WrittenOptions(Options):
    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ x.transpose(-1, -2)) * self.scale
        return F.dropout(scores.softmax(-1), self.dropout) @ x


@pytest.mark.parametrize("kind", [Options, WrittenOptions])
def test_symbolic_floats_are_pinned_and_guarded(kind: type[Options]) -> None:
    module = kind(0.3, 0.0)
    found: list[Site] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.extend(find_sites(gm))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=True)
    x = torch.randn(2, 3, 12, 8)
    for scale, dropout, graphs in [(0.3, 0.0, 1), (0.3, 0.0, 1), (0.4, 0.0, 2), (0.4, 0.1, 3)]:
        module.scale, module.dropout = scale, dropout
        compiled(x)
        assert len(found) == graphs
        assert found[-1].scale == scale
        assert found[-1].dropout == dropout
        assert reason_of(found[-1]) is (Reason.DROPOUT if dropout else None)


def test_a_float_that_scales_the_queries_is_not_pinned() -> None:
    class Scaled(nn.Module):
        scale = 0.3

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax((x * self.scale) @ x.mT, -1) @ x

    module = Scaled()
    graphs: list[Graph] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Graph(gm, find_sites(gm), [concrete(item) for item in inputs]))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=True)
    x = torch.randn(2, 3, 12, 8)
    for scale in (0.3, 0.4, 0.5):
        module.scale = scale
        torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) == 1
    assert check_numbers(graphs) == 1


@pytest.mark.parametrize(
    "attention",
    [
        lambda x, y: F.scaled_dot_product_attention(z := torch.cat([x, y], 2), z, z),
        lambda x, y: torch.softmax(y @ y.mT, -1) @ y,
    ],
)
def test_data_dependent_token_count_is_unbacked(attention: Callable[..., Tensor]) -> None:
    x, keep = torch.randn(2, 3, 12, 8), torch.arange(12) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        site = site_of(lambda x, k: attention(x, x[:, :, k.nonzero().squeeze(1)]), x, keep)
    assert reason_of(site) is Reason.UNBACKED


def test_under_vmap_a_site_is_that_of_one_sample() -> None:
    x = torch.randn(4, 3, 12, 8)
    fused = site_of(
        lambda x: torch.vmap(lambda y: F.scaled_dot_product_attention(y, y, y), in_dims=1)(x),
        x,
    )
    written = site_of(
        lambda x: torch.vmap(lambda y: torch.softmax(y @ y.mT, -1) @ y, in_dims=1)(x),
        x,
    )
    for site in (fused, written):
        assert reason_of(site) is None
        assert (site.batch, site.heads, site.tokens, site.head_dim) == (4, 1, 12, 8)


# --- subgraphs -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int = SIZE) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return F.scaled_dot_product_attention(x, x, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Stack(nn.Module):
    def __init__(self, kind: type[Block] = Block, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_sites(reentrant: bool) -> None:
    model = Stack()

    def function(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    graphs = capture(function, torch.randn(2, 3, 12, 8, requires_grad=True))
    sites = [site for graph in graphs for site in graph.sites]
    assert len(sites) == 3
    for index, site in enumerate(sites):
        assert site.obstacle is None
        assert site.owner is not graphs[0].gm
        assert site.node.graph is site.owner.graph
        assert site.layer == f"blocks.{index}.attn"
        assert site.modules[-1].id == id(model.blocks[index].attn)
        assert site.other_calls == ()


def test_sites_in_both_branches_of_cond() -> None:
    def function(x: Tensor) -> Tensor:
        def fused(y: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(y, y, y)

        def written(y: Tensor) -> Tensor:
            return torch.softmax(y @ (y * 1.0).transpose(-1, -2), -1) @ y

        return torch.cond(x.sum() > 0, fused, written, (x,))

    graphs = capture(function, torch.randn(2, 3, 12, 8))
    assert [site.form for site in graphs[0].sites] == ["sdpa", "unfused"]
    assert all(site.owner is not graphs[0].gm for site in graphs[0].sites)
    assert not any(site.obstacle for site in graphs[0].sites)


def test_a_subgraph_that_layers_share_names_them_all() -> None:
    model = Stack(Region, 4)
    (graph,) = capture(model, torch.randn(2, 3, 12, 8))
    names = []
    for site in graph.sites:
        assert site.modules[-1].cls == "Attention"
        names.append(site.layer)
        names += [call[-1].name for call in site.other_calls]
    assert sorted(names) == [f"blocks.{index}.attn" for index in range(4)]
    assert len(graph.sites) < 4
    assert any("shared by" in describe(site) for site in graph.sites)


def test_rebase_nested_calls() -> None:
    body = (ModuleRef(1, "blocks.1", "Block"), ModuleRef(2, "blocks.1.attn", "Attention"))
    other = (ModuleRef(7, "blocks.2", "Block"),)
    assert rebase(body, body[:1], other) == (*other, ModuleRef(0, "blocks.2.attn", "Attention"))
    assert rebase(body, body[:1], body[:1]) == body
    assert rebase(body, (), ()) == body


def test_a_handwritten_backward_keeps_its_forward() -> None:
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return F.scaled_dot_product_attention(x, x, x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grads[0] * x

    sites = sites_of(Custom.apply, torch.randn(2, 3, 12, 8, requires_grad=True))
    assert len(sites) == 1
    assert reason_of(sites[0]) is Reason.OPAQUE


# --- opaque, and what is no site -----------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_opaque(batch_first: bool) -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    x = torch.randn((2, 12, 16) if batch_first else (12, 2, 16))
    site = site_of(lambda x: module(x, x, x, need_weights=False)[0], x)
    assert (site.form, reason_of(site)) == ("opaque", Reason.OPAQUE)
    assert (site.query, site.key, site.value) == (None, None, None)
    assert (site.batch, site.heads, site.tokens, site.head_dim) == (2, 2, 12, 8)
    assert site.modules[-1].cls == "MultiheadAttention"


def test_transformer_encoder_layer_is_opaque() -> None:
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        site = site_of(module, torch.randn(2, 12, 16))
    assert (site.form, reason_of(site)) == ("opaque", Reason.OPAQUE)
    assert (site.batch, site.heads, site.tokens, site.head_dim) == (2, 2, 12, 8)


def test_flex_attention_is_left_alone() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = qkv(1, 2, 128, 16)
    assert sites_of(lambda q, k, v: flex_attention(q, k, v), q, k, v) == []


NOT_ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "gating": lambda q, k, v: torch.softmax(q, -1) * v,
    "softmax of no product": lambda q, k, v: torch.softmax(q.mT @ k.mT.mT, 1) * 1.0,
    "experts": lambda q, k, v: torch.softmax(F.linear(q, torch.ones(5, SIZE)), -1).mT @ v,
    "linear attention": lambda q, k, v: torch.softmax(q, -1) @ (torch.softmax(k, -2).mT @ v),
    "over queries": lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v,
    "over heads": lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v,
    "no softmax": lambda q, k, v: (q @ k.mT) @ v,
    "log softmax": lambda q, k, v: F.log_softmax(q @ k.mT, -1) @ v,
    "weights returned": lambda q, k, v: torch.softmax(q @ k.mT, -1),
    "scores as well": lambda q, k, v: ((s := q @ k.mT).sum(), torch.softmax(s, -1) @ v),
    "weights as well": lambda q, k, v: ((w := torch.softmax(q @ k.mT, -1)) @ v, w),
    "weights twice": lambda q, k, v: ((w := torch.softmax(q @ k.mT, -1)) @ v, w @ k),
    "summed over queries": lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v,
    "channels first": lambda q, k, v: v.mT @ torch.softmax(q @ k.mT, -1).mT,
    "learned temperature": lambda q, k, v: torch.softmax((q @ k.mT) * v.mean(), -1) @ v,
    "soft cap": lambda q, k, v: torch.softmax(torch.tanh((q @ k.mT) / 5) * 5, -1) @ v,
    "head mask": lambda q, k, v: (torch.softmax(q @ k.mT, -1) * v[..., :1]) @ v,
    "negative scale": lambda q, k, v: torch.softmax((q @ k.mT) * -0.5, -1) @ v,
    "dropout": lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5) @ v,
    "dropout of scores": lambda q, k, v: torch.softmax(F.dropout(q @ k.mT, 0.5), -1) @ v,
    "scaled in place unseen": lambda q, k, v: ((s := q @ k.mT).mul_(2), torch.softmax(s, -1) @ v)[
        1
    ],
    "other rows": lambda q, k, v: (
        torch.softmax((q @ k.mT).view(BATCH, HEADS, 2 * TOKENS, TOKENS // 2), -1).view(
            BATCH, HEADS, TOKENS, TOKENS
        )
        @ v
    ),
    "permuted heads": lambda q, k, v: (
        torch.softmax(q @ k.mT, -1).transpose(0, 1) @ v.transpose(0, 1)
    ),
    "einsum over queries": lambda q, k, v: torch.einsum(
        "bhij,bhid->bhjd", torch.softmax(q @ k.mT, -1), v
    ),
    "einsum tokens first": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1),
        v,
    ),
    "einsum channels first": lambda q, k, v: torch.einsum(
        "bhts,bhcs->bhct", torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k), -1), v
    ),
}
REASONS = {
    "scores as well": Reason.WEIGHTS_USED,
    "weights as well": Reason.WEIGHTS_USED,
    "weights twice": Reason.WEIGHTS_USED,
    "channels first": Reason.SHAPE,
    "learned temperature": Reason.WEIGHTS_USED,
    "soft cap": Reason.WEIGHTS_USED,
    "head mask": Reason.WEIGHTS_USED,
    "negative scale": Reason.SHAPE,
    "dropout": Reason.DROPOUT,
    "dropout of scores": Reason.DROPOUT,
    "scaled in place unseen": Reason.WEIGHTS_USED,
    "other rows": Reason.SHAPE,
    "einsum tokens first": Reason.SHAPE,
    "einsum channels first": Reason.SHAPE,
}


@pytest.mark.parametrize("case", NOT_ATTENTION)
def test_what_only_looks_like_attention(case: str) -> None:
    sites = sites_of(NOT_ATTENTION[case], *qkv())
    assert [reason_of(site) for site in sites] == ([REASONS[case]] if case in REASONS else [])


def test_unfit_einsum_reports_true_sizes() -> None:
    q, k, v = qkv(2, 12, 3, 8)
    site = site_of(NOT_ATTENTION["einsum tokens first"], q, k, v)
    sizes = (site.batch, site.heads, site.tokens, site.key_tokens, site.head_dim)
    assert sizes == (2, 3, 12, 12, 8)


# --- unfused -------------------------------------------------------------------------------------

ROOT = SIZE**-0.5


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=ROOT)
    return torch.bmm(scores.softmax(dim=-1), v)


def hugging_face(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * ROOT
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v)


def timm_style(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * ROOT
    scores = q @ k.transpose(-2, -1)
    return F.dropout(scores.softmax(dim=-1), 0.0) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= ROOT
    return torch.softmax(scores.div_(2), -1) @ v


def clip_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    scores = torch.bmm(q * ROOT, k.transpose(1, 2))
    scores = scores.view(BATCH, HEADS, TOKENS, TOKENS).view(BATCH * HEADS, TOKENS, TOKENS)
    return torch.bmm(torch.softmax(scores, -1), v)


@dataclass
class Form:
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    scale: float = ROOT
    shape: tuple[int, ...] = (BATCH, HEADS, TOKENS, SIZE)
    key_transposed: bool = False
    query: str = "placeholder"


THREE = (BATCH * HEADS, TOKENS, SIZE)
SOFTMAX = nn.Softmax(dim=-1)
WRITTEN: dict[str, Form] = {
    "hugging face": Form(hugging_face),
    "timm": Form(timm_style),
    "in place": Form(in_place, ROOT / 2),
    "clip": Form(clip_view, query="reshape"),
    "baddbmm": Form(baddbmm, shape=THREE),
    "bmm": Form(lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v), 1.0, THREE),
    "bmm methods": Form(lambda q, k, v: q.bmm(k.mT).softmax(2).bmm(v), 1.0, THREE),
    "matmul methods": Form(lambda q, k, v: q.matmul(k.mT).softmax(-1).matmul(v), 1.0),
    "keywords": Form(
        lambda q, k, v: torch.matmul(
            input=torch.softmax(input=torch.mul(input=q @ k.mT, other=ROOT), dim=-1), other=v
        ),
    ),
    "aten": Form(
        lambda q, k, v: torch.ops.aten.matmul.default(
            torch.ops.aten.softmax.int(torch.ops.aten.matmul(q, k.mT) * ROOT, -1), v
        ),
    ),
    "last positive dim": Form(lambda q, k, v: F.softmax(q @ k.mT / 2, dim=3) @ v, 0.5),
    "module": Form(lambda q, k, v: SOFTMAX(q @ k.mT * ROOT) @ v),
    "div": Form(lambda q, k, v: torch.softmax(torch.div(q @ k.mT, 4.0), -1) @ v, 0.25),
    "scalar first": Form(lambda q, k, v: torch.softmax(ROOT * (q @ k.mT), -1) @ v),
    "key scaled": Form(lambda q, k, v: torch.softmax(q @ (k * ROOT).mT, -1) @ v),
    "key scaled after": Form(lambda q, k, v: torch.softmax(q @ (k.mT * ROOT), -1) @ v),
    "both scaled": Form(
        lambda q, k, v: torch.softmax((q * ROOT**0.5) @ (k * ROOT**0.5).transpose(-2, -1), -1) @ v,
    ),
    "query divided": Form(
        lambda q, k, v: torch.softmax((q / math.sqrt(SIZE)) @ k.permute(0, 1, 3, 2), -1) @ v,
    ),
    "scaled in place": Form(
        lambda q, k, v: torch.softmax(q.clone().mul_(ROOT) @ k.swapaxes(-1, -2), -1) @ v,
        1.0,
        query="mul_",
    ),
    "tensor on queries": Form(
        lambda q, k, v: torch.softmax((q * k.std()) @ k.mT * 0.5, -1) @ v, 0.5, query="mul"
    ),
    "constant tensor": Form(
        lambda q, k, v: torch.softmax((q @ k.mT) / torch.sqrt(torch.full([], 4.0)), -1) @ v, 0.5
    ),
    "key never untransposed": Form(
        lambda q, k, v: torch.softmax(q @ k.reshape(BATCH, HEADS, SIZE, TOKENS), -1) @ v,
        1.0,
        key_transposed=True,
    ),
    "query from channels": Form(
        lambda q, k, v: torch.softmax(q.reshape(BATCH, HEADS, SIZE, TOKENS).mT @ k.mT, -1) @ v,
        1.0,
        query="mT",
    ),
    "one key head": Form(lambda q, k, v: torch.softmax(q @ k[:, :1].mT, -1) @ v[:, :1], 1.0),
    "einsum": Form(
        lambda q, k, v: torch.einsum(
            "bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * ROOT, -1), v
        )
    ),
    "einsum swapped": Form(
        lambda q, k, v: torch.einsum(
            "b h j d, b h i j -> b h i d",
            v,
            torch.softmax(torch.einsum("b h j d, b h i d -> b h i j", k, q) * ROOT, -1),
        )
    ),
    "einsum of three": Form(
        lambda q, k, v: torch.einsum(
            "bij,bjd->bid", torch.softmax(torch.einsum("bid,bjd->bij", q * ROOT, k), -1), v
        ),
        shape=THREE,
    ),
    "einsum dots": Form(
        lambda q, k, v: torch.einsum(
            "...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v
        ),
        1.0,
    ),
    "einsum key transposed": Form(
        lambda q, k, v: torch.einsum("bhid,bhdj->bhij", q, k.mT.contiguous()).softmax(-1) @ v, 1.0
    ),
    "upcast": Form(
        lambda q, k, v: torch.softmax(q.float() @ k.float().mT * ROOT, -1).type_as(v) @ v,
    ),
}


DYNAMIC = ["hugging face", "timm", "clip", "baddbmm", "key never untransposed", "einsum dots"]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, None) for name in WRITTEN] + [(name, True) for name in DYNAMIC],
)
def test_written_out(name: str, dynamic: bool | None) -> None:
    form = WRITTEN[name]
    graphs = capture(form.function, *qkv(*form.shape), dynamic=dynamic)
    (site,) = graphs[0].sites
    assert site.form == "unfused"
    assert site.obstacle is None, describe(site)
    assert (site.mask, site.mask_form, site.dropout, site.is_causal) == (None, "", 0.0, False)
    # A float that `dynamic=True` keeps symbolic stays where it is if it scales the operands.
    if dynamic is None:
        assert site.scale == pytest.approx(form.scale)
        assert site.key_transposed == form.key_transposed
        assert site.query is not None
        assert form.query in (site.query.op, nodes.operator_name(site.query), site.query.name[:7])
        rank = len(form.shape)
        assert site.batch == (form.shape[0] if name != "clip" else BATCH * HEADS)
        assert site.heads == (HEADS if rank == 4 and name != "clip" else 1)
        assert (site.tokens, site.key_tokens, site.head_dim) == (TOKENS, TOKENS, SIZE)
    assert check_numbers(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["upcast", "hugging face", "timm", "einsum", "both scaled"])
def test_written_out_in_half_precision_takes_the_narrow_operands(
    name: str, dtype: torch.dtype
) -> None:
    graphs = capture(WRITTEN[name].function, *qkv(dtype=dtype))
    (site,) = graphs[0].sites
    assert (site.obstacle, site.dtype) == (None, dtype)
    assert site.query is not None
    assert site.key is not None
    assert site.query.op == site.key.op == "placeholder"
    assert check_numbers(graphs, 2e-2) == 1


def test_written_out_under_autocast() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.softmax(q @ k.mT, -1) @ v

    graphs = capture(function, *qkv())
    (site,) = graphs[0].sites
    assert (site.obstacle, site.dtype) == (None, torch.bfloat16)
    assert check_numbers(graphs, 3e-2) == 1


def test_written_out_that_narrows_after_the_scores_is_declined() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1).bfloat16() @ v.bfloat16()

    assert reason_of(site_of(function, *qkv())) is Reason.DTYPE


def fill_in_place(scores: Tensor, mask: Tensor) -> Tensor:
    scores.masked_fill_(mask, -math.inf)
    return scores


def add_in_place(scores: Tensor, mask: Tensor) -> Tensor:
    scores += mask
    return scores


def assign(scores: Tensor, mask: Tensor) -> Tensor:
    scores[mask] = -1e9
    return scores


MASKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "add": (lambda s, m: s + m.float(), "added"),
    "add reversed": (lambda s, m: m.float() + s, "added"),
    "torch.add": (lambda s, m: torch.add(s, m.float(), alpha=-2.0), "added"),
    "sub": (lambda s, m: s - 1e4 * m.float(), "added"),
    "iadd": (add_in_place, "added"),
    "masked_fill": (lambda s, m: s.masked_fill(m, -math.inf), "filled"),
    "torch.masked_fill": (lambda s, m: torch.masked_fill(s, m, -math.inf), "filled"),
    "masked_fill_": (fill_in_place, "filled"),
    "where": (lambda s, m: torch.where(m, s, -1e9), "selected"),
    "where reversed": (lambda s, m: torch.where(m, -1e9, s), "selected"),
    "where method": (lambda s, m: s.where(m, torch.full((), -1e9)), "selected"),
    "setitem": (assign, "filled"),
    "two": (lambda s, m: s.masked_fill(m, -1e9) + m.float(), "several"),
    "shape of the scores": (lambda s, m: s + m.float().expand_as(s), "added"),
}


@pytest.mark.parametrize("name", MASKS)
def test_written_out_masks_are_never_dropped(name: str) -> None:
    apply, form = MASKS[name]
    mask = torch.rand(BATCH, HEADS, TOKENS, TOKENS) > 0.5

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(apply(q @ k.mT * ROOT, mask), -1) @ v

    site = site_of(function, *qkv(), mask)
    assert site.form == "unfused"
    assert site.mask is not None
    assert site.mask_form == form
    assert site.obstacle is None
    assert site.scale == pytest.approx(ROOT)
    assert f"mask {site.mask.name}" in describe(site)


def test_baddbmm_adds_a_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias, q, k.mT, beta=1, alpha=0.5).softmax(-1) @ v

    site = site_of(function, *qkv(*THREE), torch.randn(THREE[0], TOKENS, TOKENS))
    assert site.mask is not None
    assert (site.mask.op, site.mask_form, site.scale) == ("placeholder", "added", 0.5)


def test_causal_mask_assigned_by_slices_is_declined() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores[:, :, 0, 1:] = -math.inf
        return torch.softmax(scores, -1) @ v

    assert reason_of(site_of(function, *qkv())) is Reason.WEIGHTS_USED


OVERWRITTEN: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "query zeroed": lambda q, k, v: (
        w := torch.softmax((x := q + 1) @ k.mT, -1),
        x.zero_(),
        w @ v,
    )[-1],
    "a view of the key": lambda q, k, v: (
        w := torch.softmax(q @ (x := k + 1).mT, -1),
        x[0].fill_(3.0),
        w @ v,
    )[-1],
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_operands_that_change_before_the_output_are_declined(name: str) -> None:
    (site,) = sites_of(OVERWRITTEN[name], *qkv())
    assert reason_of(site) is Reason.SHAPE
    assert site.obstacle is not None
    assert "overwrites" in site.obstacle[1]


def test_operands_that_change_before_their_use_are_read_after_it() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q + 1, k + 1
        turned = k.mT
        q[:, :, :3] = 0
        k.mul_(2)
        return torch.softmax((q * 0.5) @ turned, -1) @ v

    graphs = capture(function, *qkv())
    assert check_numbers(graphs) == 1


def assign_half(x: Tensor) -> None:
    x[..., :4] = 0.5


def negate_in_region(x: Tensor) -> Tensor:
    x.neg_()
    return x + 1


# Ways to write to a tensor, by itself or by something that shares its memory.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.mul_(-1.5),
    "operator": lambda x: operator.isub(x, 0.75),
    "setitem": assign_half,
    "view": lambda x: x.reshape(-1)[:9].mul_(3),
    "transposed": lambda x: x.mT[..., 1:, :].add_(1),
    "unbound": lambda x: x.unbind(0)[0].neg_(),
    "detached": lambda x: x.detach().mul_(0.5),
    "data": lambda x: x.data.add_(0.5),
    "out": lambda x: torch.add(x, 0.5, out=x),
    "out of a view": lambda x: torch.mul(x[0], -2.0, out=x[0]),
    "foreach": lambda x: torch._foreach_mul_([x], -0.5),
    "flag": lambda x: F.relu(x, inplace=True),
    "flag by position": lambda x: F.relu(x, True),
    "operator by its name": lambda x: torch.ops.aten.mul_.Scalar(x, -1.0),
    "function": lambda x: torch.sigmoid_(x),
    "initialization": lambda x: nn.init.constant_(tensor=x, val=0.25),
    "copy": lambda x: x.copy_(x.flip(-1)),
    "region": lambda x: checkpoint(negate_in_region, x, use_reentrant=False),
    "statistics": lambda x: F.batch_norm(
        torch.randn(4, 8), x.flatten()[:8], None or torch.ones(8), training=True
    ),
    "renormalization": lambda x: F.embedding(
        torch.tensor([0, 1]), x.reshape(-1, x.shape[-1]), None, 0.1
    ),
}
# Steps that the matcher passes on its way from the product back to what it takes as an operand.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda x: x.clone(),
    "scale": lambda x: x * 0.5,
    "divide": lambda x: x / 0.8,
    "cast": lambda x: x.to(torch.float32, copy=True),
    "narrow and widen": lambda x: x.bfloat16().float(),
    "contiguous": lambda x: x.contiguous(),
    "turn back and forth": lambda x: x.mT.contiguous().mT,
    "same type": lambda x: x.float(),
}


class Random:
    """A random attention with writes in place at random times, the same for one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rank = self.rng.choice([3, 4])
        self.shape = (2, 3, 6, 8)[4 - self.rank :]
        self.actions = [self.rng.random() for _ in range(64)]
        self.often = self.rng.choice([0.0, 0.1, 0.2])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        actions = iter(self.actions)
        made = [q, k, v]

        def pick(choices: Any) -> Any:
            choices = list(choices)
            return choices[int(next(actions) * len(choices))]

        def change(*tensors: Tensor) -> None:
            if next(actions) < self.often:
                CHANGES[pick(CHANGES)](pick(tensors))

        def operand(x: Tensor) -> Tensor:
            made.append(x := x + 0.25)
            for _ in range(pick(range(4))):
                change(*made)
                made.append(x := STEPS[pick(STEPS)](x))
            return x

        q, k = operand(q), operand(k)
        turned = k.mT
        change(*made)
        scores = q @ turned
        change(*made, scores)
        if next(actions) < 0.2:
            scores = bias.add_(scores)
            change(bias, scores)
        if next(actions) < 0.4:
            scores *= 0.7
        change(*made, scores)
        weights = scores.softmax(-1)
        change(*made, weights)
        return weights @ v


def test_operands_are_followed_only_through_what_nothing_changes() -> None:
    taken = clean = 0
    for seed in range(150):
        program = Random(seed)
        torch.manual_seed(seed)
        inputs = [torch.randn(program.shape) for _ in range(3)]
        inputs.append(torch.randn(*program.shape[:-1], program.shape[-2]))
        copies = [x.clone() for x in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graphs = capture(program, *inputs)
        if len(graphs) > 1:  # Dynamo takes no `out=` that is not contiguous
            continue
        (graph,) = graphs
        # Capturing ran the graph, which wrote to its inputs.
        graph.inputs = [
            dict(zip(map(id, inputs), copies, strict=True))[id(x)] for x in graph.inputs
        ]
        (site,) = graph.sites
        taken += check_numbers([graph], 2e-2 if "bfloat16" in str(graph.gm.code) else 1e-4)
        clean += program.often == 0 and site.obstacle is None
    assert taken > 70
    assert clean > 30


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_whose_result_changes_is_not_followed(step: str, change: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = STEPS[step](q + 1)
        CHANGES[change](q)
        return torch.softmax(q @ k.mT, -1) @ v

    graphs = capture(function, *qkv())
    assert check_numbers(graphs, 2e-2 if step.startswith("narrow") else 1e-4) == 1


LATER: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a bias that took the scores up": lambda q, k, v: (
        scores := (bias := torch.ones(BATCH, HEADS, TOKENS, TOKENS)).add_(q @ k.mT),
        bias.tril_(),
        scores.softmax(-1) @ v,
    )[-1],
    "a mask between its use and the output": lambda q, k, v: (
        scores := q @ k.mT + (mask := v @ k.mT),
        mask.zero_(),
        scores.softmax(-1) @ v,
    )[-1],
    "the shape of the queries": lambda q, k, v: (
        out := torch.softmax((x := q.clone()) @ k.mT, -1) @ v,
        x.unsqueeze_(0),
        out + x.sum(),
    )[-1],
    "the shape of a step": lambda q, k, v: (
        out := torch.softmax((x := q * 0.5) @ k.mT, -1) @ v,
        x.transpose_(-1, -2),
        out + x.sum(),
    )[-1],
}


@pytest.mark.parametrize("name", LATER)
def test_what_changes_elsewhere_is_seen(name: str) -> None:
    (site,) = sites_of(LATER[name], *qkv())
    assert reason_of(site) in (Reason.SHAPE, Reason.WEIGHTS_USED)


def test_a_fused_query_that_is_reshaped_in_place_later_is_declined() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q.clone()
        out = F.scaled_dot_product_attention(x, k, v)
        x.transpose_(1, 2)
        return out + x.sum()

    assert reason_of(site_of(function, *qkv())) is Reason.SHAPE


def test_memory_that_is_exchanged_is_unknown() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (q + 1).clone()
        old = x.view(-1)
        y = x * 0.5
        old.mul_(-3)
        out = torch.softmax(y @ k.mT, -1) @ v
        x.set_(q)  # type: ignore[call-overload]
        return out + x.sum()

    graphs = capture(function, *qkv())
    assert check_numbers(graphs) <= 1


def test_gradient_modes_count_from_the_first_step_that_is_peeled_off() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            turned = k.mT
        return torch.softmax(q @ turned, -1) @ v

    assert reason_of(site_of(function, *qkv())) is Reason.WEIGHTS_USED


def test_a_constant_tensor_that_changes_is_no_constant() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        divisor = torch.full([], 4.0)
        divisor.view(1).mul_(2)
        return torch.softmax((q @ k.mT) / divisor, -1) @ v

    assert reason_of(site_of(function, *qkv())) is Reason.WEIGHTS_USED


def written(function: Callable[..., Any], *args: Any) -> list[list[str]]:
    """For each call of the graph, the names of the inputs that it writes to."""
    (graph,) = capture(function, *args)
    return [[target.name for target in written_by(node)] for node in graph.gm.graph.nodes]


def assign_row(x: Tensor, y: Tensor) -> Tensor:
    x[0] = y[0]
    return x + y


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "method": lambda x, y: x.add_(y),
    "operator": lambda x, y: operator.imul(x, y),
    "setitem": assign_row,
    "dunder": lambda x, y: x.__iadd__(y),
    "function": lambda x, y: torch.relu_(x),
    "flag": lambda x, y: F.relu(x, inplace=True),
    "out": lambda x, y: torch.add(y, y, out=x),
    "aten": lambda x, y: torch.ops.aten.add_.Tensor(x, y),
    "aten packet": lambda x, y: torch.ops.aten.mul_(x, y),
    "foreach": lambda x, y: torch._foreach_mul_([x], 2.0),
    "flag by position": lambda x, y: F.relu(x, True),
    "keyword": lambda x, y: nn.init.zeros_(tensor=x),
    "statistics": lambda x, y: F.batch_norm(y.repeat(2, 2), x.view(-1), y.view(-1), training=True),
    "renormalization": lambda x, y: F.embedding(torch.tensor([0]), x, max_norm=0.1),
    "checkpointed region": lambda x, y: checkpoint(negate_in_region, x, use_reentrant=False),
}


@pytest.mark.parametrize("case", WRITES)
def test_writes_are_seen(case: str) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    (graph,) = capture(WRITES[case], x, y)
    (entry,) = (node for node in graph.gm.graph.nodes if node.name == "l_x_")
    changed = [node for call in graph.gm.graph.nodes for node in written_by(call)]
    assert any(shares_memory(node, entry) for node in changed)


def test_reads_are_not_writes() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y).mul(y)[0] + F.relu(torch.ops.aten.add(x, -y), inplace=False)[1]

    assert not any(written(function, torch.randn(2, 3), torch.randn(2, 3)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_weights_without_gradient_are_declined(context: Callable[[], Any]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with context():
            weights = torch.softmax(q @ k.mT, -1)
        return weights @ v

    assert reason_of(site_of(function, *qkv())) is Reason.WEIGHTS_USED


def test_a_dynamic_head_size_in_the_scale_is_not_pinned() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT) / math.sqrt(q.shape[-1]), -1) @ v

    assert site_of(function, *qkv(), dynamic=None).scale == pytest.approx(ROOT)
    site = site_of(function, *qkv(), dynamic=True)
    assert reason_of(site) is Reason.WEIGHTS_USED
    assert isinstance(site.head_dim, torch.SymInt)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rank=st.sampled_from([3, 4]),
    product=st.sampled_from(["matmul", "einsum"]),
    before=st.sampled_from([None, "mul", "div", "upcast and mul"]),
    after=st.sampled_from([None, "mul", "div", "upcast", "in place"]),
    downcast=st.booleans(),
    keys=st.sampled_from(["transpose", "mT", "permute", "contiguous", "scaled"]),
    tokens=st.integers(2, 20),
    key_tokens=st.integers(2, 20),
    size=st.sampled_from([8, 12, 16]),
    factor=st.floats(0.5, 2.0),
)
def test_any_combination_of_steps(
    rank: int,
    product: str,
    before: str | None,
    after: str | None,
    downcast: bool,
    keys: str,
    tokens: int,
    key_tokens: int,
    size: int,
    factor: float,
) -> None:
    torch.manual_seed(0)
    head = (2, 3)[: rank - 2]
    # The model rounds its scores to bfloat16: of small scores that is little.
    q = (torch.randn(*head, tokens, size) * size**-0.5).bfloat16()
    k, v = (torch.randn(*head, key_tokens, size, dtype=torch.bfloat16) for _ in range(2))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if before == "upcast and mul":
            q, k = q.float() * factor, k.float()
        elif before is not None:
            q = q * factor if before == "mul" else q / factor
        if keys == "scaled":
            k = k * 0.5
        turned = {
            "transpose": lambda: k.transpose(-1, -2),
            "mT": lambda: k.mT,
            "permute": lambda: k.permute(*range(rank - 2), rank - 1, rank - 2),
            "contiguous": lambda: k.transpose(-2, -1).contiguous(),
            "scaled": lambda: k.swapdims(-2, -1),
        }[keys]()
        if product == "matmul":
            scores = q @ turned
        else:
            scores = torch.einsum("...id,...dj->...ij", q, turned)
        if after in ("mul", "div"):
            scores = scores * factor if after == "mul" else scores / factor
        elif after == "upcast":
            scores = scores.float()
        elif after == "in place":
            scores *= factor
        weights = torch.softmax(scores, -1, dtype=torch.float32 if downcast else None)
        return weights.to(v.dtype) @ v

    graphs = capture(function, q, k, v)
    (site,) = graphs[0].sites
    assert site.obstacle is None, describe(site)
    assert (site.tokens, site.key_tokens) == (tokens, key_tokens)
    assert check_numbers(graphs, 6e-2) == 1


# --- more dimensions than the op has -------------------------------------------------------------

WINDOW: dict[str, Any] = {"grid": (3, 4), "window": (2, 2)}


def rewritten(function: Callable[..., Any], strides: list[Any]) -> Callable[..., Any]:
    """Compiles `function` with every site rewritten to one window; notes strides at the sites."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sites = find_sites(gm)
        parameters = Parameters(WINDOW["window"], (1, 1), (1, 1), (False, False))
        before = [site.node.meta["example_value"] for site in sites]
        users = [next(iter(site.node.users)) for site in sites]
        layout = Layout.of_grid(WINDOW["grid"])
        rewrite(
            [(site, layout, Windows((HeadWindows(site.heads, (parameters,)),))) for site in sites]
        )
        for old, user in zip(before, users, strict=True):
            (new,) = (n for n in user.all_input_nodes if tensor_of(n) is old)
            strides.append((old, evaluate(new, old)))
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = oracle.mask(**WINDOW)
    grouped = k.shape[-3] != q.shape[-3]
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=grouped)


def dense_with(prepare: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(prepare(q), prepare(k), prepare(v))


DIMENSIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[..., :1, :, :], v[..., :1, :, :], enable_gqa=True
    ),
    "unfused": lambda q, k, v: torch.softmax(q @ k.mT * SIZE**-0.5, -1) @ v,
    "keys from channels": lambda q, k, v: (
        torch.softmax(q @ k.mT.reshape(*k.shape[:-2], SIZE, TOKENS) * SIZE**-0.5, -1) @ v
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id",
        torch.softmax(torch.einsum("...id,...jd->...ij", q, k) * SIZE**-0.5, -1),
        v,
    ),
    "heads last in memory": lambda q, k, v: dense_with(
        lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3), q, k, v
    ),
    "frames outside of the batch": lambda q, k, v: dense_with(
        lambda x: x.transpose(0, -4).contiguous().transpose(0, -4), q, k, v
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("name", DIMENSIONS)
def test_leading_dimensions_are_rewritten_as_one_batch(
    name: str, leading: tuple[int, ...], dynamic: bool
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return DIMENSIONS[name](q, k, v).transpose(-2, -3).flatten(-2) * 2

    strides: list[Any] = []
    compiled = rewritten(function, strides)
    for step in range(3 if dynamic else 1):
        sizes = tuple(size + step for size in leading)
        inputs = [torch.randn(*sizes, HEADS, TOKENS, SIZE) for _ in range(3)]
        if dynamic:
            for x in inputs:
                for dim in range(len(leading)):
                    torch._dynamo.mark_dynamic(x, dim)
        used = [x[..., :1, :, :] if name == "grouped" else x for x in inputs[1:]]
        expected = masked(inputs[0], *used).transpose(-2, -3).flatten(-2) * 2
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
    ((old, new),) = strides
    assert memory_order(old) == memory_order(new)
    assert len({repr(x.is_contiguous()) for x in (old, new)}) == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7])
def test_the_output_keeps_its_memory_order(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.library.custom_op("gna_tests::dense", mutates_args=())
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("not called")

    dense.register_fake(
        lambda q, k, v: q.new_empty([q.shape[d] for d in order]).permute(
            [order.index(d) for d in range(5)]
        )
    )
    names = nodes.operator_name

    def named(node: fx.Node) -> str:
        return "scaled_dot_product_attention" if "gna_tests" in str(node.target) else names(node)

    monkeypatch.setattr(find, "operator_name", named)
    strides: list[Any] = []
    compiled = rewritten(lambda *x: torch.ops.gna_tests.dense(*x).sin(), strides)
    inputs = [torch.randn(2, 3, HEADS, TOKENS, SIZE) for _ in range(3)]
    torch.testing.assert_close(compiled(*inputs), masked(*inputs).sin(), rtol=1e-4, atol=1e-5)
    ((old, new),) = strides
    assert old.stride() == new.stride()


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("G['m'].blocks.1", "blocks.1"),
        ("L['fn'].x", "x"),
        ("L['self']", ""),
        (
            "L['self'].__dict__['_modules']['transformer_blocks'].0.attn",
            "transformer_blocks.0.attn",
        ),
        (
            "L['self'].__dict__['_modules']['down_blocks'].0"
            ".__dict__['_modules']['attentions'].1.attn1",
            "down_blocks.0.attentions.1.attn1",
        ),
        ("L['self']._modules['blocks']._modules['3'].attn", "blocks.3.attn"),
        ("L['self']._orig_mod.blocks.0", "blocks.0"),
        (
            "L['self'].blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn",
            "blocks.0.attn",
        ),
        ('G["model"].layers["a"].attn', "layers.a.attn"),
        ("L['fn'].__closure__[0].cell_contents.blocks.2", "blocks.2"),
        ("L['func'].__defaults__[0].attn", "attn"),
        ("L['func'].__kwdefaults__['model'].attn", "attn"),
        ("L['models'][1].encoder.attn", "encoder.attn"),
        ("L['forward'].__self__.attn", "attn"),
        ("L['self'].attn", "attn"),
        ("blocks.0.attn", "blocks.0.attn"),
        ("", ""),
    ],
)
def test_qualified_names(path: str, name: str) -> None:
    assert qualified_name(path) == name


def test_layers_of_a_model_and_through_a_closure() -> None:
    model = Stack()
    x = torch.randn(2, 3, 12, 8)
    wanted = [f"blocks.{index}.attn" for index in range(3)]
    direct = sites_of(model, x)
    assert [site.layer for site in direct] == wanted
    assert [site.modules[-1].id for site in direct] == [id(block.attn) for block in model.blocks]
    assert [[ref.cls for ref in site.modules] for site in direct] == [["Block", "Attention"]] * 3
    assert [site.layer for site in sites_of(lambda x: model(x) + 1, x)] == wanted


def test_a_block_compiled_by_itself_has_a_relative_name() -> None:
    (site,) = sites_of(Block(), torch.randn(2, 3, 12, 8))
    assert site.layer == "attn"


# --- real models ---------------------------------------------------------------------------------


def vision_model(family: str, implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kinds = {
        "ViT": ("ViTModel", "ViTConfig"),
        "CLIP": ("CLIPVisionModel", "CLIPVisionConfig"),
        "DINOv2": ("Dinov2Model", "Dinov2Config"),
    }
    model, config = (getattr(transformers, name) for name in kinds[family])
    return model(
        config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            attn_implementation=implementation,
        )
    ).eval()


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("ViT", "sdpa"), ("ViT", "eager"), ("CLIP", "eager"), ("DINOv2", "eager")],
)
def test_transformers_vision_models(family: str, implementation: str) -> None:
    if OLD_TORCH and family in ("ViT", "DINOv2"):
        pytest.skip("transformers gives it a mask under this torch")
    model = vision_model(family, implementation)
    with torch.no_grad():
        graphs = capture(model, torch.randn(2, 3, 32, 32))
        (graph,) = graphs
        assert len(graph.sites) == 3
        for site in graph.sites:
            assert site.form == ("sdpa" if implementation == "sdpa" else "unfused")
            assert (site.obstacle, site.mask) == (None, None)
            assert (site.batch, site.heads, site.tokens, site.head_dim) == (2, 2, 17, 16)
            assert site.scale == pytest.approx(0.25)
            assert (
                dict(model.named_modules())[site.layer].__class__.__name__ == site.modules[-1].cls
            )
        assert check_numbers(graphs) == 3


def test_diffusers_legacy_processor() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention as DiffusersAttention
    from diffusers.models.attention_processor import AttnProcessor

    module = DiffusersAttention(16, heads=2, dim_head=8, processor=AttnProcessor()).eval()
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        graphs = capture(module, x)
        (site,) = graphs[0].sites
        assert (site.form, site.obstacle, site.mask) == ("unfused", None, None)
        assert (site.batch, site.heads, site.tokens, site.head_dim) == (4, 1, 12, 8)
        assert site.scale == pytest.approx(8**-0.5)
        assert check_numbers(graphs) == 1
        (site,) = sites_of(module, x, attention_mask=torch.zeros(2, 1, 12))
        assert site.mask_form == "added"


@pytest.mark.parametrize("dynamic", [None, True])
def test_diffusers_wan(dynamic: bool | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }
    with torch.no_grad():
        (graph,) = capture(model, dynamic=dynamic, **inputs)
    assert [site.layer for site in graph.sites] == [
        f"blocks.{block}.attn{kind}" for block in range(2) for kind in (1, 2)
    ]
    assert not any(site.obstacle for site in graph.sites)
    assert all(site.head_dim == 16 for site in graph.sites)
    if dynamic is None:
        assert [site.tokens for site in graph.sites] == [72] * 4
        assert [site.key_tokens for site in graph.sites] == [72, 7, 72, 7]
