"""Declared layouts, held against what the graph shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size, hint, holds, is_known
from gna_compile.graph.tokens.layouts import Layout, Segment, TokenFlow, sum_of, words_of
from gna_compile.graph.tokens.position_ids import ReadIds, images_in, name_of
from gna_compile.graph.tokens.reading import times
from gna_compile.reasons import Decline, Reason


class Declared(Protocol):
    """A layout from a policy or from `prepare`; prefix and suffix are None where it does not say."""

    @property
    def segments(self) -> tuple[Size | tuple[Size, ...], ...]: ...
    @property
    def tokens(self) -> Size: ...
    @property
    def prefix(self) -> int | None: ...
    @property
    def suffix(self) -> int | None: ...


def resolve(
    site: Site,
    flow: TokenFlow,
    declared: Declared | None,
    global_tokens: str | None = None,
) -> Layout | Decline:
    """The layout of a site, in this order of trust: declared, then proven by the graph.

    A declared layout must have as many tokens as the site and must not contradict the graph.
    Where it does not say how many global tokens lie before and after the grid, the graph does, or
    else `global_tokens` says on which side the rest lies. Symbolic sizes that have to equal a
    declared number are held to it by a guard; a declared symbolic grid needs only be that of
    position ids in this call, since each call checks it.

    Args:
        global_tokens: "prefix" or "suffix": there the tokens off the grid lie; "none": there are
            none; None: not said.
    """
    shown = flow.layout(site)
    if declared is None:
        if isinstance(shown, Decline):
            return shown
        return _checked(site, shown, global_tokens)
    placed = _placed(site, flow, declared, global_tokens)
    if isinstance(placed, Decline):
        return placed
    ours = Layout.around(declared.segments, *placed, source="declared", indices=flow.indices)
    if isinstance(shown, Decline):
        known = flow.known(site)
        refusal = flow.hold(known)
        for start, grid in ours.placed:
            if refusal is None and isinstance(grid, tuple):
                refusal = _contradiction(known.segments, grid, start)
        return refusal or ours
    if not _is_same(shown, ours):
        return Decline(
            Reason.LAYOUT_MISMATCH,
            f"declared is {ours.words}, the graph shows {shown.words} ({shown.source})",
        )
    ids = _with_sizes(shown.ids, ours)
    return ids if isinstance(ids, Decline) else replace(ours, ids=ids, indices=shown.indices)


def _is_same(shown: Layout, ours: Layout) -> bool:
    """Whether two layouts are one. What ids show is checked at every call, so it holds no symbols."""
    if len(shown.segments) != len(ours.segments):
        return False
    for segment, other in zip(shown.segments, ours.segments, strict=True):
        if isinstance(segment, tuple) and isinstance(other, tuple):
            wanted = tuple(map(hint, other)) if shown.is_by_ids else other
            if not same_grid(segment, wanted):
                return False
        elif isinstance(segment, tuple) or isinstance(other, tuple) or not holds(segment == other):
            return False
    return True


def _with_sizes(ids: Sequence[ReadIds], layout: Layout) -> tuple[ReadIds, ...] | Decline:
    """What ids have to show at each call, with the layout's own sizes, which may be symbolic."""
    sizes = [size for grid in layout.grids for size in grid]
    if all(isinstance(size, int) for size in sizes):
        return tuple(ids)
    found = []
    for read in ids:
        images = images_in(read.pieces)
        if images and len(images) != len(layout.grids):
            return Decline(
                Reason.LAYOUT_UNKNOWN, "position ids show some of the declared grids, and not all"
            )
        grids = iter(layout.grids)
        pieces = (next(grids) if isinstance(piece, tuple) else piece for piece in read.pieces)
        found.append(replace(read, pieces=tuple(pieces)))
    return tuple(found)


def _contradiction(
    segments: Sequence[Segment], grid: tuple[Size, ...], prefix: Size
) -> Decline | None:
    """What the graph knows against a declared grid of tokens whose grid it does not show."""
    start: Size = 0
    tokens = math.prod(grid)
    for segment in segments:
        stop = start + segment.size
        run = segment.run
        if not holds(stop <= prefix) and not holds(start >= prefix + tokens):
            if not run.has_tokens:
                return _against(grid, "special tokens lie among those of the grid")
            if run.doubt:
                return Decline(Reason.LAYOUT_UNKNOWN, run.doubt)
            if run.disorder:
                return _against(grid, run.disorder)
            if not (holds(start <= prefix) and holds(prefix + tokens <= stop)):
                runs = " + ".join(words_of(s) for s in segments)
                return _against(grid, f"the tokens are of several origins: {runs}")
            if run.ids is not None and holds(segment.size == tokens):
                return _against(grid, f"{name_of(run.ids)} shows none")
            known = segment.grid or segment.axes
            if len(known) > 1 and not _refines(grid, known):
                return _against(grid, f"the graph shows {times(known)}")
        start = stop
    return None


def _against(grid: tuple[Size, ...], why: str) -> Decline:
    return Decline(Reason.LAYOUT_MISMATCH, f"declared is the grid {times(grid)}, but {why}")


def _refines(grid: Sequence[Size], lattice: Sequence[Size]) -> bool:
    """Whether each axis of a lattice is one axis of the grid, or several of them merged."""
    pending = list(grid)
    for length in lattice:
        product: Size = 1
        while pending and not holds(product == length):
            product = product * pending.pop(0)
        if not holds(product == length):
            return False
    return all(holds(size == 1) for size in pending)


def _checked(site: Site, shown: Layout, global_tokens: str | None) -> Layout | Decline:
    """A layout from the graph, unless it contradicts `global_tokens` or does not fit the tokens."""
    around = {"prefix": shown.prefix, "suffix": shown.suffix, "none": 0}.get(global_tokens or "")
    wrong = None if around is None else shown.global_tokens - around
    if wrong is not None and not holds(wrong == 0):
        return Decline(
            Reason.LAYOUT_MISMATCH,
            f"declared is `global_tokens: {global_tokens}`, the graph shows {shown.words} "
            f"({shown.source})",
        )
    if not holds(shown.tokens == site.tokens):
        return _miscounted(site, shown)
    return shown


def _placed(
    site: Site, flow: TokenFlow, declared: Declared, global_tokens: str | None
) -> tuple[Size, Size] | Decline:
    """Tokens before and after the declared grid."""
    prefix: Size = declared.prefix or 0
    suffix: Size = declared.suffix or 0
    tokens = declared.tokens
    if declared.prefix is None and declared.suffix is None:
        around = _around(flow.known(site).segments, tokens)
        if around is not None:
            prefix, suffix = around
        elif global_tokens == "prefix":
            prefix = site.tokens - tokens
        elif global_tokens == "suffix":
            suffix = site.tokens - tokens
    wrong = {"prefix": suffix, "suffix": prefix, "none": prefix + suffix}.get(
        global_tokens or "", 0
    )
    fits = holds(prefix + tokens + suffix == site.tokens)
    if not fits or not holds(prefix >= 0) or not holds(suffix >= 0):
        given = declared.prefix or 0, declared.suffix or 0
        return _miscounted(site, Layout.around(declared.segments, *given))
    if not holds(wrong == 0):
        return Decline(
            Reason.LAYOUT_MISMATCH,
            f"declared is `global_tokens: {global_tokens}`, but "
            f"{Layout.around(declared.segments).words} has {prefix} tokens before and {suffix} "
            "after it",
        )
    return prefix, suffix


def _around(segments: Sequence[Segment], tokens: Size) -> tuple[Size, Size] | None:
    """Tokens before and after the one run, or the runs, that have as many tokens as declared."""
    sizes = [segment.size for segment in segments]
    spans = [
        (first, stop)
        for first in range(len(sizes))
        for stop in range(first + 1, len(sizes) + 1)
        if holds(sum_of(sizes[first:stop]) == tokens)
    ]
    if len(spans) != 1:
        return None
    ((first, stop),) = spans
    return sum_of(sizes[:first]), sum_of(sizes[stop:])


def _miscounted(site: Site, layout: Layout) -> Decline:
    return Decline(
        Reason.LAYOUT_MISMATCH,
        f"{layout.words} is {layout.tokens} tokens, the site has {site.tokens}",
    )


def same_grid(shown: Sequence[Size], declared: Sequence[Size]) -> bool:
    """Whether two grids are one but for leading axes of length 1; guards symbols to be equal."""
    ours, theirs = _without_units(shown), _without_units(declared)
    return len(ours) == len(theirs) and all(
        holds(one == other) for one, other in zip(ours, theirs, strict=True)
    )


def _without_units(grid: Sequence[Size]) -> Sequence[Size]:
    first = next((i for i, size in enumerate(grid) if not is_known(size == 1)), len(grid))
    return grid[first:]
