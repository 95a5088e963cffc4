"""The `torch.compile` backend: find sites, resolve layouts, decide, rewrite, lower.

    model = torch.compile(model, backend="gna", options={"policy": "flux-4k"})

This is the only place where the steps are strung together, and the target of the
`torch_dynamo_backends` entry point: importing it registers nothing and pulls in nothing heavy.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from gna_compile import _torch
from gna_compile.lower import Lowered, LoweredWhenCalled, is_static, lower
from gna_compile.options import Options
from gna_compile.phases import current_phase, declare, known_phase
from gna_compile.policy import DEFAULT_PHASE
from gna_compile.reasons import Decline, Reason

if TYPE_CHECKING:
    from gna_compile.decision import Decision
    from gna_compile.graph.sites.find import Site
    from gna_compile.policy import Policy
    from gna_compile.prepared.annotations import Annotation

log = logging.getLogger("gna_compile")

_torch.probe()


class GnaBackend:
    """The callable that Dynamo hands its graphs to; one stateless instance serves all models."""

    __name__ = "gna"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        **_: Any,
    ) -> Lowered:
        """Compiles one graph.

        Args:
            gm: Dynamo's graph, before autograd and decompositions.
            example_inputs: its inputs, as Dynamo gives them: real tensors, ints, symbols.
            mode: as `torch.compile(mode=...)` takes it.
            options: see `gna_compile.options.Options`.
            _: what later versions of torch hand to every backend, such as `name` since 2.15.

        Raises:
            PolicyError: if the policy cannot be found or is malformed.
            OptionsError: if an option is unknown or of the wrong type.
        """
        return compile_graph(gm, example_inputs, Options.parse(options, mode))

    def reset(self) -> None:
        """Forgets loaded policies and what was said; called by `torch._dynamo.reset()`."""
        # Dynamo iterates over its backends here, and what an import compiles would be one more.
        if "gna_compile.decide" in sys.modules:
            from gna_compile.policy import clear_cache
            from gna_compile.report.nothing_rewritten import forget

            clear_cache()
            forget()


gna = GnaBackend()


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, *, quiet: bool = False
) -> Lowered:
    """Rewrites what is decided, lowers the graph, and returns what Dynamo shall call.

    Args:
        quiet: no warnings about what stays dense.
    """
    try:
        plan = decide_graph(gm, example_inputs, options)
    except _torch.Missing as missing:
        log.warning('%s, so backend="gna" leaves this graph dense', missing)
        plan = GraphPlan({DEFAULT_PHASE: []}, [[]], {DEFAULT_PHASE: 0}, None)
    graphs = write_variants(gm, plan, options) if plan.is_rewritten else []
    _report(gm, plan, graphs, quiet)
    # A caller that keeps this for later keeps no inputs alive.
    lowered = partial(lower, inner=options.inner, mode=options.mode, inductor=options.inductor)
    if not graphs:
        return lowered(gm, example_inputs)
    _warn_if_recompilations_run_out()
    runs = lower_variants(graphs, plan, lowered, example_inputs)
    return _checked(runs, gm, plan, options, lowered, example_inputs)


def write_variants(gm: fx.GraphModule, plan: GraphPlan, options: Options) -> list[fx.GraphModule]:
    """For each variant of the plan a copy of the graph with its sites rewritten."""
    import gna_compile.ops  # noqa: F401 - registers the op
    from gna_compile.graph.rewrite import copy_with_sites, rewrite

    graphs: list[fx.GraphModule] = []
    for variant in plan.variants:
        rewritten = [decision for decision in variant if decision.is_rewritten]
        graph, sites = copy_with_sites(gm, [decision.site for decision in rewritten])
        rewrite(
            [
                (site, decision.layout, decision.windows)
                for site, decision in zip(sites, rewritten, strict=True)
                if decision.layout is not None and decision.windows is not None
            ],
            verify_masks=options.verify_masks,
        )
        graphs.append(graph)
    return graphs


def _report(
    gm: fx.GraphModule, plan: GraphPlan, graphs: Sequence[fx.GraphModule], quiet: bool
) -> None:
    from gna_compile.report.collect import GraphRecord
    from gna_compile.report.nothing_rewritten import say

    record = GraphRecord.start(gm, plan.decisions, plan.variant_of_phase)
    if not quiet:
        say(plan.decisions.values(), plan.policies, plan.root, plan.annotations)
    for graph in graphs:
        record.add_variant(graph)
    record.publish()


def lower_variants(
    graphs: Sequence[fx.GraphModule],
    plan: GraphPlan,
    lowered: Callable[[fx.GraphModule, Sequence[Any]], Lowered],
    example_inputs: Sequence[Any],
) -> list[Lowered]:
    """What runs each variant.

    A symbolic graph can only be lowered now, while Dynamo traces it; a static one that another
    phase runs waits until it does.
    """
    phases = plan.variant_of_phase
    declare(phases)
    now = phases.get(current_phase(), phases[DEFAULT_PHASE])
    return [
        LoweredWhenCalled(graph, lowered)
        if index != now and is_static(graph)
        else lowered(graph, example_inputs)
        for index, graph in enumerate(graphs)
    ]


def _checked(
    runs: list[Lowered],
    gm: fx.GraphModule,
    plan: GraphPlan,
    options: Options,
    lowered: Callable[[fx.GraphModule, Sequence[Any]], Lowered],
    example_inputs: Sequence[Any],
) -> Lowered:
    """The phase's run, behind the checks of what only a call can show."""
    from gna_compile.graph.rewrite import copy_with_sites
    from gna_compile.prepared.runtime_check import CheckedAgainstIds, ids_checks, index_checks

    layouts = [d.layout for variant in plan.variants for d in variant if d.is_rewritten]
    known = [layout for layout in layouts if layout is not None]
    checks, indices = ids_checks(gm, known), index_checks(gm, known, example_inputs)
    if checks or indices:
        dense = [not any(d.is_rewritten for d in variant) for variant in plan.variants]
        if True in dense:
            when_ids_differ = runs[dense.index(True)]
        else:
            graph, _ = copy_with_sites(gm, [])
            when_ids_differ = (
                LoweredWhenCalled(graph, lowered)
                if is_static(gm)
                else lowered(graph, example_inputs)
            )
        runs = [
            run if is_dense else CheckedAgainstIds(run, when_ids_differ, checks, indices, plan.root)
            for run, is_dense in zip(runs, dense, strict=True)
        ]
    phases = plan.variant_of_phase
    run = runs[0] if len(phases) == 1 else by_phase(runs, phases)
    if options.verify == "layouts":
        from gna_compile.verify.layouts import Verification, VerifiedAtFirstCall

        return VerifiedAtFirstCall(run, Verification.of(gm, plan.variants))
    return run


@dataclass(frozen=True)
class GraphPlan:
    """What shall become of one graph.

    Attributes:
        decisions: for each phase, the decision on each site, in graph order.
        variants: the distinct lists of decisions.
        variant_of_phase: which variant each phase runs.
        root: the module whose method is being compiled.
        policies: the policies that decided.
        annotations: the annotations on the modules that the compiled code can reach.
    """

    decisions: dict[str, list[Decision]]
    variants: list[list[Decision]]
    variant_of_phase: dict[str, int]
    root: nn.Module | None
    policies: frozenset[Policy] = frozenset()
    annotations: tuple[Annotation, ...] = ()

    @property
    def is_rewritten(self) -> bool:
        return any(decision.is_rewritten for variant in self.variants for decision in variant)


def decide_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> GraphPlan:
    """Decides on every site of a graph in every phase, and which phases share a graph."""
    from gna_compile.decide import decide
    from gna_compile.graph.dynamo_frame import (
        frame_modules,
        guard_root_attribute,
        is_resumed,
        root_module,
    )
    from gna_compile.graph.masks import with_plain_masks
    from gna_compile.graph.sites.find import find_sites
    from gna_compile.graph.tokens.layouts import TokenFlow
    from gna_compile.policy import load_policy
    from gna_compile.prepared.annotations import (
        KEY,
        PACKED,
        annotation_of,
        annotations_below,
        model_around,
    )
    from gna_compile.prepared.packed_grid import marks_of, take_marks

    _torch.require("rewriting")
    packed_grids = take_marks(gm)
    policy = load_policy(options.policy) if options.policy is not None else None
    found = with_plain_masks(find_sites(gm))
    sites = [_as_torch_allows(site, gm, options) for site in found]
    if not sites:
        return GraphPlan({DEFAULT_PHASE: []}, [[]], {DEFAULT_PHASE: 0}, None)
    root = root_module()
    annotations = annotations_below(frame_modules())
    own = annotation_of(root)
    if own is not None:
        guard_root_attribute(KEY)
    if own is not None and own.packed is not None and not packed_grids:
        guard_root_attribute(PACKED, "segments")
        packed_grids = marks_of(own.packed)
    policies = {annotation.policy for annotation in annotations.values()} | (
        {policy} if policy else set()
    )
    if not policies:
        log.warning(
            'backend="gna" has no policy for a graph with %d attention sites, so it stays dense. '
            'Give options={"policy": ...} or call gna_compile.prepare(model, policy).',
            len(sites),
        )
    phases = list(dict.fromkeys([DEFAULT_PHASE, *(name for p in policies for name in p.phases)]))
    is_whole = not is_resumed() and model_around(root) is root
    flow = TokenFlow(gm, example_inputs, is_whole)
    decisions: dict[str, list[Decision]] = {}
    for phase in phases:
        decisions[phase] = [
            decide(site, flow, policy, phase, root, annotations, packed_grids) for site in sites
        ]
    variants: list[list[Decision]] = []
    variant_of_phase: dict[str, int] = {}
    for phase, row in decisions.items():
        equal = (i for i, variant in enumerate(variants) if _same_rewrites(row, variant))
        variant_of_phase[phase] = next(equal, len(variants))
        if variant_of_phase[phase] == len(variants):
            variants.append(row)
    reached = tuple(annotations.values())
    given = {annotation.policy for annotation in reached} or policies
    return GraphPlan(decisions, variants, variant_of_phase, root, frozenset(given), reached)


def _as_torch_allows(site: Site, gm: fx.GraphModule, options: Options) -> Site:
    """The site; with an obstacle where this torch lacks what rewriting it takes."""
    from gna_compile.graph.functorch import is_sample

    why = _torch.why_not("op")
    if why is None and not is_static(gm):
        why = _torch.why_not("symbolic sizes")
    if why is None and options.verify_masks and site.mask is not None:
        why = _torch.why_not("verify_masks")
    if site.obstacle is not None:
        return site
    if why is None and options.verify_masks and site.mask is not None:
        mask = site.mask.meta["example_value"]
        if is_sample(mask):
            why_not = "the assertion of the option verify_masks does not run inside vmap"
            return replace(site, obstacle=Decline(Reason.MASK, why_not))
    if why is None:
        return site
    return replace(site, obstacle=Decline(Reason.TORCH, why))


def _same_rewrites(row: Sequence[Decision], other: Sequence[Decision]) -> bool:
    return all(a.same_rewrite(b) for a, b in zip(row, other, strict=True))


def by_phase(runs: Sequence[Lowered], variant_of_phase: dict[str, int]) -> Lowered:
    """Calls the variant of the calling thread's phase."""

    def run(*inputs: Any) -> Any:
        return runs[variant_of_phase[known_phase(variant_of_phase)]](*inputs)

    return run


def _warn_if_recompilations_run_out() -> None:
    from gna_compile.graph.dynamo_frame import compilations_left

    if compilations_left() == 0:
        log.warning(
            "this is the last graph that Dynamo compiles for this code "
            "(torch._dynamo.config.recompile_limit = %d); further layers or shapes will run "
            "eagerly and dense. Raise the limit, or give layers fewer different rules.",
            _torch.recompile_limit(),
        )
