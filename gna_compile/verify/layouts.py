"""`verify="layouts"`: whether tokens lie as a rewritten attention claims, shown on the real inputs.

Before a graph runs for the first time, parts of its inputs are changed, and it is seen which rows of
the queries, keys and values react (`probe.py`). This knows nothing of how the layouts were
found. First each dimension of each floating input is cut: a dimension along which a thin slab moves
a part of the rows only is one that tokens lie along; one of which it moves all rows, of some batch
rows only, is a batch. Then the axes of the claimed grid are laid along these dimensions in every way
that fits, and single cells are changed, all corners and some others. A claim holds if there is a way
in which every cell moves its row, of queries, keys and values alike, and no row far from it.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.symbols import same_shape
from gna_compile.graph.tokens.layouts import Layout
from gna_compile.lower import Lowered
from gna_compile.verify.probe import Probe
from gna_compile.verify.trial import LayoutError, Trial

if TYPE_CHECKING:
    from gna_compile.decision import Decision

__all__ = ["LayoutError", "Verification", "VerifiedAtFirstCall"]

log = logging.getLogger("gna_compile")

_OWNED = re.compile(r"^L\['self'\]\.|_(buffers|modules|parameters)\b")


class VerifiedAtFirstCall:
    """Verifies the layouts of a graph before it runs for the first time, and then only runs it.

    Args:
        run: the lowered graph.
        verification: what to do before.
    """

    def __init__(self, run: Lowered, verification: Verification) -> None:
        self._run = run
        self._pending: Verification | None = verification
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        if self._pending is not None:
            self._verify(inputs)
        return self._run(*inputs)

    @torch.compiler.disable
    def _verify(self, inputs: Sequence[Any]) -> None:
        with self._lock:
            if self._pending is not None:
                self._pending(inputs)
                self._pending = None


@dataclass(frozen=True)
class Verification:
    """The check of one graph; called with its real inputs.

    Attributes:
        probe: the graph, with its rewritten attentions watched.
        layers: the layer of each of these, and where its layouts are from.
        names: what the model calls each input; "" for a tensor of a module.
    """

    probe: Probe
    layers: tuple[tuple[str, str], ...]
    names: tuple[str, ...]

    @staticmethod
    def of(gm: fx.GraphModule, variants: Sequence[Sequence[Decision]]) -> Verification:
        """The check of what any variant of a graph rewrites."""
        rewritten: dict[Any, list[Layout]] = {}
        named: dict[Any, tuple[str, str]] = {}
        for decision in itertools.chain.from_iterable(variants):
            layout = decision.layout
            if not decision.is_rewritten or layout is None:
                continue
            known = rewritten.setdefault(decision.site, [])
            named.setdefault(decision.site, (decision.layer, layout.source))
            if not any(_is_same(layout, other) for other in known):
                known.append(layout)
        names = tuple(map(_name_of_input, gm.graph.find_nodes(op="placeholder")))
        probe = Probe(gm, list(rewritten.items()), [d.site for d in variants[0]])
        return Verification(probe, tuple(named.values()), names)

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raises LayoutError for a layout that does not hold; warns of what cannot be told."""
        try:
            Trial(self.probe, self.layers, self.names, inputs).run()
        except LayoutError:
            raise
        except Exception as error:
            names = ", ".join(dict.fromkeys(layer for layer, _ in self.layers))
            log.warning(
                "the layouts of %s could not be verified: the graph does not run as it is (%s: %s)",
                names,
                type(error).__name__,
                str(error).split("\n")[0],
            )


def _is_same(one: Layout, other: Layout) -> bool:
    if len(one.segments) != len(other.segments):
        return False
    pairs = [
        (a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,))
        for a, b in zip(one.segments, other.segments, strict=True)
    ]
    kinds = [isinstance(segment, tuple) for segment in one.segments]
    same_kinds = kinds == [isinstance(segment, tuple) for segment in other.segments]
    return same_kinds and all(same_shape(a, b) for a, b in pairs)


def _name_of_input(node: fx.Node) -> str:
    source = _torch.source_name(node)
    if _OWNED.search(source):
        return ""
    parts = re.findall(r"\w+", source)
    return parts[-1] if parts and not parts[-1].isdigit() else node.name
