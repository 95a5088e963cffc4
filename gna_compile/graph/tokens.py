"""How a site's tokens lie: what was declared if it fits, else what the graph shows, else nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from gna_compile.graph.dims import Dim, same_size, unify
from gna_compile.graph.dimflow import DimFlow, shape_of
from gna_compile.graph.sites import Site
from gna_compile.policy import DeclaredLayout
from gna_compile.reasons import Reason

Size = Any  # int or torch.SymInt


@dataclass(frozen=True)
class Layout:
    """`prefix` global tokens, a `grid` in raster order, `suffix` global tokens.

    Attributes:
        source: how it is known: "graph", "ids" or "declared".
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


class TokenFlow:
    """Which tokens every site of a graph works on, from the data flow of the whole graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs as a backend gets them. Position ids among them (a graph input
            with "ids" in its name) are read: if their values are a raster, the tokens that they
            belong to lie on that grid.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any] = ()) -> None:
        self._flow = DimFlow(gm)
        self._ids: list[tuple[Dim, fx.Node]] = []
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, example_inputs, strict=False):
            if "ids" in node.name and isinstance(value, torch.Tensor):
                self._read_ids(node, value)

    def _read_ids(self, node: fx.Node, value: torch.Tensor) -> None:
        shape = shape_of(node)
        if shape is None or len(shape) not in (2, 3):
            return
        dim = self._flow.dims(node)[-2].find()
        if dim.is_atom and (grid := grid_from_ids(value)) is not None:
            unify(dim, Dim(dim.size, raster=[Dim(length) for length in grid]))
            self._ids.append((dim, node))

    def relation(self, site: Site) -> Literal["self", "cross", "unknown"]:
        """Whether queries and keys are the same tokens, by data flow."""
        query, key = self._tokens(site.query), self._tokens(site.key, site.key_transposed)
        if query is None or key is None:
            return "unknown"
        if query.find() is key.find():
            return "self"
        ours, theirs = query.segments(), key.segments()
        if len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True)):
            return "self"
        return "unknown" if same_size(site.tokens, site.key_tokens) else "cross"

    def segments(self, site: Site) -> list[tuple[Size, tuple[Size, ...] | None]]:
        """Size, and grid if it is known, of each run of tokens of the site, in order."""
        return [(dim.size, _grid(dim)) for dim in self._segments(site)]

    def layout(self, site: Site) -> Layout | Refusal:
        """The layout that the graph shows, or why it shows none."""
        dims = self._segments(site)
        on_grid = [i for i, dim in enumerate(dims) if _grid(dim) is not None]
        if not on_grid:
            return Refusal(Reason.LAYOUT_UNKNOWN, Reason.LAYOUT_UNKNOWN.meaning)
        if len(on_grid) > 1:
            return Refusal(Reason.LAYOUT_UNKNOWN, "the tokens come from more than one grid")
        (index,) = on_grid
        grid_dim = dims[index]
        if grid_dim.conflict:
            return Refusal(Reason.LAYOUT_UNKNOWN, grid_dim.conflict)
        factors = grid_dim.factors()
        if len(factors) > 3:
            return Refusal(Reason.LAYOUT_UNKNOWN, f"the tokens lie on {len(factors)} axes")
        assert site.query is not None
        outer = [dim.find() for dim in self._flow.dims(site.query)[:-2]]
        if any(factor is dim for factor in factors for dim in outer if not same_size(dim.size, 1)):
            return Refusal(Reason.LAYOUT_UNKNOWN, "a factor of the token count is batch or heads")
        ids = next((node for dim, node in self._ids if dim.find() is grid_dim), None)
        return Layout(
            tuple(factor.size for factor in factors),
            sum((dim.size for dim in dims[:index]), 0),
            sum((dim.size for dim in dims[index + 1 :]), 0),
            "graph" if ids is None else "ids",
            ids,
        )

    def _segments(self, site: Site) -> list[Dim]:
        dim = self._tokens(site.query)
        return [] if dim is None else dim.segments()

    def _tokens(self, node: fx.Node | None, transposed: bool = False) -> Dim | None:
        if node is None:
            return None
        dims = self._flow.dims(node)
        return dims[-1 if transposed else -2] if len(dims) >= 2 else None


def _grid(dim: Dim) -> tuple[Size, ...] | None:
    return tuple(factor.size for factor in dim.factors()) if dim.find().raster else None


def resolve(
    site: Site,
    flow: TokenFlow,
    declared: DeclaredLayout | None,
    global_tokens: str | None = None,
) -> Layout | Refusal:
    """The layout of a site, in this order of trust: declared, then seen in the graph.

    A declared layout has to have as many tokens as the site and must not contradict the graph.
    Where it does not say how many global tokens lie before and after the grid, the graph does, or
    else `global_tokens` ("prefix" or "suffix") says on which side the rest lies.
    """
    seen = flow.layout(site)
    if declared is None:
        return seen
    grid, tokens = declared.grid, math.prod(declared.grid)
    prefix, suffix = declared.prefix, declared.suffix
    if prefix is None and suffix is None:
        prefix, suffix = _around(site, flow, tokens, global_tokens)
    prefix, suffix = prefix or 0, suffix or 0
    if not bool(prefix + tokens + suffix == site.tokens):
        return Refusal(
            Reason.LAYOUT_MISMATCH,
            f"{prefix} + {'x'.join(map(str, grid))} + {suffix} = {prefix + tokens + suffix} "
            f"tokens are declared, the site has {site.tokens}",
        )
    ids = None
    if isinstance(seen, Layout):
        if not _same_grid(seen.grid, grid):
            return Refusal(
                Reason.LAYOUT_MISMATCH,
                f"the grid {'x'.join(map(str, grid))} is declared, "
                f"the graph shows {'x'.join(map(str, seen.grid))}",
            )
        ids = seen.ids
    return Layout(grid, prefix, suffix, "declared", ids)


def _around(
    site: Site, flow: TokenFlow, tokens: int, global_tokens: str | None
) -> tuple[Size, Size]:
    sizes = [size for size, _ in flow.segments(site)]
    matching = [i for i, size in enumerate(sizes) if same_size(size, tokens)]
    if len(matching) == 1:
        (index,) = matching
        return sum(sizes[:index], 0), sum(sizes[index + 1 :], 0)
    rest = site.tokens - tokens
    return (rest, 0) if global_tokens == "prefix" else (0, rest if global_tokens else 0)


def _same_grid(seen: Sequence[Size], declared: Sequence[int]) -> bool:
    ours = [size for size in seen if not same_size(size, 1)]
    theirs = [size for size in declared if size != 1]
    return len(ours) == len(theirs) and all(
        bool(a == b) for a, b in zip(ours, theirs, strict=True)
    )


def grid_from_ids(ids: torch.Tensor) -> tuple[int, ...] | None:
    """The grid that position ids [tokens, axes] (or [1, tokens, axes]) enumerate in raster order.

    Columns are coordinates, slowest first; constant ones are dropped. None if the values are not
    exactly a raster from 0 on. Copies the tensor to the host once.
    """
    table = ids.detach().to("cpu", torch.float64)
    if table.ndim == 3:
        if not bool((table == table[:1]).all()):
            return None
        table = table[0]
    if table.ndim != 2 or table.shape[0] < 2:
        return None
    varying = [c for c in table.unbind(1) if not bool((c == c[0]).all())]
    if not 1 <= len(varying) <= 3:
        return None
    grid = tuple(int(column.max()) + 1 for column in varying)
    if math.prod(grid) != table.shape[0]:
        return None
    raster = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    if all(torch.equal(r.reshape(-1), c) for r, c in zip(raster, varying, strict=True)):
        return grid
    return None
