"""The plan of a problem: the query box and the key box with the least predicted time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gna_compile.geometry import Axis, Neighborhood
from gna_compile.planner.architectures import ARCHITECTURES
from gna_compile.planner.costs import Architecture, Launch
from gna_compile.planner.counts import (
    Box,
    Counts,
    Tiling,
    axis_counts,
    global_counts,
    global_key_tiles,
    grid_counts,
)


class PlanError(ValueError):
    """A workload or an architecture that cannot be planned; the message names value and rule."""


@dataclass(frozen=True)
class Workload:
    """What one launch has to do.

    Args:
        neighborhood: the geometry.
        heads: batch size x query heads.
        head_dim: elements of a head.
        element_bytes: bytes of one element of query, key and value.
        key_mask: global keys may be hidden.
        global_queries: the global tokens whose rows are computed, counted over prefix, then suffix;
            None for all.

    Raises:
        PlanError: if a size is below 1, or there are no such global tokens.
    """

    neighborhood: Neighborhood
    heads: int = 1
    head_dim: int = 128
    element_bytes: int = 2
    key_mask: bool = False
    global_queries: range | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "element_bytes"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} {getattr(self, name)} must be at least 1")
        rows, every = self.global_queries, range(self.neighborhood.global_tokens)
        if rows is not None and rows != every[rows.start : rows.stop]:
            raise PlanError(f"global_queries {rows} must be a run of the global tokens {every}")


@dataclass(frozen=True)
class Plan:
    """How a workload is cut into tiles, and what that costs.

    Attributes:
        workload: what is cut.
        architecture: name of the architecture that it is planned for.
        query_box: tokens of a query tile along each grid axis.
        key_box: tokens of a key tile along each grid axis.
        tiling: "dynamic" if key tiles start at a query tile's union box, "static" if they lie on a
            fixed grid. On a dilated axis both boxes lie within one dilation group.
        grid: counts over the query tiles of the grid.
        globals: counts over the query tiles of global tokens.
        milliseconds: predicted time.
    """

    workload: Workload
    architecture: str
    query_box: Box
    key_box: Box
    tiling: Tiling
    grid: Counts
    globals: Counts
    milliseconds: float

    @property
    def query_tile(self) -> int:
        """Tokens of a query tile."""
        return math.prod(self.query_box)

    @property
    def key_tile(self) -> int:
        """Tokens of a key tile."""
        return math.prod(self.key_box)

    @property
    def visited(self) -> int:
        """Visited key tiles, summed over all query tiles of one head."""
        return self.grid.visited.sum + self.globals.visited.sum

    @property
    def partial(self) -> int:
        """Those among them that need a mask."""
        return self.grid.partial.sum + self.globals.partial.sum

    @property
    def is_block_sparse(self) -> bool:
        """Whether the window alone never needs a mask (a partial tile of global keys may)."""
        every, full = global_key_tiles(self.workload.neighborhood, self.key_tile)
        partial = every if self.workload.key_mask else every - full
        return self.grid.partial.sum == partial * self.grid.query_tiles


def plan(workload: Workload, architecture: str = "sm90", tiling: Tiling = "dynamic") -> Plan:
    """The plan with the least predicted time over all power-of-two boxes of the kernel's tiles.

    Cached, so that a kernel may ask at every call.

    Raises:
        PlanError: if there is no such architecture, or no box that it can read.
    """
    return _plan(workload, architecture_of(architecture), tiling)


def plan_with(
    workload: Workload,
    query_box: Box,
    key_box: Box,
    architecture: str = "sm90",
    tiling: Tiling = "dynamic",
) -> Plan:
    """The plan with these boxes, of any extents.

    Raises:
        PlanError: if there is no such architecture.
        GeometryError: if a box does not fit the grid's rank or has an extent below 1.
    """
    return _with(workload, architecture_of(architecture), query_box, key_box, tiling)


def architecture_of(name: str) -> Architecture:
    """The cost table of that name.

    Raises:
        PlanError: if there is none.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise PlanError(f"there is no cost table for the architecture {name!r}; there are {known}")
    return ARCHITECTURES[name]


def boxes(tokens: int, rank: int) -> Iterator[Box]:
    """All boxes of power-of-two extents with this number of tokens; long last axes first."""
    if rank == 1:
        yield (tokens,)
        return
    for shift in range(tokens.bit_length()):
        for rest in boxes(tokens >> shift, rank - 1):
            yield (1 << shift, *rest)


@lru_cache(maxsize=1024)
def _plan(workload: Workload, architecture: Architecture, tiling: Tiling) -> Plan:
    best: tuple[float, Box, Box] | None = None
    for query_tile, key_tile in architecture.tiles:
        found = _cheapest(workload, architecture, query_tile, key_tile, tiling)
        if best is None or found < best:
            best = found
    assert best is not None
    return _with(workload, architecture, *best[1:], tiling)


def _with(
    workload: Workload, architecture: Architecture, query_box: Box, key_box: Box, tiling: Tiling
) -> Plan:
    neighborhood, key_mask = workload.neighborhood, workload.key_mask
    grid = grid_counts(neighborhood, query_box, key_box, tiling, key_mask)
    rows = global_counts(
        neighborhood, math.prod(query_box), key_box, key_mask, workload.global_queries
    )
    time = _launch(workload, architecture, math.prod(query_box), key_box).milliseconds(
        grid.query_tiles + rows.query_tiles,
        grid.visited.sum + rows.visited.sum,
        grid.partial.sum + rows.partial.sum,
        max(grid.visited.max, rows.visited.max),
    )
    return Plan(workload, architecture.name, query_box, key_box, tiling, grid, rows, time)


def _launch(
    workload: Workload, architecture: Architecture, query_tile: int, key_box: Box
) -> Launch:
    return architecture.launch(
        query_tile, key_box, workload.heads, workload.head_dim, workload.element_bytes
    )


def _cheapest(
    workload: Workload, architecture: Architecture, query_tile: int, key_tile: int, tiling: Tiling
) -> tuple[float, Box, Box]:
    """Predicted time, query box and key box of the best cut into tiles of these sizes."""
    neighborhood, key_mask = workload.neighborhood, workload.key_mask
    global_keys, whole = global_key_tiles(neighborhood, key_tile)
    masked_globals = global_keys if key_mask else global_keys - whole
    query_boxes = _fitting(neighborhood.axes, query_tile, architecture, architecture.query_parts)
    key_boxes = [
        (
            box,
            _launch(workload, architecture, query_tile, box),
            global_counts(neighborhood, query_tile, box, key_mask, workload.global_queries),
        )
        for box in _fitting(neighborhood.axes, key_tile, architecture)
    ]
    # Counts of every axis by its two extents, looked up once and not for each pair of boxes.
    tables = [
        {
            (query, key): axis_counts(axis, query, key, tiling)
            for query in {box[index] for box in query_boxes}
            for key in {box[index] for box, *_ in key_boxes}
        }
        for index, axis in enumerate(neighborhood.axes)
    ]
    best: tuple[float, Box, Box] = (math.inf, (), ())
    for query_box in query_boxes:
        for key_box, launch, rows in key_boxes:
            tiles = visited = full = most = 1
            for table, extents in zip(tables, zip(query_box, key_box, strict=True), strict=True):
                counts = table[extents]
                tiles *= counts.query_tiles
                visited *= counts.visited
                full *= counts.full
                most *= counts.most
            time = launch.milliseconds(
                tiles + rows.query_tiles,
                visited + tiles * global_keys + rows.visited.sum,
                visited - full + tiles * masked_globals + rows.partial.sum,
                max(most + global_keys, rows.visited.max),
            )
            if time < best[0]:
                best = (time, query_box, key_box)
    return best


def _fitting(
    axes: tuple[Axis, ...], tokens: int, architecture: Architecture, parts: int = 1
) -> list[Box]:
    """The boxes that TMA reads in this number of parts, if possible none twice as long as an axis."""

    def is_readable(axis: Axis, size: int) -> bool:
        step, span = axis.dilation, axis.dilation * size
        return (
            size == 1
            or step == 1
            or (step <= architecture.max_step and span <= architecture.max_span)
        )

    readable = [
        box
        for box in boxes(tokens, len(axes))
        if all(is_readable(axis, size) for axis, size in zip(axes, _part(box, parts), strict=True))
    ]
    if not readable:
        dilation = "x".join(str(axis.dilation) for axis in axes)
        raise PlanError(
            f"no box of {tokens} tokens can be read with dilation {dilation}: at most "
            f"{architecture.max_step}, and at most {architecture.max_span} tokens from end to end"
        )
    fitting = [
        box
        for box in readable
        if all(size < 2 * axis.group(0).length for axis, size in zip(axes, box, strict=True))
    ]
    return fitting or readable


def _part(box: Box, parts: int) -> Box:
    """One of `parts` equal boxes that a box is cut into along its first axes."""
    left = math.prod(box) // parts
    part = []
    for size in reversed(box):
        part.append(min(size, left))
        left //= part[-1]
    return tuple(reversed(part))
