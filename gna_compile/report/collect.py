"""What the backend did, for the log, for `GNA_DUMP` and for listeners: `collecting()` gathers it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from gna_compile.report import dump
from gna_compile.report.rows import Row, row_of

if TYPE_CHECKING:
    from gna_compile.decision import Decision

log = logging.getLogger("gna_compile")

_listener: ContextVar[list[GraphRecord] | None] = ContextVar("gna_listener", default=None)


@dataclass
class GraphRecord:
    """One compiled graph.

    Attributes:
        rows: one for each phase and site.
        before: the graph as text, as Dynamo gave it; "" unless a listener or `GNA_DUMP` wants it.
        after: the same for each variant that was lowered.
        variant_of_phase: which of them each phase runs.
    """

    rows: list[Row]
    before: str = ""
    after: list[str] = field(default_factory=list)
    variant_of_phase: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        gm: fx.GraphModule,
        decisions: dict[str, list[Decision]],
        variant_of_phase: dict[str, int],
    ) -> GraphRecord:
        rows = [row_of(phase, d) for phase, row in decisions.items() for d in row]
        return cls(rows, _text(gm), variant_of_phase=variant_of_phase)

    def add_variant(self, gm: fx.GraphModule) -> None:
        self.after.append(_text(gm))

    def publish(self) -> None:
        """Logs one line at info and each site at debug; goes to `GNA_DUMP` and to the listener."""
        if self.rows:
            log.info("%s", summary(self.rows))
            for row in self.rows:
                log.debug("%s", row)
        dump.dump(self)
        records = _listener.get()
        if records is not None:
            records.append(self)


@contextmanager
def collecting() -> Iterator[list[GraphRecord]]:
    """Gathers the records of all graphs that this thread compiles in the block."""
    records: list[GraphRecord] = []
    token = _listener.set(records)
    try:
        yield records
    finally:
        _listener.reset(token)


def summary(rows: list[Row]) -> str:
    """E.g. `4 attention sites: 2 rewritten, 2 dense (cross-attention 2)`, per phase if they differ."""
    phases = dict.fromkeys(row.phase for row in rows)
    texts = {phase: _summary([row for row in rows if row.phase == phase]) for phase in phases}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{phase}: {text}" for phase, text in texts.items())


def _summary(rows: list[Row]) -> str:
    reasons = Counter(row.reason for row in rows if row.reason)
    dense = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    text = f"{len(rows)} attention sites: {len(rows) - reasons.total()} rewritten"
    return text + (f", {reasons.total()} dense ({dense})" if reasons else "")


def _text(gm: fx.GraphModule) -> str:
    if _listener.get() is None and dump.folder() is None:
        return ""
    from gna_compile.report.graph_text import graph_text

    return graph_text(gm)
