"""Finds the attention sites of a Dynamo graph, the subgraphs of higher-order operators included.

Three forms: fused `scaled_dot_product_attention` in any calling form ("sdpa"), matmul, softmax and
matmul ("unfused"), and operators that hold a whole attention layer ("opaque").
A site that could never be rewritten, whatever the policy, says so in its `obstacle`.
`flex_attention` and custom attention operators are not sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.functorch import Levels, may_be_trained
from gna_compile.graph.mutation import reshaped_in_place, shares_memory
from gna_compile.graph.nodes import argument_of, operator_name, tensor_of
from gna_compile.graph.sites.module_names import ModuleRef, modules_of, rebase
from gna_compile.graph.sites.unfit import unfit, unfit_mask, unfit_scale
from gna_compile.graph.sites.unfused import Match, match
from gna_compile.graph.symbols import Size, number
from gna_compile.reasons import Decline, Reason

__all__ = ["ModuleRef", "Site", "describe", "find_sites"]

_OPAQUE = {
    "multi_head_attention_forward": "nn.MultiheadAttention is one operator in the graph",
    "_native_multi_head_attention": "nn.MultiheadAttention is one operator in the graph",
    "_transformer_encoder_layer_fwd": "nn.TransformerEncoderLayer is one operator in the graph",
}


@dataclass(frozen=True, eq=False)
class Site:
    """One attention in a graph.

    Args:
        owner: the graph module that holds the node: the graph itself or a subgraph of it.
        node: its value is the attention output, [.., tokens, head_dim].
        form: "sdpa", "unfused" or "opaque".
        query, key, value: operands [.., heads, tokens, head_dim] or [batch, tokens, head_dim],
            without the scale that a model multiplied on them; None if opaque. All dimensions before
            the heads are batch. Their dtype may differ from `dtype` (autocast, or a narrower
            operand that the model widens): cast them.
        key_transposed: `key` is [.., head_dim, tokens].
        scale: factor on the scores before the softmax; None for 1 / sqrt(head_dim).
        mask: the mask operand, or what unfused attention adds to or selects from its scores.
        mask_form: how `mask` acts: "sdpa" (as `attn_mask`: True shows, or added), "added",
            "filled" (True hides), "selected" (condition of `where`), "several" (more than `mask`
            alone); "" without a mask. Only "sdpa" has the meaning of `attn_mask`.
        query_mask: bool [batch or 1, 1, tokens, 1], False for queries that see no key: their rows are
            0. It is a part of the site's mask that `mask` leaves out.
        dropout: probability with which attention weights are dropped; NaN if unknown.
        is_causal: as in `scaled_dot_product_attention`.
        modules: the modules around the site, outermost first.
        layer: fully qualified name of the innermost of them, "" if unknown or the compiled module itself.
        batch, heads, kv_heads, tokens, key_tokens, head_dim: sizes; symbolic ones stay symbolic.
            `batch` is the product of all dimensions before the heads; three-dimensional operands
            have one head. Zero where an opaque operator does not say.
        dtype, device: of the output.
        obstacle: why the site can never be rewritten, as a reason and one line of text, or None.
        other_calls: the modules around every further call, where the site is in a subgraph that
            several layers share (`nested_compile_region`); what is done to the site is done to all.
    """

    owner: fx.GraphModule
    node: fx.Node
    form: str
    query: fx.Node | None
    key: fx.Node | None
    value: fx.Node | None
    key_transposed: bool
    scale: float | None
    mask: fx.Node | None
    mask_form: str
    dropout: float
    is_causal: bool
    modules: tuple[ModuleRef, ...]
    layer: str
    batch: Size
    heads: Size
    kv_heads: Size
    tokens: Size
    key_tokens: Size
    head_dim: Size
    dtype: torch.dtype
    device: torch.device
    obstacle: Decline | None
    other_calls: tuple[tuple[ModuleRef, ...], ...] = ()
    query_mask: fx.Node | None = None


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """All attention sites in graph order, each subgraph where it is first called.

    Adds guards only where a site's own nature depends on a symbol: a symbolic head_dim is held to
    the sizes that the op takes, and a symbolic float scale or dropout probability to its value.
    """
    search = _Search(may_be_trained(gm))
    search.visit(gm, (), (), None)
    return [
        replace(
            site,
            other_calls=tuple(calls),
            obstacle=site.obstacle or search.obstacles.get(site),
        )
        for site, calls in search.calls.items()
    ]


def describe(site: Site) -> str:
    """One line for logs: layer, form, heads x tokens x head_dim, dtype, and the obstacle if any."""
    tokens, key_tokens, heads, kv_heads = map(
        str, (site.tokens, site.key_tokens, site.heads, site.kv_heads)
    )
    tokens = tokens if tokens == key_tokens else f"{tokens}→{key_tokens}"
    heads = heads if heads == kv_heads else f"{heads}/{kv_heads}"
    parts = [
        site.layer or "(unnamed)",
        site.form,
        f"{site.batch}×{heads}×{tokens}×{site.head_dim}",
        str(site.dtype).removeprefix("torch."),
    ]
    if site.is_causal:
        parts.append("causal")
    if site.mask is not None:
        parts.append(f"mask {site.mask.name}")
    if site.other_calls:
        parts.append(f"shared by {1 + len(site.other_calls)} calls")
    if site.obstacle is not None:
        reason, text = site.obstacle
        parts.append(f"{reason.value}: {text}")
    return ", ".join(parts)


class _Search:
    """Walks a graph and its subgraphs, once for every chain of calls that leads to them."""

    def __init__(self, is_trained: bool) -> None:
        self._is_trained = is_trained
        # Of subgraphs that are called a second time.
        self.obstacles: dict[Site, Decline] = {}
        # Each site with the modules around every call but the first, in graph order.
        self.calls: dict[Site, list[tuple[ModuleRef, ...]]] = {}
        self._sites: dict[fx.GraphModule, list[Site]] = {}
        self._traced: dict[fx.GraphModule, tuple[ModuleRef, ...]] = {}

    def visit(
        self,
        gm: fx.GraphModule,
        traced: tuple[ModuleRef, ...],
        caller: tuple[ModuleRef, ...],
        obstacle: Decline | None,
    ) -> None:
        """Visits `gm` as called from inside the modules `caller`.

        Its nodes name the modules of the call that was traced, inside `traced`. `obstacle` holds
        for all of its sites.
        """
        for known in self._sites.get(gm, ()):
            modules = rebase(known.modules, traced, caller)
            if modules != known.modules and modules not in self.calls[known]:
                self.calls[known].append(modules)
            if obstacle is not None:
                self.obstacles.setdefault(known, obstacle)
        first_visit = gm not in self._sites
        sites = self._sites.setdefault(gm, [])
        reshaped = reshaped_in_place(gm.graph) if first_visit else []
        matches: dict[fx.Node, Match] = {}
        levels = Levels()
        for node in gm.graph.nodes:
            levels.visit(node)
            name = operator_name(node)
            for body in _bodies(gm, node):
                around = modules_of(node) or traced
                self._traced.setdefault(body, around)
                self.visit(
                    body,
                    self._traced[body],
                    rebase(around, traced, caller),
                    obstacle or _body_obstacle(node, levels),
                )
            if not first_visit:
                continue
            site: Site | None = None
            if name == "softmax":
                found = match(node)
                if found is not None:
                    matches.setdefault(found.node, found)
            elif name == "scaled_dot_product_attention":
                site = _fused(gm, node)
            elif name in _OPAQUE:
                site = _opaque(gm, node, name)
            elif node in matches:
                site = _written_out(gm, matches[node])
            if site is None:
                continue
            modules = modules_of(node) or traced
            site = replace(
                site,
                modules=modules,
                layer=modules[-1].name if modules else "",
                obstacle=obstacle
                or site.obstacle
                or _reshaped(site, matches.get(node), reshaped)
                or levels.obstacle(_tensors_of(site), self._is_trained),
            )
            sites.append(site)
            self.calls[site] = []


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The subgraphs that a higher-order operator is called with."""
    if not isinstance(node.target, _torch.HigherOrderOperator):
        return []
    bodies: list[fx.GraphModule] = []
    for argument in node.all_input_nodes:
        if argument.op != "get_attr":
            continue
        body: Any = gm
        for part in str(argument.target).split("."):
            body = getattr(body, part, None)
        if isinstance(body, fx.GraphModule):
            bodies.append(body)
    return bodies


def _tensors_of(site: Site) -> list[torch.Tensor]:
    nodes = (site.query, site.key, site.value, site.mask, site.node)
    return [tensor for node in nodes if (tensor := tensor_of(node)) is not None]


def _body_obstacle(node: fx.Node, levels: Levels) -> Decline | None:
    """Why nothing in a higher-order operator's subgraphs may be rewritten, or None."""
    name = getattr(node.target, "__name__", "")
    if name in ("autograd_function_apply", "custom_function_call"):
        return Decline(
            Reason.OPAQUE, "inside a torch.autograd.Function, which has a backward of its own"
        )
    if levels.kinds:
        around = " of ".join(levels.kinds)
        return Decline(Reason.OPAQUE, f"in a subgraph ({name}) that is called inside {around}")
    return None


# --- the three forms -----------------------------------------------------------------------------


def _fused(gm: fx.GraphModule, node: fx.Node) -> Site | None:
    query = argument_of(node, 0, "query")
    key = argument_of(node, 1, "key")
    value = argument_of(node, 2, "value")
    mask = argument_of(node, 3, "attn_mask")
    dropout = number(argument_of(node, 4, "dropout_p", default=0.0))
    causal = argument_of(node, 5, "is_causal", default=False)
    scale_argument = node.kwargs.get("scale")
    scale = None if scale_argument is None else number(scale_argument)
    if isinstance(causal, fx.Node):
        causal = causal.meta.get("example_value")
    obstacle = None
    if dropout is None:
        obstacle = Decline(Reason.DROPOUT, "the dropout probability is not known when compiling")
    elif dropout != 0:
        obstacle = Decline(Reason.DROPOUT, f"attention dropout of {dropout:g} is active")
    elif not isinstance(causal, bool):
        obstacle = Decline(Reason.CAUSAL, "whether it is causal is not known when compiling")
    elif scale is None and scale_argument is not None:
        obstacle = Decline(Reason.SHAPE, "the scale is not known when compiling")
    return _site(
        gm,
        node,
        "sdpa",
        (query, key, value),
        scale=scale,
        mask=mask if isinstance(mask, fx.Node) else None,
        mask_form="sdpa" if isinstance(mask, fx.Node) else "",
        dropout=math.nan if dropout is None else dropout,
        is_causal=causal is not False,
        grouped=node.kwargs.get("enable_gqa", False) is True,
        obstacle=obstacle,
    )


def _written_out(gm: fx.GraphModule, found: Match) -> Site | None:
    site = _site(
        gm,
        found.node,
        "unfused",
        (found.query, found.key, found.value),
        key_transposed=found.key_transposed,
        scale=found.scale,
        mask=found.mask,
        mask_form=found.mask_form,
        dropout=found.dropout,
        is_causal=False,
        # A matmul broadcasts one key head over all query heads, which is what grouping means.
        grouped=True,
        obstacle=found.obstacle,
    )
    scores = tensor_of(found.scores)
    if site is None or scores is None or site.obstacle is None:
        return site
    # Operands that the op does not take may have their dimensions anywhere; the scores tell.
    heads = _heads(scores)
    return replace(
        site,
        batch=_batch(scores),
        heads=heads,
        kv_heads=heads,
        tokens=scores.shape[-2],
        key_tokens=scores.shape[-1],
        head_dim=found.head_dim,
    )


def _opaque(gm: fx.GraphModule, node: fx.Node, name: str) -> Site | None:
    query = tensor_of(argument_of(node, 0, "query", "src"))
    if query is None or query.dim() < 2:
        return None
    layer = name == "_transformer_encoder_layer_fwd"
    key = query if layer else tensor_of(argument_of(node, 1, "key"))
    embedding = query.shape[-1]
    heads = argument_of(node, 2 if layer else 4, "num_heads", "num_head")
    heads = heads if isinstance(heads, int | torch.SymInt) else 0
    tokens_at = 0 if name == "multi_head_attention_forward" or query.dim() == 2 else 1
    tokens = query.shape[tokens_at]
    return Site(
        owner=gm,
        node=node,
        form="opaque",
        query=None,
        key=None,
        value=None,
        key_transposed=False,
        scale=None,
        mask=None,
        mask_form="",
        dropout=0.0,
        is_causal=False,
        modules=(),
        layer="",
        batch=1 if query.dim() == 2 else query.shape[1 - tokens_at],
        heads=heads,
        kv_heads=heads,
        tokens=tokens,
        key_tokens=tokens if key is None else key.shape[tokens_at],
        head_dim=embedding // heads if heads else 0,
        dtype=query.dtype,
        device=query.device,
        obstacle=Decline(Reason.OPAQUE, _OPAQUE[name]),
    )


def _site(
    gm: fx.GraphModule,
    node: fx.Node,
    form: str,
    operands: tuple[Any, Any, Any],
    *,
    key_transposed: bool = False,
    scale: float | None,
    mask: fx.Node | None,
    mask_form: str,
    dropout: float,
    is_causal: bool,
    grouped: bool,
    obstacle: Decline | None,
) -> Site | None:
    """A site with its sizes and, if it has none yet, the obstacle that its operands are."""
    out = tensor_of(node)
    query, key, value = (tensor_of(operand) for operand in operands)
    if out is None or query is None or key is None or value is None:
        return None
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return None
    key_tokens = key.shape[-1 if key_transposed else -2]
    return Site(
        owner=gm,
        node=node,
        form=form,
        query=operands[0],
        key=operands[1],
        value=operands[2],
        key_transposed=key_transposed,
        scale=scale,
        mask=mask,
        mask_form=mask_form,
        dropout=dropout,
        is_causal=is_causal,
        modules=(),
        layer="",
        batch=_batch(query),
        heads=_heads(query),
        kv_heads=_heads(key),
        tokens=query.shape[-2],
        key_tokens=key_tokens,
        head_dim=query.shape[-1],
        dtype=out.dtype,
        device=out.device,
        obstacle=obstacle
        or unfit(out, (query, key, value), form, key_transposed, grouped)
        or unfit_mask(mask, query)
        or unfit_scale(scale),
    )


def _batch(tensor: torch.Tensor) -> Size:
    """The product of the dimensions before heads, tokens and head_dim."""
    return math.prod(tensor.shape[:-3]) if tensor.dim() != 3 else tensor.shape[0]


def _heads(tensor: torch.Tensor) -> Size:
    return tensor.shape[-3] if tensor.dim() >= 4 else 1


def _reshaped(site: Site, found: Match | None, reshaped: list[fx.Node]) -> Decline | None:
    """Refuses what gets another shape in place: only its last shape is recorded."""
    steps = found.steps if found is not None else ()
    tensors = [site.query, site.key, site.value, site.mask, site.node, *steps]
    for node in reshaped:
        if any(tensor is not None and shares_memory(node, tensor) for tensor in tensors):
            return Decline(Reason.SHAPE, f"{node.name} gets another shape in place")
    return None
