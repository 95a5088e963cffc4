"""What became of an attention site."""

from __future__ import annotations

from dataclasses import dataclass

from gna_compile.graph.pattern import Windows
from gna_compile.graph.sites.find import Site
from gna_compile.graph.tokens.layouts import Layout
from gna_compile.reasons import Reason


@dataclass(frozen=True)
class Decision:
    """What becomes of one site.

    Attributes:
        site: the attention site.
        layer: its layer's fully qualified name, as the policy was asked for it.
        layout: how its tokens lie, if that is known.
        rule: index of the rule that matched, if one did.
        windows: of its heads on the grids of the layout, if the site is rewritten.
        flop_share: share of dense attention's FLOPs that the mask keeps, if a window applies.
        predicted_speedup: over dense attention, at the example sizes, if the provider is known.
        provider: name of the provider that will run it, if the site is rewritten.
        reason: why the site stays dense; None if it is rewritten.
        detail: the reason in words, with the values that decided; a hint if it is rewritten.
    """

    site: Site
    layer: str
    layout: Layout | None = None
    rule: int | None = None
    windows: Windows | None = None
    flop_share: float | None = None
    predicted_speedup: float | None = None
    provider: str = ""
    reason: Reason | None = None
    detail: str = ""

    @property
    def is_rewritten(self) -> bool:
        return self.reason is None

    def same_rewrite(self, other: Decision) -> bool:
        """Whether both decisions on one site lead to the same graph."""
        if not (self.is_rewritten and other.is_rewritten):
            return self.is_rewritten == other.is_rewritten
        return (self.windows, self.layout) == (other.windows, other.layout)
