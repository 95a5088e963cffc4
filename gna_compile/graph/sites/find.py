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
from gna_compile.graph.mutation import reshaped_in_place, shares_memory
from gna_compile.graph.nodes import argument_of, operator_name, tensor_of
from gna_compile.graph.sites.module_names import ModuleRef, modules_of, rebase
from gna_compile.graph.sites.unfused import Match, match
from gna_compile.graph.symbols import Size, holds, is_known, is_unbacked, number, same_shape
from gna_compile.reasons import Decline, Reason

__all__ = ["ModuleRef", "Site", "describe", "find_sites"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_HEAD_SIZE, _LARGEST_HEAD_SIZE = 8, 256
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


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """All attention sites in graph order, each subgraph where it is first called.

    Adds guards only where a site's own nature depends on a symbol: a symbolic head_dim is held to
    the sizes that the op takes, and a symbolic float scale or dropout probability to its value.
    """
    search = _Search()
    search.visit(gm, (), (), None)
    return [replace(site, other_calls=tuple(calls)) for site, calls in search.calls.items()]


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

    def __init__(self) -> None:
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
        first_visit = gm not in self._sites
        sites = self._sites.setdefault(gm, [])
        reshaped = reshaped_in_place(gm.graph) if first_visit else []
        matches: dict[fx.Node, Match] = {}
        for node in gm.graph.nodes:
            name = operator_name(node)
            for body in _bodies(gm, node):
                around = modules_of(node) or traced
                self._traced.setdefault(body, around)
                self.visit(
                    body,
                    self._traced[body],
                    rebase(around, traced, caller),
                    obstacle or _body_obstacle(node),
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
                obstacle=obstacle or site.obstacle or _reshaped(site, matches.get(node), reshaped),
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


def _body_obstacle(node: fx.Node) -> Decline | None:
    """Why nothing in a higher-order operator's subgraphs may be rewritten, or None."""
    name = getattr(node.target, "__name__", "")
    if name in ("autograd_function_apply", "custom_function_call"):
        return Decline(
            Reason.OPAQUE, "inside a torch.autograd.Function, which has a backward of its own"
        )
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
        or _unfit(out, (query, key, value), form, key_transposed, grouped)
        or _unfit_mask(mask, query)
        or _unfit_scale(scale),
    )


def _batch(tensor: torch.Tensor) -> Size:
    """The product of the dimensions before heads, tokens and head_dim."""
    return math.prod(tensor.shape[:-3]) if tensor.dim() != 3 else tensor.shape[0]


def _heads(tensor: torch.Tensor) -> Size:
    return tensor.shape[-3] if tensor.dim() >= 4 else 1


# --- obstacles -----------------------------------------------------------------------------------


def _unfit(
    out: torch.Tensor,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    form: str,
    key_transposed: bool,
    grouped: bool,
) -> Decline | None:
    """Why the op does not take operands of these kinds, sizes and dtypes, or None."""
    query, value = operands[0], operands[2]
    for tensor in (out, *operands):
        if not isinstance(tensor, _torch.FakeTensor) or tensor.layout != torch.strided:
            return Decline(
                Reason.SHAPE, "not plain tensors (a tensor subclass, vmap or torch.func.grad)"
            )
        if is_unbacked(tensor):
            return Decline(Reason.UNBACKED, f"a size of {_sizes(tensor)} depends on data")
    shapes = ", ".join(_sizes(tensor) for tensor in operands)
    rank = query.dim()
    if rank < 3 or any(tensor.dim() != rank for tensor in (out, *operands)):
        return Decline(
            Reason.SHAPE, f"operands of {shapes} do not have three or more dimensions each"
        )
    key_shape = list(operands[1].shape)
    if key_transposed:
        key_shape[-2:] = key_shape[:-3:-1]
    leading = max(rank - 3, 1)
    if any(not same_shape(o[:leading], query.shape[:leading]) for o in (key_shape, value.shape)):
        return Decline(Reason.SHAPE, f"the batch size differs between operands of {shapes}")
    if rank >= 4:
        heads, kv_heads = query.shape[-3], key_shape[-3]
        if not is_known(value.shape[-3] == kv_heads):
            return Decline(Reason.SHAPE, f"keys and values have different heads in {shapes}")
        if not is_known(heads == kv_heads) and not (
            grouped and holds(kv_heads > 0) and holds(heads % kv_heads == 0)
        ):
            return Decline(
                Reason.SHAPE, f"the heads of keys do not serve those of queries in {shapes}"
            )
    head_dim = query.shape[-1]
    if not is_known(key_shape[-1] == head_dim) or not is_known(value.shape[-1] == head_dim):
        return Decline(Reason.HEAD_SIZE, f"head_dim differs between operands of {shapes}")
    if not holds(head_dim >= _LEAST_HEAD_SIZE) or not holds(head_dim <= _LARGEST_HEAD_SIZE):
        return Decline(
            Reason.HEAD_SIZE,
            f"head_dim {head_dim} is not between {_LEAST_HEAD_SIZE} and {_LARGEST_HEAD_SIZE}",
        )
    if not same_shape(out.shape, query.shape):
        return Decline(
            Reason.SHAPE, f"the output {_sizes(out)} is not shaped as the query of {shapes}"
        )
    if any(is_known(size == 0) for tensor in operands for size in tensor.shape):
        return Decline(Reason.SHAPE, f"operands of {shapes} are empty")
    if any(tensor.device != out.device for tensor in operands):
        return Decline(Reason.SHAPE, "operands and output are on different devices")
    return _unfit_dtype(out, operands, form)


def _reshaped(site: Site, found: Match | None, reshaped: list[fx.Node]) -> Decline | None:
    """Refuses what gets another shape in place: only its last shape is recorded."""
    steps = found.steps if found is not None else ()
    tensors = [site.query, site.key, site.value, site.mask, site.node, *steps]
    for node in reshaped:
        if any(tensor is not None and shares_memory(node, tensor) for tensor in tensors):
            return Decline(Reason.SHAPE, f"{node.name} gets another shape in place")
    return None


def _unfit_dtype(
    out: torch.Tensor, operands: tuple[torch.Tensor, ...], form: str
) -> Decline | None:
    dtypes = {tensor.dtype for tensor in operands}
    names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in operands)
    if out.dtype not in _DTYPES or any(not dtype.is_floating_point for dtype in dtypes):
        return Decline(Reason.DTYPE, f"operands of {names}, output {out.dtype}")
    if torch.float64 in dtypes:
        return Decline(Reason.DTYPE, f"operands of {names}")
    # A fused node takes one dtype only, or any under autocast, which gives its output a half type.
    if form == "sdpa" and dtypes != {out.dtype} and out.dtype == torch.float32:
        return Decline(Reason.DTYPE, f"operands of {names} for an output of {out.dtype}")
    return None


def _unfit_mask(mask: fx.Node | None, query: torch.Tensor) -> Decline | None:
    """Refuses masks that broadcast over more batch dimensions than the op has."""
    if mask is None or query.dim() <= 4:
        return None
    return Decline(
        Reason.MASK, f"queries of {_sizes(query)} have a mask, for which one batch is needed"
    )


def _unfit_scale(scale: float | None) -> Decline | None:
    if scale is None or (math.isfinite(scale) and scale > 0):
        return None
    return Decline(Reason.SHAPE, f"the scale {scale:g} is not positive and finite")


def _sizes(tensor: torch.Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape)
