"""How a site's tokens lie: what was declared, if it fits, else what the graph shows, else nothing.

A grid counts as shown by the graph if the token axis was made by merging two or three axes in
raster order (patchify and flatten, RoPE tables), or is split into axes that are then used as
axes of space (unpatchify), or is indexed by position ids whose values are a raster. Sizes that
merely multiply up to the token count show nothing. Evidence that contradicts itself is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import fx

from gna_compile.graph.align import agree, product
from gna_compile.graph.axes import Axes, Dim, Grid, Shape
from gna_compile.graph.flow import Walk
from gna_compile.graph.position_ids import grid_from_ids, may_be_ids, name_of
from gna_compile.graph.values import Size, hint, holds, is_known
from gna_compile.reasons import Reason

MAX_AXES = 3


@dataclass(frozen=True)
class Layout:
    """`prefix` global tokens, a `grid` in raster order, `suffix` global tokens.

    Attributes:
        grid: one to three sizes, slowest axis first; symbolic where the graph's sizes are.
        source: how it is known: "declared", "graph: <operator>" or "values of <graph input>".
        ids: the graph input whose values gave the grid; they have to be checked at every call.
    """

    grid: tuple[Size, ...]
    prefix: Size = 0
    suffix: Size = 0
    source: str = "graph"
    ids: fx.Node | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a site has no layout."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Segment:
    """A run of tokens: its size, its grid if the graph shows one, and position ids indexed by it."""

    size: Size
    grid: tuple[Size, ...] | None = None
    source: str = ""
    ids: fx.Node | None = None


class AnySite(Protocol):
    """What is asked about: an attention whose operands are [.., tokens, head_dim]."""

    @property
    def owner(self) -> fx.GraphModule: ...
    @property
    def query(self) -> fx.Node | None: ...
    @property
    def key(self) -> fx.Node | None: ...
    @property
    def key_transposed(self) -> bool: ...
    @property
    def tokens(self) -> Size: ...


class Declared(Protocol):
    """A layout from a policy or from `prepare`; prefix and suffix are None where it does not say."""

    @property
    def grid(self) -> tuple[Size, ...]: ...
    @property
    def prefix(self) -> int | None: ...
    @property
    def suffix(self) -> int | None: ...


class _Unclear(Exception):
    """The graph does not show how tokens lie; the message says why."""


class TokenFlow:
    """Which tokens the sites of a graph work on, from the data flow of the whole graph.

    Adds no guard. Walks the graph once when it is made; values of position ids are read only when
    a site needs them, once each.

    Args:
        gm: Dynamo's graph; its nodes have `meta["example_value"]`.
        example_inputs: the graph's inputs, real tensors, as a backend gets them.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> None:
        self._walk = Walk()
        self._axes: Axes = self._walk.axes
        self._walk.run(gm, None)
        self._values: dict[fx.Node, Any] = {}
        self._grids: dict[fx.Node, tuple[int, ...] | None] = {}
        self._layouts: dict[tuple[int, fx.Node, fx.Node], Layout | Refusal] = {}
        (root,) = self._walk.calls[id(gm)]
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, example_inputs or (), strict=False):
            shape = root.get(node)
            if (
                isinstance(value, torch.Tensor)
                and isinstance(shape, tuple)
                and may_be_ids(node.name, value)
            ):
                self._values[node] = value
                tokens = self._axes.find(shape[-2])
                if not tokens.is_unit:
                    tokens.ids += (node,)

    def relation(self, site: AnySite) -> Literal["self", "cross", "unknown"]:
        """Whether the queries and the keys of a site are the same tokens in the same order.

        "self" if both are indexed by one dimension; "cross" if their numbers differ; "unknown"
        otherwise: as many keys as queries, but nothing shows that they are the same tokens
        (other inputs of the graph, or an operator that may reorder them).
        """
        answers = {self._relation(*pair) for pair in self._token_dims(site)}
        return answers.pop() if len(answers) == 1 else "unknown"

    def segments(self, site: AnySite) -> list[tuple[Size, tuple[Size, ...] | None]]:
        """Size, and grid if the graph shows it, of each run of tokens of a site, in order.

        Empty if nothing is known of the site, or its runs differ between calls of a subgraph.
        """
        try:
            return [(segment.size, segment.grid) for segment in self._segments(site)]
        except _Unclear:
            return []

    def ids_without_grid(self, site: AnySite) -> list[tuple[Size, str]]:
        """Size of each run of tokens whose position ids are no raster, and the ids' name."""
        try:
            return [
                (segment.size, name_of(segment.ids))
                for segment in self._segments(site)
                if segment.grid is None and segment.ids is not None
            ]
        except _Unclear:
            return []

    def layout(self, site: AnySite) -> Layout | Refusal:
        """The layout that the graph shows, or why it shows none."""
        if site.query is None or site.key is None:
            return Refusal(Reason.LAYOUT_UNKNOWN, "the operands are not visible in the graph")
        name = (id(site.owner), site.query, site.key)
        if name not in self._layouts:
            try:
                self._layouts[name] = self._layout(site)
            except _Unclear as unclear:
                self._layouts[name] = Refusal(Reason.LAYOUT_UNKNOWN, str(unclear))
        return self._layouts[name]

    # One subgraph may be called several times; then what follows is asked once per call.

    def _token_dims(self, site: AnySite) -> list[tuple[Dim, Dim]]:
        """The token dimensions of query and key."""
        pairs = []
        for known in self._walk.calls.get(id(site.owner), ()):
            query = known.get(site.query) if site.query is not None else None
            key = known.get(site.key) if site.key is not None else None
            if isinstance(query, tuple) and isinstance(key, tuple):
                at = -1 if site.key_transposed else -2
                pairs.append((self._axes.find(query[-2]), self._axes.find(key[at])))
        return pairs

    def _relation(self, query: Dim, key: Dim) -> Literal["self", "cross", "unknown"]:
        ours, theirs = self._axes.flat_segments(query), self._axes.flat_segments(key)
        if ours == theirs:
            return "self"
        return "unknown" if agree(query.size, key.size) else "cross"

    def _layout(self, site: AnySite) -> Layout:
        if self.relation(site) != "self":
            raise _Unclear("queries and keys are not known to be the same tokens")
        segments = self._segments(site)
        on_grid = [i for i, segment in enumerate(segments) if segment.grid is not None]
        if not on_grid:
            raise _Unclear(Reason.LAYOUT_UNKNOWN.meaning)
        if len(on_grid) > 1:
            grids = " and ".join(times(segments[i].grid or ()) for i in on_grid)
            raise _Unclear(f"the tokens are several grids one after another: {grids}")
        (index,) = on_grid
        segment = segments[index]
        return Layout(
            segment.grid or (),
            _total(segments[:index]),
            _total(segments[index + 1 :]),
            segment.source,
            segment.ids,
        )

    def _segments(self, site: AnySite) -> tuple[Segment, ...]:
        found: list[tuple[Segment, ...]] = []
        for known in self._walk.calls.get(id(site.owner), ()):
            query = known.get(site.query) if site.query is not None else None
            if isinstance(query, tuple) and len(query) > 1:
                found.append(tuple(self._parts(query)))
        if not found:
            raise _Unclear("the operands are not visible in the graph")
        first, *others = found
        if any(not _same_segments(first, other) for other in others):
            raise _Unclear("calls of one subgraph have different layouts")
        return first

    def _parts(self, query: Shape) -> list[Segment]:
        forbidden = {self._axes.find(dim) for dim in (*query[:-2], query[-1], *self._walk.heads)}
        return self._parts_of(self._axes.find(query[-2]), forbidden)

    def _parts_of(self, dim: Dim, forbidden: set[Dim]) -> list[Segment]:
        whole = self._shown(dim, forbidden)
        if not dim.segments:
            return [whole]
        parts = [
            part
            for segment in dim.segments
            for part in self._parts_of(self._axes.find(segment), forbidden)
        ]
        if whole.grid is None:
            return parts
        grids = [part.grid for part in parts if part.grid is not None]
        if grids:
            both = " and as ".join(times(grid) for grid in (whole.grid, *grids))
            raise _Unclear(f"the tokens are used as {both}")
        return [whole]

    def _shown(self, dim: Dim, forbidden: set[Dim]) -> Segment:
        """The grid of one dimension that is looked at as a whole."""
        shown = [grid for grid in dim.grids if self._counts(grid)]
        if len(shown) > 1:
            both = " and as ".join(
                times([self._axes.find(f).size for f in grid.factors]) for grid in shown
            )
            raise _Unclear(f"the tokens are used as {both}, and both cannot be their grid")
        if not shown:
            return self._shown_by_ids(dim)
        (grid,) = shown
        leaves = self._leaves(grid)
        if forbidden.intersection(leaves):
            return Segment(dim.size)
        if any(self._is_disordered(leaf) for leaf in leaves):
            raise _Unclear("an operator that may reorder tokens lies on their way to the attention")
        sizes = (1,) * min(dim.units, max(MAX_AXES - len(leaves), 0)) + tuple(
            leaf.size for leaf in leaves
        )
        if len(sizes) > MAX_AXES:
            raise _Unclear(f"the tokens lie on {len(sizes)} axes, {times(sizes)}")
        return Segment(dim.size, sizes, f"graph: {grid.source}")

    def _shown_by_ids(self, dim: Dim) -> Segment:
        shown = [(grid, node) for node in dim.ids if (grid := self._grid_of(node)) is not None]
        if not shown:
            return Segment(dim.size, ids=dim.ids[0] if dim.ids else None)
        grid, node = shown[0]
        for other, rival in shown[1:]:
            if other != grid:
                raise _Unclear(
                    f"{name_of(node)} shows the grid {times(grid)}, {name_of(rival)} {times(other)}"
                )
        return Segment(dim.size, grid, f"values of {name_of(node)}", node)

    def _grid_of(self, ids: fx.Node) -> tuple[int, ...] | None:
        if ids not in self._grids:
            self._grids[ids] = grid_from_ids(self._values[ids])
        return self._grids[ids]

    def _counts(self, grid: Grid) -> bool:
        """Whether a decomposition is evidence of a grid, and not a mere split into blocks."""
        if grid.is_merged:
            return True
        factors = [self._axes.find(factor) for factor in grid.factors]
        return sum(factor.is_spatial or factor.is_unpatched for factor in factors) > 1

    def _is_disordered(self, dim: Dim) -> bool:
        parts = self._axes.flat_segments(dim)
        return dim.is_opaque or any(part.is_opaque for part in parts)

    def _leaves(self, grid: Grid) -> Shape:
        """The axes that a grid's factors were merged from: (T * H, W) is (T, H, W).

        An axis that is merely split, or one of space, stays whole: a model may cut it into windows.
        """
        leaves: list[Dim] = []
        for factor in grid.factors:
            factor = self._axes.find(factor)
            inner = [] if factor.is_spatial else [g for g in factor.grids if g.is_merged]
            leaves.extend(self._leaves(inner[0]) if len(inner) == 1 else (factor,))
        return tuple(leaves)


def resolve(
    site: AnySite,
    flow: TokenFlow,
    declared: Declared | None,
    global_tokens: str | None = None,
) -> Layout | Refusal:
    """The layout of a site, in this order of trust: declared, then shown by the graph.

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
        if isinstance(shown, Refusal):
            return shown
        return _checked(site, shown, global_tokens)
    grid = tuple(declared.grid)
    placed = _placed(site, flow, declared, global_tokens)
    if isinstance(placed, Refusal):
        return placed
    prefix, suffix = placed
    for size, name in flow.ids_without_grid(site):
        if holds(size == math.prod(grid)):
            return Refusal(
                Reason.LAYOUT_MISMATCH, f"declared is the grid {times(grid)}, {name} shows none"
            )
    ids = None
    if isinstance(shown, Layout):
        theirs = (shown.grid, shown.prefix, shown.suffix)
        # What ids show is checked at every call, and no reason to hold symbols to it.
        ours = grid if shown.ids is None else tuple(hint(size) for size in grid)
        if not same_grid(shown.grid, ours) or not holds(shown.prefix == prefix):
            return Refusal(
                Reason.LAYOUT_MISMATCH,
                f"declared is {_words(grid, prefix, suffix)}, "
                f"the graph shows {_words(*theirs)} ({shown.source})",
            )
        ids = shown.ids
    return Layout(grid, prefix, suffix, "declared", ids)


def _checked(site: AnySite, shown: Layout, global_tokens: str | None) -> Layout | Refusal:
    """A layout from the graph, unless it contradicts `global_tokens` or does not fit the tokens."""
    wrong = {"prefix": shown.suffix, "suffix": shown.prefix}.get(global_tokens or "")
    if global_tokens == "none":
        wrong = shown.prefix + shown.suffix
    if wrong is not None and not holds(wrong == 0):
        return Refusal(
            Reason.LAYOUT_MISMATCH,
            f"declared is `global_tokens: {global_tokens}`, the graph shows "
            f"{_words(shown.grid, shown.prefix, shown.suffix)} ({shown.source})",
        )
    tokens = shown.prefix + product(shown.grid) + shown.suffix
    if not holds(tokens == site.tokens):
        return _miscounted(site, shown.grid, shown.prefix, shown.suffix)
    return shown


def _placed(
    site: AnySite, flow: TokenFlow, declared: Declared, global_tokens: str | None
) -> tuple[Size, Size] | Refusal:
    """Tokens before and after the declared grid."""
    grid = tuple(declared.grid)
    prefix: Size = declared.prefix or 0
    suffix: Size = declared.suffix or 0
    if declared.prefix is None and declared.suffix is None:
        tokens = math.prod(grid)
        sizes = [size for size, _ in flow.segments(site)]
        matching = [i for i, size in enumerate(sizes) if holds(size == tokens)]
        if len(matching) == 1:
            (index,) = matching
            prefix, suffix = _sum(sizes[:index]), _sum(sizes[index + 1 :])
        elif global_tokens == "prefix":
            prefix = site.tokens - tokens
        elif global_tokens == "suffix":
            suffix = site.tokens - tokens
    wrong = {"prefix": suffix, "suffix": prefix, "none": prefix + suffix}.get(
        global_tokens or "", 0
    )
    fits = holds(prefix + math.prod(grid) + suffix == site.tokens)
    if not fits or not holds(prefix >= 0) or not holds(suffix >= 0):
        return _miscounted(site, grid, declared.prefix or 0, declared.suffix or 0)
    if not holds(wrong == 0):
        return Refusal(
            Reason.LAYOUT_MISMATCH,
            f"declared is `global_tokens: {global_tokens}`, but the tokens of the grid "
            f"{times(grid)} have {prefix} before and {suffix} after them",
        )
    return prefix, suffix


def _miscounted(site: AnySite, grid: Sequence[Size], prefix: Size, suffix: Size) -> Refusal:
    tokens = prefix + product(grid) + suffix
    return Refusal(
        Reason.LAYOUT_MISMATCH,
        f"{_words(grid, prefix, suffix)} is {tokens} tokens, the site has {site.tokens}",
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


def _same_segments(left: Sequence[Segment], right: Sequence[Segment]) -> bool:
    def same(one: Segment, other: Segment) -> bool:
        grids = _same_sizes(one.grid or (), other.grid or ())
        return grids and is_known(one.size == other.size) and one.ids is other.ids

    return len(left) == len(right) and all(map(same, left, right))


def _same_sizes(left: Sequence[Size], right: Sequence[Size]) -> bool:
    return len(left) == len(right) and all(
        is_known(one == other) for one, other in zip(left, right, strict=True)
    )


def _total(segments: Sequence[Segment]) -> Size:
    return _sum([segment.size for segment in segments])


def _sum(sizes: Sequence[Size]) -> Size:
    total: Size = 0
    for size in sizes:
        total = total + size
    return total


def times(grid: Sequence[Size]) -> str:
    """Sizes as text: 30×48×80."""
    return "×".join(map(str, grid))


def _words(grid: Sequence[Size], prefix: Size, suffix: Size) -> str:
    around = f" with prefix {prefix} and suffix {suffix}"
    return f"the grid {times(grid)}{around}"
