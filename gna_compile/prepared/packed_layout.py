"""The grid of packed latents: what the inputs of a prepared model show, and a guard holds a graph to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gna_compile import _torch
from gna_compile.graph.dynamo_frame import local_modules
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size, hint
from gna_compile.graph.tokens.layouts import Layout, TokenFlow
from gna_compile.graph.tokens.position_ids import words_of_pieces
from gna_compile.policy import DeclaredLayout
from gna_compile.prepared.annotations import PACKED, WATCH, Annotation
from gna_compile.prepared.packed_grid import Mark
from gna_compile.reasons import Decline, Reason


def packed_grid_of(
    site: Site,
    flow: TokenFlow,
    annotation: Annotation,
    declared: DeclaredLayout | None,
    root: torch.nn.Module | None,
    packed_grids: Sequence[Mark],
) -> tuple[Size | tuple[Size, ...], ...] | Decline | None:
    """The segments that the inputs of a prepared model show, if a guard holds the graph to it.

    That of its position ids, or if a grid is declared, what has become of it. None if they show
    none, or if the graph itself must tell.
    """
    place = (
        annotation.packed.place_of(declared.segments if declared else None)
        if annotation.packed
        else None
    )
    if annotation.packed is None or (place is None and declared is None):
        return None
    if place is None:
        return Decline(Reason.LAYOUT_UNKNOWN, "a model that shares this layer was prepared later")
    packed, why = annotation.packed.segments[place], annotation.packed.why[place]
    shown, is_read = flow.layout(site), _reads_ids(root, annotation)
    if declared is not None and not is_read:
        if isinstance(shown, Layout):
            return None
        return Decline(
            Reason.LAYOUT_UNKNOWN,
            "a grid is declared, but the inputs that show whether it holds are not seen here: "
            "compile the prepared model itself, not what calls it",
        )
    if packed is None:
        return None if declared is None else Decline(Reason.LAYOUT_MISMATCH, why)
    by_ids = _segments_of_ids(shown)
    if declared is None and by_ids is not None and by_ids != packed:
        # A larger graph, in which nothing read these ids before it was compiled. What they show is
        # to be asked again as soon as the model has seen others.
        for mark in packed_grids:
            for size in mark.sizes:
                int(size)
        return None
    if by_ids is None and not is_read:
        return Decline(
            Reason.LAYOUT_UNKNOWN,
            "position ids that are not seen among this graph's inputs decide on the grid: compile "
            "the prepared model itself, not what calls it",
        )
    held: list[Size | tuple[Size, ...]] = []
    for number, segment in enumerate(packed):
        wanted = segment if isinstance(segment, tuple) else (segment,)
        marks = [m.sizes for m in packed_grids if (m.place, m.number) == (place, number)]
        found = [sizes for sizes in marks if tuple(map(hint, sizes)) == wanted]
        if len(found) != 1:
            return Decline(
                Reason.LAYOUT_UNKNOWN,
                f"inputs show {words_of_pieces(packed)}, but no guard holds this graph to it",
            )
        held.append(found[0] if isinstance(segment, tuple) else found[0][0])
    return tuple(held)


def _segments_of_ids(shown: Layout | Decline) -> tuple[Size | tuple[Size, ...], ...] | None:
    """From the first grid to the last, if position ids show them."""
    if not isinstance(shown, Layout) or not shown.is_by_ids:
        return None
    places = [i for i, segment in enumerate(shown.segments) if isinstance(segment, tuple)]
    return shown.segments[places[0] : places[-1] + 1]


def _reads_ids(root: torch.nn.Module | None, annotation: Annotation) -> bool:
    """Whether the hook that looks at inputs ran before this graph, and not inlined in it."""
    if _torch.nested_graph_breaks():
        return False
    inside = [m for m in local_modules() if m.__dict__.get(PACKED) is annotation.packed]
    # A watched module that is not the one whose method this is may have its hook inlined here.
    return any(module is root or WATCH not in module.__dict__ for module in inside)
