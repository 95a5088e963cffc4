"""What to simulate: a problem given by flags, a named case, or every rule of a policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gna_compile.geometry import GeometryError, Neighborhood
from gna_compile.planner import Workload
from gna_compile.policy import (
    DeclaredLayout,
    Policy,
    PolicyMismatch,
    Rule,
    load_policy,
    shipped_policies,
)
from gna_compile.simulate.cases import CASES, MODELS, Model


class SimulateError(ValueError):
    """A request that makes no sense; the message names the value and says what to do."""


@dataclass(frozen=True)
class Entry:
    """One row to simulate.

    Attributes:
        name: the case, the rule, or "given".
        workload: the problem; None if the rule does not fit the grid.
        problem: why it does not.
        attention_share: share of a run's time that this attention takes when dense, if known.
        dense_steps: how many steps of how many stay dense.
    """

    name: str
    workload: Workload | None
    problem: str = ""
    attention_share: float | None = None
    dense_steps: tuple[int, int] = (0, 1)


def named(target: str, given: dict[str, Any]) -> list[Entry]:
    """The entries of a case, of a shipped policy or of a policy file.

    Args:
        target: name or path.
        given: fields of `Model` that replace what is known of a shipped policy's model, or make up
            the model of another policy.

    Raises:
        SimulateError: if there is no such case or policy, or no grid for it.
        PolicyError: if the policy is not valid.
    """
    if target in CASES:
        if given:
            raise SimulateError(f"{target} is a fixed case: leave out {', '.join(given)}")
        return [Entry(target, CASES[target].workload)]
    if not target.endswith((".yaml", ".yml")) and target not in shipped_policies():
        raise SimulateError(
            f"{target!r} is neither a case ({', '.join(CASES)}), nor a shipped policy "
            f"({', '.join(shipped_policies())}), nor a path that ends in .yaml or .yml"
        )
    policy = load_policy(target)
    known = MODELS.get(target)
    if known is None and policy.layout is not None:
        known = _of_layout(policy.layout)
    if known is None and "grid" not in given:
        raise SimulateError(f"{target} says no grid: give it one with --grid, like 30,48,80")
    return _from_policy(policy, replace(known, **given) if known else Model(**given))


def _of_layout(layout: DeclaredLayout) -> Model:
    """The largest grid, and all else as global tokens around it."""
    sizes = [math.prod(s) if isinstance(s, tuple) else s for s in layout.segments]
    place = layout.segments.index(layout.grid)
    before, after = sum(sizes[:place]), sum(sizes[place + 1 :])
    return Model(
        layout.grid, prefix=before + (layout.prefix or 0), suffix=after + (layout.suffix or 0)
    )


def _from_policy(policy: Policy, model: Model) -> list[Entry]:
    rules = [rule for rule in policy.rules if not rule.dense]
    if not rules:
        raise SimulateError(f"policy {policy.name!r} has no rule with a window")
    # The share belongs to all layers together: with several rules nobody knows whose it is.
    share = model.attention_share if len(rules) == 1 else None
    steps = next(((p.first, p.of) for p in policy.phase_steps if p.first and p.of), (0, 1))
    return [replace(_from_rule(r, model), attention_share=share, dense_steps=steps) for r in rules]


def _from_rule(rule: Rule, model: Model) -> Entry:
    name = f"rules[{rule.index}]"
    if rule.heads:
        spans = [f"{low}-{high}" if low < high else str(low) for low, high in rule.heads]
        name += f" on heads {', '.join(spans)}"
    try:
        neighborhood = Neighborhood.of(
            model.grid, *rule.parameters(model.grid), model.prefix, model.suffix
        )
    except (PolicyMismatch, GeometryError) as error:
        return Entry(name, None, str(error))
    key_mask = model.key_mask and rule.key_mask is not None
    return Entry(name, Workload(neighborhood, model.heads, model.head_dim, key_mask=key_mask))
