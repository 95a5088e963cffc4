"""One row per attention site and phase: the decision as plain text and numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gna_compile.decision import Decision
from gna_compile.graph.symbols import hint
from gna_compile.graph.tokens.layouts import Layout


@dataclass(frozen=True)
class Row:
    """A decision without references into a graph.

    Attributes:
        phase: the phase that it holds for.
        layer: fully qualified name of the layer, "" if unknown.
        module: class name of the innermost module.
        form: "sdpa", "unfused" or "opaque".
        heads, tokens, head_dim: sizes in the example inputs.
        layout: e.g. "14 + 8x10" (global tokens, then the grid), "" if unknown.
        layout_source: how the layout is known, as `Layout.source` has it.
        decision: "gna" or "dense".
        window, stride, dilation: e.g. "4x4x4", "" if dense.
        flop_share: share of dense attention's FLOPs that is kept, None if dense.
        predicted_speedup: over dense attention; None if dense, or if nothing was measured.
        provider: what will run it.
        reason: reason code of a dense site, "" if rewritten.
        detail: the reason in words; a hint, or "", if rewritten.
    """

    phase: str
    layer: str
    module: str
    form: str
    heads: int
    tokens: int
    head_dim: int
    layout: str
    layout_source: str
    decision: str
    window: str
    stride: str
    dilation: str
    causal: str
    flop_share: float | None
    predicted_speedup: float | None
    provider: str
    reason: str
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def row_of(phase: str, decision: Decision) -> Row:
    """The row of one decision in one phase."""
    site, parameters = decision.site, decision.parameters
    return Row(
        phase=phase,
        layer=decision.layer,
        module=site.modules[-1].cls if site.modules else "",
        form=site.form,
        heads=hint(site.heads),
        tokens=hint(site.tokens),
        head_dim=hint(site.head_dim),
        layout=layout_text(decision.layout),
        layout_source=decision.layout.source if decision.layout else "",
        decision="gna" if decision.is_rewritten else "dense",
        window=_times(parameters.window) if parameters else "",
        stride=_times(parameters.stride) if parameters else "",
        dilation=_times(parameters.dilation) if parameters else "",
        causal=" ".join("causal" if c else "-" for c in parameters.causal) if parameters else "",
        flop_share=decision.flop_share if decision.is_rewritten else None,
        predicted_speedup=decision.predicted_speedup if decision.is_rewritten else None,
        provider=decision.provider,
        reason=decision.reason.value if decision.reason else "",
        detail=decision.detail,
    )


def layout_text(layout: Layout | None) -> str:
    """A layout as `prefix + TxHxW + suffix`, symbols as their example sizes."""
    if layout is None:
        return ""
    prefix, suffix = hint(layout.prefix), hint(layout.suffix)
    parts = [str(prefix)] if prefix else []
    parts.append(_times(layout.grid))
    if suffix:
        parts.append(str(suffix))
    return " + ".join(parts)


def _times(sizes: Any) -> str:
    return "x".join(str(hint(size)) for size in sizes)
