"""The decision on every attention site: rewritten with these parameters, or dense for this reason.

Sizes may be symbolic. A comparison of a backed symbol installs a guard, so that a shape on the
other side of it recompiles; nothing here turns a symbol into a number that the graph would keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gna_compile import _torch
from gna_compile.decision import Decision
from gna_compile.geometry import AttentionPattern, GeometryError, Neighborhood
from gna_compile.graph.dynamo_frame import is_resumed, position_ids_outside
from gna_compile.graph.functorch import stand_in
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size, enters, hint
from gna_compile.graph.tokens.declared import resolve
from gna_compile.graph.tokens.layouts import Layout, TokenFlow
from gna_compile.policy import DeclaredLayout, LayerFacts, Parameters, Policy, PolicyMismatch, Rule
from gna_compile.prepared.annotations import Annotation, model_around
from gna_compile.prepared.packed_grid import Mark
from gna_compile.prepared.packed_layout import packed_grid_of
from gna_compile.providers import Declined, Problem, Provider, choose
from gna_compile.reasons import Decline, Reason


class _Dense(Exception):
    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason, self.detail = reason, detail or reason.meaning


def decide(
    site: Site,
    flow: TokenFlow,
    policy: Policy | None,
    phase: str,
    root: torch.nn.Module | None = None,
    annotations: Mapping[int, Annotation] | None = None,
    packed_grids: Sequence[Mark] = (),
) -> Decision:
    """Decides on one site in one phase.

    Args:
        site: the site, as `find_sites` found it.
        flow: the token flow of the graph that the site is in.
        policy: the policy given with the compile options; an annotation made by `prepare` overrides it.
        phase: which of the policy's phases to decide for.
        root: the module whose method is being compiled.
        annotations: the annotations on it and its submodules, by `id` of the module.
        packed_grids: the grids of packed latents that guards hold the graph to.
    """
    decision = _decide(site, flow, policy, phase, root, annotations or {}, packed_grids)
    for modules in site.other_calls:
        layer = modules[-1].name if modules else ""
        call = replace(site, modules=modules, layer=layer, other_calls=())
        other = _decide(call, flow, policy, phase, root, annotations or {}, packed_grids)
        if not decision.same_rewrite(other):
            return Decision(
                site,
                decision.layer,
                decision.layout,
                reason=Reason.SHARED,
                detail=f"{decision.layer} and {other.layer} share a subgraph, not a decision",
            )
    return decision


def _decide(
    site: Site,
    flow: TokenFlow,
    policy: Policy | None,
    phase: str,
    root: torch.nn.Module | None,
    annotations: Mapping[int, Annotation],
    packed_grids: Sequence[Mark],
) -> Decision:
    annotation = _annotation_for(site, root, annotations)
    name = annotation.name if annotation is not None else site.layer
    classes = annotation.classes if annotation is not None else tuple(m.cls for m in site.modules)
    facts: dict[str, Any] = {"site": site, "layer": name}
    try:
        if site.obstacle is not None:
            raise _Dense(*site.obstacle)
        relation = flow.relation(site)
        if relation == "cross":
            raise _Dense(Reason.CROSS_ATTENTION)
        policy = annotation.policy if annotation is not None else policy
        if policy is None:
            raise _Dense(Reason.NO_RULE, "no policy reaches this graph: give one, or call prepare")
        layout = _layout(site, flow, annotation, policy, root, packed_grids)
        grid = layout.grid if isinstance(layout, Layout) else None
        rule = policy.rule_for(LayerFacts(name, classes, site.tokens, grid), phase)
        if rule is None:
            raise _Dense(Reason.NO_RULE)
        facts["rule"] = rule.index
        if rule.dense:
            raise _Dense(Reason.RULE_DENSE)
        layout = _layout(site, flow, annotation, rule, root, packed_grids)
        if isinstance(layout, Decline):
            raise _Dense(layout.reason, layout.detail)
        if relation == "unknown":
            raise _Dense(
                Reason.LAYOUT_UNKNOWN, "queries and keys are not known to be the same tokens"
            )
        facts["layout"] = layout = _within_reach(site, layout)
        _check_mask(site, layout, rule)
        parameters = _parameters(rule, layout)
        _check_causal(site, layout, parameters)
        facts["flop_share"] = _check_gain(site, layout, parameters, policy)
        problem = _problem(site, layout, parameters)
        provider = _provider(problem, policy)
        forecast = provider.forecast(problem)
        _check_speedup(problem, forecast.speedup, policy)
    except _Dense as dense:
        return Decision(**facts, reason=dense.reason, detail=dense.detail)
    return Decision(
        **facts,
        parameters=parameters,
        predicted_speedup=forecast.speedup,
        provider=provider.name,
        detail=forecast.hint,
    )


def _annotation_for(
    site: Site, root: torch.nn.Module | None, annotations: Mapping[int, Annotation]
) -> Annotation | None:
    """The annotation on the innermost module around the site that has one."""
    for ref in reversed(site.modules):
        if ref.id in annotations:
            return annotations[ref.id]
        if ref.id == 0 and root is not None and _has_submodule(root, ref.name):
            annotation = annotations.get(id(root.get_submodule(ref.name)))
            if annotation is not None:
                return annotation
    return annotations.get(id(root))


def _has_submodule(root: torch.nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _layout(
    site: Site,
    flow: TokenFlow,
    annotation: Annotation | None,
    declaring: Policy | Rule,
    root: torch.nn.Module | None,
    packed_grids: Sequence[Mark],
) -> Layout | Decline:
    """The layout by `prepare`, the policy or its rule, or the graph; what inputs show must agree."""
    declared = declaring.layout
    why = ""
    if annotation is not None:
        declared = annotation.layout or declared
        packed = packed_grid_of(site, flow, annotation, declared, root, packed_grids)
        if isinstance(packed, Decline):
            return packed
        if packed is not None:
            declared = replace(declared, grid=packed) if declared else DeclaredLayout(packed)
        why = annotation.packed.why[0] if annotation.packed is not None else ""
    elif declared is not None and isinstance(flow.layout(site), Decline):
        ids = position_ids_outside()
        if ids is not None:
            return Decline(
                Reason.LAYOUT_UNKNOWN,
                f"a grid is declared, but {ids} outside this graph decides on the grid at every "
                "call: use gna_compile.prepare(model, policy)",
            )
        missing = _torch.why_not("prepare")
        if missing is not None:
            return Decline(
                Reason.TORCH,
                "a grid is declared, but whether this graph is a whole model is not known: "
                f"{missing}",
            )
        if is_resumed() or model_around(root) is not root:
            return Decline(
                Reason.LAYOUT_UNKNOWN,
                "a grid is declared, but this graph is a part of a model, and only the inputs of the "
                "whole show at each call whether it holds: use gna_compile.prepare(model, policy)",
            )
    layout = resolve(site, flow, declared, declaring.global_tokens)
    if why and isinstance(layout, Decline) and layout.reason is Reason.LAYOUT_UNKNOWN:
        return layout._replace(detail=why)
    return layout


def _within_reach(site: Site, layout: Layout) -> Layout:
    """The layout with sizes held to their values that do not enter the site's own subgraph."""

    def reached(size: Size) -> Size:
        return size if enters(size, site.owner.graph) else int(size)

    grid = tuple(map(reached, layout.grid))
    return replace(layout, grid=grid, prefix=reached(layout.prefix), suffix=reached(layout.suffix))


def _check_mask(site: Site, layout: Layout, rule: Rule) -> None:
    if site.mask is None:
        return
    if rule.key_mask != "global_tokens":
        raise _Dense(Reason.MASK)
    if site.mask_form != "sdpa":
        raise _Dense(Reason.MASK, "the mask of unfused attention is an additive bias")
    mask = site.mask.meta["example_value"]
    if mask.dtype != torch.bool:
        raise _Dense(Reason.MASK, f"a key mask is boolean, this one is {mask.dtype}")
    *outer, last = mask.shape
    padded = [1] * (4 - mask.ndim) + outer
    if mask.ndim > 4 or not (bool(last == site.tokens) and all(bool(s == 1) for s in padded[1:])):
        raise _Dense(
            Reason.MASK,
            f"a key mask has shape [batch, 1, 1, {site.tokens}], this one {list(mask.shape)}",
        )
    if bool(layout.prefix + layout.suffix == 0):
        raise _Dense(Reason.MASK, "there are no global tokens that the mask could hide")


def _parameters(rule: Rule, layout: Layout) -> Parameters:
    try:
        parameters = rule.parameters(layout.grid)
    except PolicyMismatch as error:
        raise _Dense(error.reason, str(error)) from None
    if not any(parameters.causal) and all(
        bool(w == n) for w, n in zip(parameters.window, layout.grid, strict=True)
    ):
        raise _Dense(Reason.WINDOW_COVERS_GRID)
    return parameters


def _check_causal(site: Site, layout: Layout, parameters: Parameters) -> None:
    if not site.is_causal:
        return
    one_dimensional = len(layout.grid) == 1 and bool(layout.prefix + layout.suffix == 0)
    if not (one_dimensional and all(parameters.causal)):
        raise _Dense(Reason.CAUSAL)


def _check_speedup(problem: Problem, predicted: float | None, policy: Policy) -> None:
    """The forecast is for the example sizes only, and other sizes get no guard."""
    if predicted is not None and predicted < policy.min_speedup:
        bound = 1 / problem.neighborhood.flop_share
        raise _Dense(
            Reason.SLOWDOWN,
            f"predicted speedup {predicted:.2f}x (FLOP bound {bound:.2f}x) is below "
            f"min_speedup {policy.min_speedup:g}",
        )


def _check_gain(site: Site, layout: Layout, parameters: Parameters, policy: Policy) -> float | None:
    if bool(site.tokens < policy.min_tokens):
        raise _Dense(Reason.TOO_FEW_TOKENS, f"{site.tokens} < min_tokens {policy.min_tokens}")
    pairs = _visible_pairs(layout, parameters)
    share = hint(pairs) / hint(site.tokens) ** 2
    if bool(pairs * policy.min_speedup > site.tokens * site.tokens):
        raise _Dense(
            Reason.SLOWDOWN,
            f"FLOP bound {1 / share:.2f}x is below min_speedup {policy.min_speedup:g}",
        )
    return share


def _visible_pairs(layout: Layout, parameters: Parameters) -> Size:
    sizes = (*layout.grid, *parameters.window, *parameters.stride, layout.prefix, layout.suffix)
    if all(isinstance(size, int) for size in sizes):
        return _neighborhood(layout, parameters).pairs
    grid = math.prod(layout.grid)
    tokens = layout.prefix + grid + layout.suffix
    return grid * math.prod(parameters.window) + tokens * tokens - grid * grid


def _neighborhood(layout: Layout, parameters: Parameters) -> Neighborhood:
    try:
        return Neighborhood.of(
            [hint(size) for size in layout.grid],
            [hint(size) for size in parameters.window],
            [hint(size) for size in parameters.stride],
            [hint(size) for size in parameters.dilation],
            parameters.causal,
            hint(layout.prefix),
            hint(layout.suffix),
        )
    except GeometryError as error:
        raise _Dense(Reason.LAYOUT_MISMATCH, str(error)) from None


def _problem(site: Site, layout: Layout, parameters: Parameters) -> Problem:
    assert site.query is not None and site.key is not None and site.value is not None
    return Problem(
        device=site.device.type,
        dtype=site.dtype,
        batch=hint(site.batch),
        heads=hint(site.heads),
        kv_heads=hint(site.kv_heads),
        head_dim=hint(site.head_dim),
        pattern=AttentionPattern.of_neighborhood(
            _neighborhood(layout, parameters), hint(site.heads)
        ),
        has_key_mask=site.mask is not None,
        query_strides=_strides(site.query),
        key_strides=_strides(site.key, transposed=site.key_transposed),
        value_strides=_strides(site.value),
    )


def _provider(problem: Problem, policy: Policy) -> Provider:
    provider = choose(problem, allow_slow=policy.allow_slow_providers)
    if isinstance(provider, Declined):
        reasons = "; ".join(f"{name}: {why}" for name, why in provider.reasons.items())
        raise _Dense(Reason.NO_FAST_PROVIDER, reasons)
    return provider


def _strides(node: torch.fx.Node, transposed: bool = False) -> tuple[int, ...]:
    tensor = stand_in(node.meta["example_value"])
    if transposed:
        tensor = tensor.transpose(-1, -2)
    if tensor.ndim > 4:  # the rewrite makes all dimensions before the heads one batch
        tensor = tensor.flatten(0, tensor.ndim - 4)
    strides = [hint(stride) for stride in tensor.stride()]
    if len(strides) == 3:
        strides.insert(1, strides[0])
    return tuple(strides)
