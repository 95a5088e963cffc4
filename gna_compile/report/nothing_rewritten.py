"""Warnings about what a user would not notice: a model that is compiled and stays dense.

A model may be compiled in many graphs, by regional compilation (block by block) or around graph
breaks, and there is no call
that ends it. So nothing is said while some layer of the model that a window of the policy is meant
for has not been compiled yet, and nothing once a graph was rewritten. Each is said once for a policy
and a class of models, until `torch._dynamo.reset()`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from gna_compile.policy import Policy
from gna_compile.prepared.annotations import Annotation, attention_names, class_stack, model_around
from gna_compile.reasons import Reason

if TYPE_CHECKING:
    from gna_compile.decision import Decision

log = logging.getLogger("gna_compile")


@dataclass
class _Model:
    """What is known of the graphs of one class of models under one policy.

    Attributes:
        is_settled: whether something was said or rewritten.
        layers: names of the layers that were compiled.
        shared: what stands for all layers that may share a graph, of those compiled by themselves.
        dense: reason, and reason in words, of each site.
    """

    is_settled: bool = False
    layers: set[str] = field(default_factory=set)
    shared: set[tuple[str, Any]] = field(default_factory=set)
    dense: list[tuple[Reason, str]] = field(default_factory=list)


_models: dict[tuple[str, str], _Model] = {}


def forget() -> None:
    """Says everything anew from now on."""
    _models.clear()


def say(
    decisions: Iterable[Sequence[Decision]],
    policies: Collection[Policy],
    root: nn.Module | None,
    annotations: Collection[Annotation],
) -> None:
    """Warns, if it is time to, that declared grids do not hold or that nothing was rewritten.

    Args:
        decisions: those on each site of a graph that is being compiled, for each phase.
        policies: the policies that decided.
        root: the module whose method is being compiled.
        annotations: those on the modules in it.
    """
    by_site = list(zip(*decisions, strict=True))
    model = model_around(root)
    told = _say_of_declared_grids(by_site, annotations)
    for policy in policies:
        if all(rule.dense for rule in policy.rules):
            continue
        name = type(model).__qualname__ if model is not None else ""
        known = _models.setdefault((policy.fingerprint, name), _Model())
        rewritten = any(decision.is_rewritten for site in by_site for decision in site)
        known.is_settled |= told or rewritten
        if not known.is_settled:
            _say_that_nothing_is_rewritten(by_site, policy, known, model, root, annotations)


def _say_of_declared_grids(
    by_site: Sequence[Sequence[Decision]], annotations: Collection[Annotation]
) -> bool:
    """Says which declared grid contradicts the inputs; whether any does."""
    refused = [d for site in by_site for d in site if d.reason is Reason.LAYOUT_MISMATCH]
    told = False
    for packed in {
        annotation.packed for annotation in annotations if annotation.packed is not None
    }:
        layers = {d.layer: d.detail for d in refused if d.detail in packed.why[1:]}
        if not layers:
            continue
        told = True
        if not packed.is_said:
            packed.is_said = True
            log.warning(
                "%s: %s dense while it does not hold. Give the grid of this size with "
                'gna_compile.prepare(model, policy, layout={"grid": [...]}), or declare none and '
                "compile the whole model, whose graph may show it.",
                next(iter(layers.values())),
                _listed(list(layers)),
            )
    return told


def _listed(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return f"{layers[0] or 'the attention'} stays"
    return f"{layers[0]} and {len(layers) - 1} more stay"


def _say_that_nothing_is_rewritten(
    by_site: Sequence[Sequence[Decision]],
    policy: Policy,
    known: _Model,
    model: nn.Module | None,
    root: nn.Module | None,
    annotations: Collection[Annotation],
) -> None:
    named = dict(model.named_modules()) if model is not None else {}
    prefix = next((name for name, module in named.items() if module is root), "")
    given = {annotation.name for annotation in annotations}
    for site in by_site:
        decision = next((d for d in site if d.reason is not Reason.RULE_DENSE), site[0])
        layer = decision.layer
        full = layer if layer in given else ".".join(filter(None, (prefix, layer)))
        known.layers.add(full)
        if root is not None and root is not model:
            known.shared.add(_shared(policy, named, full) if given else (_kind(full), None))
        if decision.reason is None or decision.reason is Reason.CROSS_ATTENTION:
            continue
        classes = class_stack(named, full)
        words = _words(decision, full, policy, has_window(policy, full, classes), prefix, given)
        known.dense.append((decision.reason, words))
    meant = {
        name
        for name in attention_names(named)
        if has_window(policy, name, class_stack(named, name))
    }
    if not known.dense or not all(_is_compiled(name, policy, named, known) for name in meant):
        return
    known.is_settled = True
    reasons = Counter(reason for reason, _ in known.dense)
    ((reason, count),) = reasons.most_common(1)
    log.warning(
        "policy %r: none of %d attention sites%s was rewritten; most often %s (%d): %s",
        policy.name,
        len(known.dense),
        f" of {type(model).__name__}" if model is not None else "",
        reason.value,
        count,
        next(words for other, words in known.dense if other is reason),
    )


def _words(
    decision: Decision,
    full: str,
    policy: Policy,
    is_meant: bool,
    prefix: str,
    given: Collection[str],
) -> str:
    """The reason for one site, and the next step."""
    explain = "gna_compile.explain(model, policy=policy, **inputs) shows every layer."
    if decision.reason is Reason.NO_RULE and is_meant and not given:
        return (
            f"{full} is compiled by itself, where layers have lost their names. Call "
            "gna_compile.prepare(model, policy) before the model is compiled."
        )
    if decision.reason in (Reason.NO_RULE, Reason.RULE_DENSE) and not is_meant:
        layers = [layer for rule in policy.rules if not rule.dense for layer in rule.layers]
        meant = f"; its windows are for {', '.join(dict.fromkeys(layers))}" if layers else ""
        which = "no rule" if decision.reason is Reason.NO_RULE else "no rule with a window"
        return f"{which} matches {full or 'the layer'}{meant}. Correct the pattern: {explain}"
    where = f"{full}: " if full else ""
    if decision.reason is Reason.LAYOUT_UNKNOWN and prefix and not given:
        return (
            f"{where}{decision.detail}. Block by block, call gna_compile.prepare(model, policy, "
            'layout={"grid": [...]}) first.'
        )
    return f"{where}{decision.detail}. {explain}"


def has_window(policy: Policy, name: str, classes: Sequence[str]) -> bool:
    """Whether a layer can fall under a rule with a window."""
    return any(not policy.rules[index].dense for index in policy.signature(name, classes))


def _kind(name: str) -> str:
    """A layer's name without its numbers: blocks of one class may share a graph."""
    return re.sub(r"\b\d+\b", "*", name)


def _shared(policy: Policy, named: Mapping[str, nn.Module], name: str) -> tuple[str, Any]:
    """Equal for layers of a prepared model that may share a graph."""
    return _kind(name), policy.signature(name, class_stack(named, name))


def _is_compiled(name: str, policy: Policy, named: Mapping[str, nn.Module], known: _Model) -> bool:
    """Whether a layer, one in it or one around it was compiled, or one that it shares a graph with."""
    if any(_is_within(name, other) or _is_within(other, name) for other in known.layers):
        return True
    kind, signature = _shared(policy, named, name)
    return any(
        (_is_within(kind, other) or _is_within(other, kind)) and theirs in (None, signature)
        for other, theirs in known.shared
    )


def _is_within(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")
