"""The decision on every attention site: rewritten with these parameters, or dense for this reason.

Sizes may be symbolic. A comparison of a backed symbol installs a guard, so that a shape on the
other side of it recompiles; nothing here turns a symbol into a number that the graph would keep.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gna_compile import _torch
from gna_compile.decision import Decision
from gna_compile.geometry import GeometryError, Link, of_heads
from gna_compile.graph.dynamo_frame import is_resumed, position_ids_outside
from gna_compile.graph.functorch import stand_in
from gna_compile.graph.pattern import HeadWindows, Windows, pattern_of, visible_pairs
from gna_compile.graph.shown_keys import shown_keys
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size, enters, hint, holds
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
        facts_of_layer = LayerFacts(name, classes, site.tokens, grid)
        chosen = policy.rules_of_heads(facts_of_layer, site.heads, phase)
        if policy.names_heads(facts_of_layer, phase):
            _check_heads(site, flow)
        rules = [rule for _, rule in chosen if rule is not None]
        if not rules:
            raise _Dense(Reason.NO_RULE)
        windowed = [rule for rule in rules if not rule.dense]
        facts["rule"] = (windowed or rules)[0].index
        if not windowed:
            raise _Dense(Reason.RULE_DENSE)
        rule = _agreeing(windowed)
        layout = _layout(site, flow, annotation, rule, root, packed_grids)
        if isinstance(layout, Decline):
            raise _Dense(layout.reason, layout.detail)
        if relation == "unknown":
            raise _Dense(
                Reason.LAYOUT_UNKNOWN, "queries and keys are not known to be the same tokens"
            )
        facts["layout"] = layout = _within_reach(site, layout)
        _check_mask(site, layout, rule)
        windows = _windows(site, layout, chosen, rule)
        _check_causal(site, layout, windows)
        facts["flop_share"] = _check_gain(site, layout, windows, policy)
        problems = _problems(site, layout, windows)
        providers = [_provider(problem, policy) for problem in problems]
        forecasts = [p.forecast(problem) for p, problem in zip(providers, problems, strict=True)]
        speedup = _speedup_of_all(problems, [forecast.speedup for forecast in forecasts])
        _check_speedup(facts["flop_share"], speedup, policy)
    except _Dense as dense:
        return Decision(**facts, reason=dense.reason, detail=dense.detail)
    return Decision(
        **facts,
        windows=windows,
        predicted_speedup=speedup,
        provider=" and ".join(dict.fromkeys(provider.name for provider in providers)),
        detail="; ".join(dict.fromkeys(f.hint for f in forecasts if f.hint)),
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
            declared = replace(declared, segments=packed) if declared else DeclaredLayout(packed)
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

    segments = tuple(
        tuple(map(reached, segment)) if isinstance(segment, tuple) else reached(segment)
        for segment in layout.segments
    )
    return replace(layout, segments=segments)


def _check_mask(site: Site, layout: Layout, rule: Rule) -> None:
    if site.mask is None:
        return
    is_declared = rule.key_mask == "global_tokens"
    if not is_declared and (site.mask_form != "sdpa" or not _shows_grids(site.mask, layout)):
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
    if bool(layout.global_tokens == 0):
        raise _Dense(Reason.MASK, "there are no global tokens that the mask could hide")


def _shows_grids(mask: torch.fx.Node, layout: Layout) -> bool:
    """Whether a mask is proven to show all tokens of the grids, as one that hides padded text does."""
    shown = shown_keys(mask)
    if shown is None or len(shown) != hint(layout.tokens):
        return False
    return all(
        bool(shown[hint(start) : hint(start) + hint(math.prod(grid))].all())
        for start, grid in layout.placed
        if isinstance(grid, tuple)
    )


def _check_heads(site: Site, flow: TokenFlow) -> None:
    """Rules that name heads are for sites that are known to have all of a layer's, one by one."""
    if bool(site.heads == 1):
        raise _Dense(
            Reason.HEADS,
            "a rule names heads, but this attention has one in its shape: others may be in its batch",
        )
    if not flow.known(site).has_heads:
        raise _Dense(
            Reason.HEADS,
            "a rule names heads, but nothing shows that dimension 1 of [batch, heads, tokens, "
            "head_dim] has the heads of this layer, and the batch samples alone",
        )


def _agreeing(rules: Sequence[Rule]) -> Rule:
    """The first of the rules for the heads of one layer, which must agree on all but windows."""
    first, *others = rules
    for other in others:
        for key in ("layout", "global_tokens", "key_mask", "between_grids"):
            if getattr(first, key) != getattr(other, key):
                raise _Dense(
                    Reason.HEADS,
                    f"rules[{first.index}] and rules[{other.index}] are for heads of one layer, but "
                    f"their `{key}` differ: write it in the policy, or alike in both",
                )
    return first


def _windows(
    site: Site, layout: Layout, chosen: Sequence[tuple[Size, Rule | None]], rule: Rule
) -> Windows:
    """The windows of each head on each grid."""
    groups: list[HeadWindows] = []
    for heads, own in chosen:
        windows: tuple[Parameters | None, ...] = (None,) * len(layout.grids)
        if own is not None and not own.dense:
            windows = _of_rule(own, layout)
        if groups and groups[-1].windows == windows:
            groups[-1] = HeadWindows(groups[-1].heads + heads, windows)
        else:
            groups.append(HeadWindows(heads, windows))
    between = _LINKS[rule.between_grids]
    if between is Link.NONE and len(layout.grids) > 1:
        if any(own is None or own.dense for _, own in chosen):
            raise _Dense(
                Reason.HEADS,
                "`between_grids: none` holds for all heads of a layer, and some have no window: give "
                "them a rule of their own, or leave them all",
            )
    elif all(window is None for group in groups for window in group.windows):
        raise _Dense(Reason.WINDOW_COVERS_GRID)
    if len(groups) > 1:
        shared = int(site.heads) // int(site.kv_heads)
        for group in groups:
            if group.heads % shared:
                raise _Dense(
                    Reason.HEADS,
                    f"{shared} query heads share a key head, but a group has {group.heads} heads: "
                    f"give `heads` in multiples of {shared}",
                )
    windows_of_all = Windows(tuple(groups), between)
    if between is Link.WINDOW:
        _hold_lengths(layout)
    try:
        pattern_of(layout, windows_of_all)
    except GeometryError as error:
        raise _Dense(Reason.LAYOUT_MISMATCH, str(error)) from None
    return windows_of_all


def _hold_lengths(layout: Layout) -> None:
    """Guards which axes of two grids are equal: whether they can be aligned rests on it."""
    for grid, other in itertools.combinations(layout.grids, 2):
        for one, two in zip(grid, other, strict=False):
            if not holds(one == two):
                _ = holds(one == 1), holds(two == 1)


_LINKS = {"full": Link.FULL, "none": Link.NONE, "aligned": Link.WINDOW}


def _of_rule(rule: Rule, layout: Layout) -> tuple[Parameters | None, ...]:
    """The windows of a rule on each grid; None on those that it leaves full."""
    which = ""
    windows: list[Parameters | None] = []
    try:
        chosen = rule.chosen_grids(layout.grids)
        for place, grid in enumerate(layout.grids):
            which = f"grid {place} of {layout.words}: " if len(layout.grids) > 1 else ""
            window = rule.parameters(grid) if place in chosen else None
            windows.append(None if window is None or _covers(window, grid) else window)
    except PolicyMismatch as error:
        raise _Dense(error.reason, f"{which}{error}") from None
    return tuple(windows)


def _covers(window: Parameters, grid: Sequence[Size]) -> bool:
    return not any(window.causal) and all(
        bool(w == n) for w, n in zip(window.window, grid, strict=True)
    )


def _check_causal(site: Site, layout: Layout, windows: Windows) -> None:
    if not site.is_causal:
        return
    is_line = len(layout.segments) == 1 and len(layout.grid) == 1
    causal = [window is not None and all(window.causal) for g in windows.groups for window in g[1]]
    if not (is_line and all(causal)):
        raise _Dense(Reason.CAUSAL)


def _check_gain(site: Site, layout: Layout, windows: Windows, policy: Policy) -> float:
    if bool(site.tokens < policy.min_tokens):
        raise _Dense(Reason.TOO_FEW_TOKENS, f"{site.tokens} < min_tokens {policy.min_tokens}")
    pairs = visible_pairs(layout, windows)
    dense = windows.heads * site.tokens * site.tokens
    share = hint(pairs) / hint(dense)
    if bool(pairs * policy.min_speedup > dense):
        raise _Dense(
            Reason.SLOWDOWN,
            f"FLOP bound {1 / share:.2f}x is below min_speedup {policy.min_speedup:g}",
        )
    return share


def _check_speedup(flop_share: float, predicted: float | None, policy: Policy) -> None:
    """The forecast is for the example sizes only, and other sizes get no guard."""
    if predicted is not None and predicted < policy.min_speedup:
        raise _Dense(
            Reason.SLOWDOWN,
            f"predicted speedup {predicted:.2f}x (FLOP bound {1 / flop_share:.2f}x) is below "
            f"min_speedup {policy.min_speedup:g}",
        )


def _speedup_of_all(problems: Sequence[Problem], speedups: Sequence[float | None]) -> float | None:
    """The speedup of all heads; None where that of some is not known."""
    known = [speedup for speedup in speedups if speedup is not None]
    if len(known) < len(speedups):
        return None
    times = (problem.heads / speedup for problem, speedup in zip(problems, known, strict=True))
    return sum(problem.heads for problem in problems) / sum(times)


def _problems(site: Site, layout: Layout, windows: Windows) -> list[Problem]:
    """What providers are asked for: the heads of each group."""
    assert site.query is not None and site.key is not None and site.value is not None
    pattern = pattern_of(layout, windows)
    heads, kv_heads = hint(site.heads), hint(site.kv_heads)
    return [
        Problem(
            device=site.device.type,
            dtype=site.dtype,
            batch=hint(site.batch),
            heads=group.heads,
            kv_heads=kv_heads * group.heads // heads,
            head_dim=hint(site.head_dim),
            pattern=of_heads(pattern, group),
            has_key_mask=site.mask is not None,
            query_strides=_strides(site.query),
            key_strides=_strides(site.key, transposed=site.key_transposed),
            value_strides=_strides(site.value),
        )
        for group in pattern.head_groups
    ]


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
