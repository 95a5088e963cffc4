"""Contradictions between keys of a policy that are valid one by one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gna_compile.policy.document import KeyPath
from gna_compile.policy.errors import PolicyMismatch
from gna_compile.policy.rules import DEFAULT_PHASE, Rule

if TYPE_CHECKING:
    from gna_compile.policy.schema import LayoutEntry, PolicyFile, RuleEntry, SegmentEntry

Conflict = tuple[KeyPath, str]


def conflicts(file: PolicyFile, rules: tuple[Rule, ...]) -> Iterator[Conflict]:
    """Key path and text of each contradiction; `rules` are the file's rules as built."""
    if DEFAULT_PHASE in file.phases:
        yield (
            ("phases", DEFAULT_PHASE),
            "always exists and covers the steps that no phase covers; remove it",
        )
    for phase, steps in file.phases.items():
        if steps and steps.first > steps.of:
            yield (
                ("phases", phase),
                f"first {steps.first} is more than the {steps.of} steps of the run",
            )
    yield from _layout_conflicts(file.layout, file.global_tokens, ())
    known = (DEFAULT_PHASE, *file.phases)
    for rule, entry in zip(rules, file.rules, strict=True):
        path: KeyPath = ("rules", rule.index)
        for phase in rule.phases:
            if phase not in known:
                near = difflib.get_close_matches(phase, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "declare it under `phases`"
                yield (*path, "phases"), f"{phase!r} is not a phase of the policy; {hint}"
        if entry.tokens and (entry.tokens.max or math.inf) < (entry.tokens.min or 0):
            yield (*path, "tokens"), f"min {entry.tokens.min} is more than max {entry.tokens.max}"
        if entry.dense is not None:
            yield from _dense_conflicts(entry, path)
        else:
            yield from _window_conflicts(entry, rule, path)


def _dense_conflicts(entry: RuleEntry, path: KeyPath) -> Iterator[Conflict]:
    if entry.dense is False:
        yield (*path, "dense"), "false says nothing; give a window instead, or `dense: true`"
    from gna_compile.policy.schema import CONDITIONS

    for key in type(entry).model_fields.keys() - CONDITIONS - {"dense"}:
        if getattr(entry, key) is not None:
            yield (*path, key), "has no effect in a dense rule; remove it or `dense`"


def _window_conflicts(entry: RuleEntry, rule: Rule, path: KeyPath) -> Iterator[Conflict]:
    if entry.window is None:
        yield path, "has no effect; give it `window` or `dense: true`"
        return
    columns = {
        key: getattr(rule, key) for key in ("window", "stride", "dilation", "causal", "base_grid")
    }
    rank = len(entry.window) if isinstance(entry.window, tuple) else rule.rank
    for key, values in columns.items():
        if isinstance(values, tuple) and len(values) != rank:
            yield (
                (*path, key),
                f"has {len(values)} entries where other keys of the rule have {rank}",
            )
            return
    if rule.grid_rank is not None and rank is not None and rank > rule.grid_rank:
        yield (*path, "grid_rank"), f"is {rule.grid_rank} in a rule whose window has {rank} axes"
    yield from _layout_conflicts(entry.layout, rule.global_tokens, path)
    wrong = list(_axis_conflicts(columns, rank or 1, path))
    yield from wrong
    if rule.layout and not wrong and rule.grid_rank in (None, len(rule.layout.grid)):
        try:
            places = rule.chosen_grids(rule.layout.grids)
        except PolicyMismatch as error:
            yield (*path, "grids"), f"does not fit the declared layout: {error}"
            return
        try:
            for place in sorted(places):
                rule.parameters(rule.layout.grids[place])
        except PolicyMismatch as error:
            yield (*path, "window"), f"does not fit the declared layout: {error}"


def _axis_conflicts(columns: Mapping[str, Any], rank: int, path: KeyPath) -> Iterator[Conflict]:
    for axis in range(rank):
        values = {k: v[axis] if isinstance(v, tuple) else v for k, v in columns.items()}
        window, stride, dilation = values["window"], values["stride"], values["dilation"]
        base, on = values["base_grid"], f" on axis {axis}" if rank > 1 else ""
        if window == "full":
            if dilation > 1:
                yield (
                    (*path, "dilation"),
                    f"{dilation}{on} needs a window smaller than the axis, not `full`",
                )
            continue
        if isinstance(window, Fraction):
            continue
        if stride > window:
            yield (
                (*path, "stride"),
                f"{stride}{on} is larger than the window {window}; make it at most {window}",
            )
        if base == "full":
            yield (
                (*path, "base_grid"),
                f"`full`{on} needs a window of `full` or a share there, not {window}",
            )
        elif base is not None and window * dilation > base:
            what = f"window {window}" + (f" x dilation {dilation}" if dilation > 1 else "")
            yield (*path, "window"), f"{what}{on} is larger than the base grid's {base} tokens"


def _layout_conflicts(
    layout: LayoutEntry | list[SegmentEntry] | None, global_tokens: str | None, path: KeyPath
) -> Iterator[Conflict]:
    if layout is None:
        return
    if isinstance(layout, list):
        for side, place in (("prefix", 0), ("suffix", len(layout) - 1)):
            if global_tokens not in (None, side) and layout[place].text is not None:
                yield (*path, "layout", place), f"contradicts `global_tokens: {global_tokens}`"
        return
    for side in ("prefix", "suffix"):
        if global_tokens not in (None, side) and getattr(layout, side):
            yield (*path, "layout", side), f"contradicts `global_tokens: {global_tokens}`"
