"""The `torch.compile` backend: find sites, resolve layouts, decide, rewrite, lower.

    model = torch.compile(model, backend="gna", options={"policy": "flux-4k"})

This is the only place where the steps are strung together, and the target of the
`torch_dynamo_backends` entry point: importing it registers nothing and pulls in nothing heavy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gna_compile.lower import Lowered, lower
from gna_compile.options import Options
from gna_compile.phases import DEFAULT, current_phase

log = logging.getLogger("gna_compile")


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
    ) -> Lowered:
        """Compiles one graph.

        Args:
            gm: Dynamo's graph, before autograd and decompositions.
            example_inputs: its inputs, as Dynamo gives them: real tensors, ints, symbols.
            mode: as `torch.compile(mode=...)` takes it.
            options: see `gna_compile.options.Options`.

        Raises:
            PolicyError: if the policy cannot be found or is malformed.
            OptionsError: if an option is unknown or of the wrong type.
        """
        return compile_graph(gm, example_inputs, Options.parse(options, mode))

    def reset(self) -> None:
        """Forgets loaded policies; called by `torch._dynamo.reset()`."""
        from gna_compile.policy import clear_cache

        clear_cache()


gna = GnaBackend()


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Lowered:
    """Rewrites what is decided, lowers the graph, and returns what Dynamo shall call."""
    from gna_compile.report.collect import publish

    def lowered(module: fx.GraphModule, inputs: Sequence[Any] = example_inputs) -> Lowered:
        return lower(
            module, inputs, inner=options.inner, mode=options.mode, inductor=options.inductor
        )

    analysis = analyse(gm, options)
    plan = analysis(example_inputs)
    publish(gm, plan)
    return lowered(gm)
