"""How a site's tokens lie: what was declared, if it fits, else what the graph proves, else nothing.

A grid is proven if the tokens are, in raster order, the cells of a lattice whose axes are known:
a convolution or patch embedding ran along them, position ids or tables of counted positions say
so, or the tokens are put together to an image at the end. Sizes that multiply up to the token count
show nothing, and neither does a merge of two dimensions that may be anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx

from gna_compile import _torch
from gna_compile.graph.nodes import tensor_of
from gna_compile.graph.sites.find import Site
from gna_compile.graph.symbols import Size, hint, holds
from gna_compile.graph.tokens.position_ids import ReadIds, images_in
from gna_compile.graph.tokens.reading import Reading, Relation, Run, read, times
from gna_compile.graph.tokens.sizes import Sizes, generic_point, matching, pin, symbolic_sizes
from gna_compile.graph.tokens.walk import Operands, Walk
from gna_compile.reasons import Decline, Reason

log = logging.getLogger("gna_compile")

__all__ = ["Layout", "Segment", "TokenFlow", "sum_of", "times", "words_of"]


@dataclass(frozen=True)
class Layout:
    """The segments of a sequence of tokens, in order.

    Attributes:
        segments: each a number of global tokens, or the lengths of a grid in raster order: one to
            three, slowest axis first. Sizes are symbolic where the graph's are.
        source: how it is known: "declared", "graph: <operator>" or "values of <graph input>".
        ids: the graph inputs whose values gave grids; they have to be checked at every call.
        indices: inputs whose values say where tokens were moved to; they, too.
    """

    segments: tuple[Size | tuple[Size, ...], ...]
    source: str = "graph"
    ids: tuple[ReadIds, ...] = ()
    indices: tuple[fx.Node, ...] = ()

    @classmethod
    def of_grid(
        cls, grid: Sequence[Size], prefix: Size = 0, suffix: Size = 0, source: str = "graph"
    ) -> Layout:
        """One grid with global tokens around it."""
        return cls.around((tuple(grid),), prefix, suffix, source)

    @classmethod
    def around(
        cls,
        segments: Sequence[Size | tuple[Size, ...]],
        prefix: Size = 0,
        suffix: Size = 0,
        source: str = "graph",
        indices: tuple[fx.Node, ...] = (),
    ) -> Layout:
        """Segments with global tokens around them."""
        before, after = ([] if _is_zero(n) else [n] for n in (prefix, suffix))
        return cls((*before, *segments, *after), source, indices=indices)

    @property
    def grids(self) -> tuple[tuple[Size, ...], ...]:
        """The grids, in order."""
        return tuple(segment for segment in self.segments if isinstance(segment, tuple))

    @property
    def grid(self) -> tuple[Size, ...]:
        """The only grid, or the largest of several, the first of equal ones.

        Guards which one that is, if they have other numbers of axes.
        """
        best, *others = self.grids
        for grid in others:
            if len(grid) == len(best):
                is_larger = hint(prod(grid)) > hint(prod(best))
            else:
                is_larger = holds(prod(grid) > prod(best))
            best = grid if is_larger else best
        return best

    @property
    def placed(self) -> tuple[tuple[Size, Size | tuple[Size, ...]], ...]:
        """Each segment, and how many tokens lie before it."""
        starts = [0, *accumulate(map(_tokens, self.segments))]
        return tuple(zip(starts, self.segments, strict=False))

    @property
    def prefix(self) -> Size:
        """Tokens before the first grid."""
        return next(start for start, segment in self.placed if isinstance(segment, tuple))

    @property
    def suffix(self) -> Size:
        """Tokens after the last grid."""
        last = self.segments[-1]
        return 0 if isinstance(last, tuple) else last

    @property
    def tokens(self) -> Size:
        return sum_of([*map(_tokens, self.segments)])

    @property
    def global_tokens(self) -> Size:
        return sum_of([segment for segment in self.segments if not isinstance(segment, tuple)])

    @property
    def is_by_ids(self) -> bool:
        """Whether position ids gave grids, which are checked at every call."""
        return any(images_in(read.pieces) for read in self.ids)

    @property
    def words(self) -> str:
        """Such as 512 + 64×64 + 7."""
        return " + ".join(
            times(segment) if isinstance(segment, tuple) else str(segment)
            for segment in self.segments
        )


def _is_zero(size: Size) -> bool:
    return isinstance(size, int) and size == 0


def _tokens(segment: Size | tuple[Size, ...]) -> Size:
    return prod(segment) if isinstance(segment, tuple) else segment


@dataclass(frozen=True)
class Segment:
    """A run of tokens with symbolic sizes where the graph has them; fields as those of `Run`."""

    size: Size
    grid: tuple[Size, ...] | None
    axes: tuple[Size, ...]
    run: Run


@dataclass(frozen=True)
class Known:
    """What is known of one site.

    Attributes:
        relation: whether queries, keys and values are the same tokens.
        segments: what the tokens are, in order.
        doubt: why nothing is known of them.
        is_general: it holds for all sizes that the graph serves; else only for the example's.
        has_heads: dimension -3 of the operands is proven to be that of all heads.
    """

    relation: Relation
    segments: tuple[Segment, ...] = ()
    doubt: str = ""
    is_general: bool = True
    has_heads: bool = False


class TokenFlow:
    """Which tokens the sites of a graph work on, from the data flow of the whole graph.

    Walks the graph when it is first asked, once for each point of its sizes. Adds guards only
    where a layout is taken that is proven for the example's sizes alone.

    Args:
        gm: Dynamo's graph; its nodes have `meta["example_value"]`.
        example_inputs: the graph's inputs, real tensors, as a backend gets them.
        is_whole: they are a model's own inputs, of which an image [B, C, H, W] is known by
            convention; not what one part of a model hands to another.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any] | None = None,
        is_whole: bool = True,
    ) -> None:
        self._gm, self._inputs, self._is_whole = gm, example_inputs, is_whole
        self._symbols: list[torch.SymInt] = symbolic_sizes(gm)
        self._marked = _marked_dynamic(gm, example_inputs)
        self._known: dict[tuple[int, fx.Node], Known] | None = None
        self._failure = "the operands are not visible in the graph"
        self._coincidences: list[tuple[Any, int]] = []
        self.indices: tuple[fx.Node, ...] = ()
        """The graph's inputs on whose values what is known rests."""

    def relation(self, site: Site) -> Relation:
        """Whether the queries, keys and values of a site are the same tokens in the same order.

        "self" if each row of all three comes from the same cell of the same sources; "cross" if
        they are other tokens; "unknown" if nothing shows either (inputs of the graph, or results
        of an operator that is not understood).
        """
        return self.known(site).relation

    def known(self, site: Site) -> Known:
        """All that is known of a site."""
        if self._known is None:
            # All at once: guards that come later rewrite the sizes' expressions.
            self._known = self._follow()
            self._inputs = None  # kept alive by nobody
        return self._known.get((id(site.owner), site.node), Known("unknown", doubt=self._failure))

    def _follow(self) -> dict[tuple[int, fx.Node], Known]:
        following = _Following(self._gm, self._inputs, self._symbols, self._is_whole)
        try:
            known = {name: following.find(name) for name in following.sites()}
        except Exception as error:  # a mistake here must not cost a user the model
            self._failure = f"following the tokens failed: {type(error).__name__}: {error}"
            log.warning(
                "%s; the graph stays dense. Please report it.", self._failure, exc_info=True
            )
            return {}
        self.indices = following.indices()
        self._coincidences = following.coincidences()
        return known

    def hold(self, known: Known) -> Decline | None:
        """Holds the graph to the sizes for which what is known of a site holds.

        To the example's, if it holds only there. Else to those at which each size that was a
        number at both points (a shift of `height % 2`) is that number.

        Returns:
            Why it cannot be held: the user marked one of those sizes as dynamic.
        """
        held = [] if known.is_general else [size for size in self._symbols if _is_symbol(size)]
        held += [size for size, _ in self._coincidences]
        marked = self._marked & {s for size in held for s in _torch.expression(size).free_symbols}
        if marked:
            names = ", ".join(sorted(map(str, marked)))
            return Decline(
                Reason.LAYOUT_UNKNOWN,
                f"the layout holds for some sizes only, but the size {names} is marked as dynamic",
            )
        if not known.is_general:
            pin(self._symbols)
        for size, value in self._coincidences:
            holds(size == value)
        return None

    def layout(self, site: Site) -> Layout | Decline:
        """The layout that the graph proves, or why it proves none."""
        if site.query is None:
            return Decline(Reason.LAYOUT_UNKNOWN, "the operands are not visible in the graph")
        known = self.known(site)
        if known.doubt:
            return Decline(Reason.LAYOUT_UNKNOWN, known.doubt)
        if known.relation != "self":
            return Decline(
                Reason.LAYOUT_UNKNOWN, "queries and keys are not known to be the same tokens"
            )
        grids = [segment for segment in known.segments if segment.grid is not None]
        if not grids:
            return Decline(Reason.LAYOUT_UNKNOWN, _why_no_grid(known.segments))
        refusal = self.hold(known)
        if refusal is not None:
            return refusal
        return Layout(
            _joined(known.segments),
            " and ".join(dict.fromkeys(segment.run.why for segment in grids)),
            tuple(dict.fromkeys(r for s in known.segments for r in (s.run.read, *s.run.also) if r)),
            self.indices,
        )


def _joined(segments: Sequence[Segment]) -> tuple[Size | tuple[Size, ...], ...]:
    """The segments of a layout, neighboring global tokens as one."""
    joined: list[Size | tuple[Size, ...]] = []
    for segment in segments:
        if segment.grid is not None:
            joined.append(segment.grid)
        elif joined and not isinstance(joined[-1], tuple):
            joined[-1] = joined[-1] + segment.size
        else:
            joined.append(segment.size)
    return tuple(joined)


class _Following:
    """The walks over a graph, and what they show of each site."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any] | None,
        symbols: list[torch.SymInt],
        is_whole: bool,
    ) -> None:
        self._gm, self._inputs, self._symbols, self._is_whole = gm, inputs, symbols, is_whole
        self._here, self._elsewhere = Sizes(), generic_point(symbols)
        self._walks: dict[tuple[Sizes, bool], Walk] = {}
        self._readings: dict[tuple[int, ...], tuple[Operands, Reading]] = {}

    def sites(self) -> list[tuple[int, fx.Node]]:
        """The graph module (by `id`) and last node of every attention."""
        return list(self._walk(self._here, False).attentions)

    def indices(self) -> tuple[fx.Node, ...]:
        """The inputs whose values were looked at."""
        walks = self._walks.values()
        return tuple(dict.fromkeys(node for walk in walks for node in walk.buffers.used))

    def coincidences(self) -> list[tuple[Any, int]]:
        """Sizes that are one number at both points, though they are symbolic."""
        return self._here.coincidences(self._elsewhere)

    def find(self, site: tuple[int, fx.Node]) -> Known:
        """What is known of a site."""
        known = self._followed(site, with_tables=False)
        if known.relation == "self" and any(map(_is_flat, known.segments)):
            return self._followed(site, with_tables=True)
        return known

    def _walk(self, sizes: Sizes, with_tables: bool) -> Walk:
        name = (sizes, with_tables)
        if name not in self._walks:
            self._walks[name] = Walk(self._gm, self._inputs, sizes, with_tables, self._is_whole)
        return self._walks[name]

    def _followed(self, site: tuple[int, fx.Node], with_tables: bool) -> Known:
        here = self._readings_of(site, self._here, with_tables)
        if any(not _same_structure(here[0], other) for other in here[1:]):
            return Known("unknown", doubt="calls of one subgraph have different layouts")
        segments, has_heads = tuple(map(_as_it_is, here[0].runs)), all(r.has_heads for r in here)
        if not self._symbols:
            return Known(here[0].relation, segments, has_heads=has_heads)
        there = self._readings_of(site, self._elsewhere, with_tables)
        general = self._generalized(here, there)
        if general is not None:
            return replace(general, has_heads=has_heads and all(r.has_heads for r in there))
        return Known(here[0].relation, segments, is_general=False, has_heads=has_heads)

    def _readings_of(
        self, site: tuple[int, fx.Node], sizes: Sizes, with_tables: bool
    ) -> list[Reading]:
        found = []
        for operands in self._walk(sizes, with_tables).attentions.get(site, ()):
            triple = tuple(map(id, operands))
            if triple not in self._readings:
                self._readings[triple] = operands, read(*operands)
            found.append(self._readings[triple][1])
        return found

    def _generalized(self, here: Sequence[Reading], there: Sequence[Reading]) -> Known | None:
        """What holds at the example's sizes and at others, with symbolic sizes; None if unlike."""
        if len(here) != len(there) or not there:
            return None
        one, other = here[0], there[0]
        if any(not _same_structure(other, reading) for reading in there[1:]):
            return None
        if one.relation != other.relation or len(one.runs) != len(other.runs):
            return None
        segments = []
        for run, rival in zip(one.runs, other.runs, strict=True):
            if not _same_kind(run, rival):
                return None
            pairs = [
                (run.size, rival.size),
                *zip(run.grid or (), rival.grid or (), strict=True),
                *zip(run.axes, rival.axes, strict=True),
            ]
            sizes = [matching(*pair, self._symbols, self._elsewhere) for pair in pairs]
            if any(size is None for size in sizes):
                return None
            size, *lengths = (s for s in sizes if s is not None)
            rank = len(run.grid or ())
            grid = tuple(lengths[:rank]) if run.grid is not None else None
            segments.append(Segment(size, grid, tuple(lengths[rank:]), run))
        return Known(one.relation, tuple(segments))


def _is_symbol(size: torch.SymInt) -> bool:
    return bool(_torch.expression(size).is_Symbol) and _torch.hint(size) is not None


def _marked_dynamic(gm: fx.GraphModule, inputs: Sequence[Any] | None) -> set[Any]:
    """The symbols of sizes that `torch._dynamo.mark_dynamic` forbids to specialize."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    found: set[Any] = set()
    for node, value in zip(placeholders, inputs or (), strict=False):
        tensor = tensor_of(node)
        if tensor is not None and isinstance(value, torch.Tensor):
            for dim in _torch.marked_dynamic(value):
                if isinstance(tensor.shape[dim], torch.SymInt):
                    found |= _torch.expression(tensor.shape[dim]).free_symbols
    return found


def _is_flat(segment: Segment) -> bool:
    """Whether tables of positions could show the grid of a run."""
    return segment.grid is None and len(segment.axes) == 1 and hint(segment.size) > 3


def _as_it_is(run: Run) -> Segment:
    return Segment(run.size, run.grid, run.axes, run)


def _same_kind(one: Run, other: Run) -> bool:
    return (
        (one.grid is None) == (other.grid is None)
        and len(one.grid or ()) == len(other.grid or ())
        and len(one.axes) == len(other.axes)
        and bool(one.disorder) == bool(other.disorder)
        and bool(one.doubt) == bool(other.doubt)
        and one.ids is other.ids
        and (one.read, one.also) == (other.read, other.also)
        and one.why.split(":")[0] == other.why.split(":")[0]
    )


def _same_structure(one: Reading, other: Reading) -> bool:
    return one.relation == other.relation and [
        (r.size, r.grid, r.axes, r.disorder, r.doubt, r.ids, r.read, r.also) for r in one.runs
    ] == [(r.size, r.grid, r.axes, r.disorder, r.doubt, r.ids, r.read, r.also) for r in other.runs]


def words_of(segment: Segment) -> str:
    return str(segment.size) if segment.grid is None else times(segment.grid)


def _why_no_grid(segments: Sequence[Segment]) -> str:
    longest = sorted(segments, key=lambda s: -hint(s.size))
    for segment in longest:
        trouble = segment.run.doubt or segment.run.disorder
        if trouble:
            return trouble
    for segment in longest:
        if len(segment.axes) > 1:
            return (
                f"the tokens are {times(segment.axes)} in raster order, but nothing shows that "
                "these are axes of space: declare the grid with `layout`"
            )
    return Reason.LAYOUT_UNKNOWN.meaning


def sum_of(sizes: Sequence[Size]) -> Size:
    total: Size = 0
    for size in sizes:
        total = total + size
    return total
