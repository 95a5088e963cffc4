"""One row per attention site and phase: the decision as plain text and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gna_compile.decision import Decision
from gna_compile.geometry import Link
from gna_compile.graph.pattern import Windows
from gna_compile.graph.symbols import hint
from gna_compile.graph.tokens.layouts import Layout
from gna_compile.policy import Parameters


@dataclass(frozen=True)
class Row:
    """A decision without references into a graph.

    Attributes:
        phase: the phase that it holds for.
        layer: fully qualified name of the layer, "" if unknown.
        module: class name of the innermost module.
        form: "sdpa", "unfused" or "opaque".
        heads, tokens, head_dim: sizes in the example inputs.
        layout: e.g. "14 + 8x10" (global tokens, then a grid), "" if unknown.
        layout_source: how the layout is known, as `Layout.source` has it.
        decision: "gna" or "dense".
        window, stride, dilation, causal: e.g. "4x4x4", "" if dense; "4x4 + full" on two grids,
            "0-7: 4x4; 8-11: full" for groups of heads.
        between_grids: what grids see of each other, "" if dense: "full", "none" or "aligned".
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
    between_grids: str
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
    site, windows = decision.site, decision.windows
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
        window=_on_heads(windows, lambda p: _times(p.window)),
        stride=_on_heads(windows, lambda p: _times(p.stride)),
        dilation=_on_heads(windows, lambda p: _times(p.dilation)),
        causal=_on_heads(windows, lambda p: " ".join("causal" if c else "-" for c in p.causal)),
        between_grids=_BETWEEN[windows.between_grids] if windows else "",
        flop_share=decision.flop_share if decision.is_rewritten else None,
        predicted_speedup=decision.predicted_speedup if decision.is_rewritten else None,
        provider=decision.provider,
        reason=decision.reason.value if decision.reason else "",
        detail=decision.detail,
    )


_BETWEEN = {Link.FULL: "full", Link.NONE: "none", Link.WINDOW: "aligned"}


def _on_heads(windows: Windows | None, text: Callable[[Parameters], str]) -> str:
    """What each grid has, `4x4 + full`; of several head groups `0-7: 4x4 + full; 8-11: full`."""
    if windows is None:
        return ""
    texts, first = [], 0
    for group in windows.groups:
        grids = ["full" if window is None else text(window) for window in group.windows]
        own = "full" if set(grids) == {"full"} else " + ".join(grids)
        last = first + hint(group.heads) - 1
        texts.append((f"{first}-{last}" if last > first else str(first), own))
        first = last + 1
    if len(texts) == 1:
        return texts[0][1]
    return "; ".join(f"{heads}: {own}" for heads, own in texts)


def layout_text(layout: Layout | None) -> str:
    """A layout as `512 + TxHxW + 7`, symbols as their example sizes."""
    if layout is None:
        return ""
    return " + ".join(
        _times(segment) if isinstance(segment, tuple) else str(hint(segment))
        for segment in layout.segments
        if isinstance(segment, tuple) or hint(segment)
    )


def _times(sizes: Any) -> str:
    return "x".join(str(hint(size)) for size in sizes)
