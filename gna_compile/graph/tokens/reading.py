"""What the operands of one attention are, at one point of the graph's sizes.

`relation` says whether queries, keys and values are the same tokens, `runs` what the tokens are: a
list of runs, each from other sources, and for each whether it is the raster of a lattice in order.
Nothing is concluded from sizes: only coordinates count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import fx

from gna_compile.graph.position_ids import grid_from_ids, name_of, why_no_grid
from gna_compile.graph.tokens.cells import NONE, UNKNOWN, Cells, Source, Tokens, reshaped

Relation = Literal["self", "cross", "unknown"]

MAX_AXES = 3
_MOST_PATTERNS = 8


@dataclass(frozen=True)
class Run:
    """Neighboring tokens that come from the same sources.

    Attributes:
        size: how many.
        grid: lengths of the axes on which they lie in raster order, if that is proven.
        axes: lengths of the dimensions whose raster they are, which need not be axes of space;
            () if they are off any lattice, or not in order.
        why: what is shown of the grid, and by what.
        ids: the graph's input of position ids that are theirs.
        disorder: what is known to be wrong with their order.
        doubt: what is not known of them.
        has_tokens: some source's tokens stand behind them; else they are the same for any input.
    """

    size: int
    grid: tuple[int, ...] | None = None
    axes: tuple[int, ...] = ()
    why: str = ""
    ids: fx.Node | None = None
    disorder: str = ""
    doubt: str = ""
    has_tokens: bool = False


@dataclass(frozen=True)
class Reading:
    """What is known of one attention."""

    relation: Relation
    runs: tuple[Run, ...] = ()


def read(query: Tokens, key: Tokens, value: Tokens) -> Reading:
    """Reads the operands [.., heads, tokens, head_dim] of an attention."""
    # A dimension of heads may as well hold frames or windows: then it is part of the batch.
    are_rows = any(map(_heads_are_rows, (query, key, value)))
    if are_rows and len({tokens.shape[:-2] for tokens in (query, key, value)}) > 1:
        return Reading("unknown")
    q, k, v = (_rows(tokens, are_rows) for tokens in (query, key, value))
    relation = _relation(q, k, v, query, key)
    return Reading(relation, tuple(_runs(q, v)) if relation != "cross" else ())


# --- rows: coordinates by batch row and token ----------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Lines:
    """The coordinates of a source at a site: for each axis, its patterns [rows, tokens].

    An axis that only tells channels apart has no pattern; one that differs between channels (a
    table of positions: rows in some, columns in others) has several.
    """

    source: Source
    axes: tuple[tuple[Cells, ...], ...]

    def varies(self) -> bool:
        """Whether the source tells tokens of one row apart."""
        return any(pattern.shape[1] > 1 for axis in self.axes for pattern in axis)

    def stands_behind(self) -> bool:
        """Whether it tells tokens of a row apart, or may have before they were mixed."""
        return self.varies() or any((p == UNKNOWN).any() for axis in self.axes for p in axis)


_Rows = dict[Source, _Lines]


def _is_own(lines: _Lines) -> bool:
    return lines.source.kind != "table" and lines.stands_behind()


def _heads_are_rows(tokens: Tokens) -> bool:
    """Whether the tokens of one head are others than those of the next."""
    return len(tokens.shape) > 3 and any(
        array is not None and array.shape[-3] > 1 and array.shape[-1] == 1
        for axes in tokens.cells.values()
        for array in axes
    )


def _rows(tokens: Tokens, heads_are_rows: bool) -> _Rows:
    shape = tokens.shape
    rank = len(shape)
    channels = [rank - 1, *([rank - 3] if rank > 3 and not heads_are_rows else [])]
    found: _Rows = {}
    for source, axes in tokens.cells.items():
        lines = _Lines(
            source,
            tuple(() if array is None else _patterns(array, shape, channels) for array in axes),
        )
        if any(lines.axes):
            found[source] = lines
    return found


def _patterns(array: Cells, shape: tuple[int, ...], channels: Sequence[int]) -> tuple[Cells, ...]:
    rank = len(shape)
    others = [d for d in range(rank) if d not in channels]
    if any(array.shape[d] > 1 for d in channels):
        if all(array.shape[d] == 1 for d in others if d != rank - 3) and array.shape[-1] > 1:
            return ()  # it tells channels apart, and heads at most
        apart = array.transpose([*others, *channels])
        columns = apart.reshape(*apart.shape[: len(others)], -1)
        known = columns > NONE
        rows = tuple(range(len(others)))
        high = columns.max(rows)
        if (high == np.where(known, columns, np.int32(2**30)).min(rows)).all() and not (
            columns == UNKNOWN
        ).any():
            return ()  # the same for all tokens that have it
        change = (columns[..., 1:] != columns[..., :-1]).any(rows)
        picks = [0, *(np.nonzero(change)[0] + 1)]
        distinct: list[Cells] = []
        for i in picks:
            column = columns[..., i]
            if not (column == NONE).all() and not any((column == d).all() for d in distinct):
                distinct.append(column)
            if len(distinct) > _MOST_PATTERNS:
                return (np.full((1, 1), UNKNOWN),)
        kept = tuple(distinct)
    else:
        kept = (array.squeeze(tuple(channels)),)
    outer = tuple(shape[d] for d in others)
    flat = (prod(outer[:-1]), outer[-1])
    return tuple(reshaped(pattern, outer, flat) for pattern in kept)


# --- are they the same tokens? -------------------------------------------------------------------


def _relation(q: _Rows, k: _Rows, v: _Rows, query: Tokens, key: Tokens) -> Relation:
    if query.shape[-2] != key.shape[-2]:
        return "cross"
    own = [source for source, lines in v.items() if _is_own(lines)]
    if not own:
        return "unknown"
    extra = [
        source
        for rows in (q, k)
        for source, lines in rows.items()
        if source not in v and source.kind != "table" and lines.varies()
    ]
    answers = {_compare(rows.get(source), v[source]) for source in own for rows in (q, k)}
    # What is beside the tokens (positions) must be alike as far as it tells tokens apart.
    answers |= {_compare(_varying(q.get(source)), _varying(k.get(source))) for source in extra}
    return next((a for a in ("cross", "unknown") if a in answers), "self")


def _varying(lines: _Lines | None) -> _Lines | None:
    if lines is None:
        return None
    return _Lines(
        lines.source, tuple(a if any(p.shape[1] > 1 for p in a) else () for a in lines.axes)
    )


def _compare(one: _Lines | None, other: _Lines | None) -> Relation:
    if one is None or other is None:
        lines = one or other
        assert lines is not None
        source = lines.source
        # Two inputs may hold the same tokens; two images, or results of two stems, do not.
        is_plain = source.kind != "stem" and not source.spatial
        return "unknown" if is_plain else "cross"
    for ours, theirs in zip(one.axes, other.axes, strict=True):
        patterns = (*ours, *theirs)
        if any((pattern == UNKNOWN).any() for pattern in patterns):
            return "unknown"
        if len(ours) != len(theirs) or not all(
            bool((a == b).all()) for a, b in zip(ours, theirs, strict=True)
        ):
            return "unknown" if one.source.kind == "opaque" else "cross"
    return "self"


# --- runs ----------------------------------------------------------------------------------------


def _runs(q: _Rows, v: _Rows) -> list[Run]:
    """The runs of the values' tokens, in order; rows of the batch may be of different sources."""
    groups = _groups_of_rows(v)
    found = [list(_runs_of(_only(q, rows), _only(v, rows))) for rows in groups]
    if not found:
        return list(_runs_of(q, v))
    first, *others = found
    shapes = [(run.size, run.grid, run.axes) for run in first]
    if any([(run.size, run.grid, run.axes) for run in runs] != shapes for runs in others):
        return [Run(sum(run.size for run in first), doubt="rows of the batch lie differently")]
    return first


def _groups_of_rows(v: _Rows) -> list[npt.NDArray[np.int64]]:
    """The rows that have the same sources, if not all have; [] if they have."""
    marks = []
    for lines in v.values():
        for pattern in (p for axis in lines.axes for p in axis if p.shape[0] > 1):
            marks.append((pattern != NONE).any(1))
    if not marks or all(mark.all() for mark in marks):
        return []
    _, groups = np.unique(np.stack(marks), axis=1, return_inverse=True)
    groups = groups.reshape(-1)
    return [np.nonzero(groups == i)[0] for i in range(int(groups.max()) + 1)]


def _only(rows: _Rows, chosen: npt.NDArray[np.int64]) -> _Rows:
    """The lines of some rows."""
    found = {}
    for source, lines in rows.items():
        axes = tuple(tuple(p[chosen] if p.shape[0] > 1 else p for p in axis) for axis in lines.axes)
        axes = tuple(tuple(p for p in axis if not (p == NONE).all()) for axis in axes)
        if any(axes):
            found[source] = _Lines(source, axes)
    return found


def _runs_of(q: _Rows, v: _Rows) -> Iterator[Run]:
    own = [lines for lines in v.values() if _is_own(lines)]
    n = max((p.shape[1] for lines in own for axis in lines.axes for p in axis), default=0)
    if n == 0:
        return
    present = {lines.source: _present(lines, n) for lines in own}
    # A source that is only where another one is, too, adds to its tokens and cuts nothing off. But
    # a lattice adds to nothing flat: a table of positions may run on over other tokens.
    flat = {lines.source for lines in own if not _is_lattice(lines)}
    adding = {
        source
        for source, mask in present.items()
        if any(
            not (mask.astype(bool) & ~present[other].astype(bool)).any()
            and mask.sum() < present[other].sum()
            and (source in flat or other not in flat)
            for other in present
        )
    }
    cuts = sorted(
        {
            *(0, n),
            *(
                int(i)
                for source, mask in present.items()
                if source not in adding
                for i in np.nonzero(np.diff(mask))[0] + 1
            ),
        }
    )
    runs: list[tuple[Run, Source | None]] = []
    for start, stop in pairwise(cuts):
        main = [
            lines for lines in own if lines.source not in adding and present[lines.source][start]
        ]
        parts = [
            lines
            for lines in own
            if lines.source in adding and present[lines.source][start:stop].any()
        ]
        runs.append(_run(start, stop, main, parts, q, v, present))
    yield from _doubted(runs, cuts, own, present, q)


def _present(lines: _Lines, n: int) -> npt.NDArray[np.int8]:
    """For each token 1 if the source stands behind it, 2 if in some rows of the batch only."""
    mask = np.zeros(n, np.int8)
    for axis in lines.axes:
        for pattern in axis:
            if pattern.shape[1] > 1:
                known = pattern != NONE
                here = np.where(known.all(0), 1, np.where(known.any(0), 2, 0))
                mask = np.maximum(mask, here).astype(np.int8)
            elif (pattern == UNKNOWN).any():
                mask = np.maximum(mask, 1).astype(np.int8)
    return mask


def _doubted(
    runs: Sequence[tuple[Run, Source | None]],
    cuts: Sequence[int],
    own: Sequence[_Lines],
    present: dict[Source, npt.NDArray[np.int8]],
    q: _Rows,
) -> Iterator[Run]:
    """The runs, in doubt where what lies beside a grid may be no global tokens.

    They are if they come from other inputs, and from none that is a lattice itself.
    """
    for i, (run, main) in enumerate(runs):
        for j, (other, _) in enumerate(runs):
            if run.grid is None or main is None or i == j or other.grid is not None:
                continue
            there = [line for line in own if present[line.source][cuts[j] : cuts[j + 1]].any()]
            if any(
                line.source is main
                or (line.source.kind == "opaque" and line.source.all_roots & main.all_roots)
                or _is_lattice(line)
                for line in there
            ) or _has_placed_ids(q, cuts, j):
                why = "tokens beside the grid are cells of a lattice, too"
                run = replace(run, grid=None, doubt=why)
        yield run


def _has_placed_ids(q: _Rows, cuts: Sequence[int], run: int) -> bool:
    """Whether position ids of some tokens of a run put them on a plane."""
    here = slice(cuts[run], cuts[run + 1])
    return any(
        _is_plane(source) and lines.varies() and bool(_present(lines, cuts[-1])[here].any())
        for source, lines in q.items()
    )


def _is_plane(source: Source) -> bool:
    """Whether a source is position ids of places, which do not merely enumerate as those of text."""
    if source.values is None:
        return False
    places = source.values.reshape(-1, source.values.shape[-1])[:, 1:3]
    rows, columns, cells = (len(part.unique(dim=0)) for part in (*places.split(1, 1), places))
    return cells > max(rows, columns)


def _is_lattice(lines: _Lines) -> bool:
    """Whether a source's tokens lie on axes of space, in whatever order."""
    source = lines.source
    if source.kind == "stem":
        return True
    if source.kind == "opaque":
        return any(r.is_image or len(r.spatial) > 1 or _is_plane(r) for r in source.all_roots)
    there = {i for i, axis in enumerate(lines.axes) if axis}
    return len(source.spatial & there) > 1 or (len(source.extents) > 3 and len(there - {0}) > 1)


def _run(
    start: int,
    stop: int,
    own: Sequence[_Lines],
    adding: Sequence[_Lines],
    q: _Rows,
    v: _Rows,
    present: dict[Source, npt.NDArray[np.int8]],
) -> tuple[Run, Source | None]:
    """What the tokens start .. stop are: cells of `own`, to some of which `adding` was added.

    Returns:
        The run, and the source whose cells show its grid.
    """
    size = stop - start
    if not own:
        return Run(size), None
    orders = [_order(lines, start, stop) for lines in own]
    # Where one source's tokens are in order, another's may count along some of its axes only.
    beside = [
        lines for lines, order in zip(own, orders, strict=True) if order.trouble and order.is_known
    ]
    if any(len(lines.source.extents) > 2 and lines.axes[0] for lines in beside):
        beside = []  # tokens with a batch, not a table of places: they have to be in order
    if beside and len(beside) < len(own):
        orders = [order for order in orders if not (order.trouble and order.is_known)]
    lattices = [lines for lines in adding if _is_lattice(lines)]
    if len(lattices) > 1 and len({present[lines.source].tobytes() for lines in lattices}) > 1:
        return Run(size, doubt="the tokens come from several lattices", has_tokens=True), None
    for lines in adding:
        there = start + np.nonzero(present[lines.source][start:stop])[0]
        part = _order(lines, int(there[0]), int(there[-1]) + 1)
        if part.trouble:
            orders.append(part)
    for order in orders:
        if order.trouble:
            known, unknown = (order.trouble, "") if order.is_known else ("", order.trouble)
            return Run(size, disorder=known, doubt=unknown, has_tokens=True), None
    best = max(
        orders, key=lambda o: (o.grid is not None, len(o.axes), -int(present[o.source].sum()))
    )
    if not best.axes and size > 1:
        return Run(size, disorder="all of them are one token", has_tokens=True), None
    run = Run(size, best.grid, best.lengths, f"graph: {best.source.name}", has_tokens=True)
    own = [*own, *adding]
    everything = [lines for lines in q.values() if lines.varies()]
    sources = {lines.source for lines in own}
    extra = [lines for lines in everything if lines.source not in sources]
    doubt = _several_lattices(orders) or _reordered(own, extra) or _summed_away(best, v)
    if run.grid is not None and len(run.grid) > MAX_AXES:
        doubt = doubt or f"the tokens lie on {len(run.grid)} axes, {times(run.grid)}"
    if doubt:
        return replace(run, grid=None, doubt=doubt), None
    if run.grid is None and len(run.axes) == 1:
        run = _shown(run, best, start, stop, everything)
    elif run.grid is not None:
        run = _unless_ids_differ(run, start, stop, everything)
    lattice = run.grid or run.axes
    for lines in (*beside, *extra):
        if lines.source.kind != "table" and not _fits(lines, lattice, start, stop):
            doubt = f"`{lines.source.name}` does not lie in the order of the tokens"
            return replace(run, grid=None, axes=(), doubt=doubt), None
    return run, best.source


def _several_lattices(orders: Sequence[_Order]) -> str:
    """What is wrong if sources of the same tokens lie on different lattices."""
    lattices = {o.lengths for o in orders if len(o.lengths) > 1}
    return f"the tokens are used as {' and as '.join(sorted(map(times, lattices)))}" * (
        len(lattices) > 1
    )


def _summed_away(order: _Order, v: _Rows) -> str:
    """What is wrong if a mere input shows the order, and another lattice was summed over.

    The tokens may be mixtures of the latter (a product along them), and the input their positions.
    """
    lost = (
        source.name
        for source, lines in v.items()
        if source.kind in ("input", "stem")
        and (source.is_image or len(source.spatial) > 1)
        and not lines.stands_behind()
    )
    name = next(lost, "") if order.source.kind == "input" else ""
    return f"the tokens may be mixtures of those of `{name}`" if name else ""


def _reordered(own: Sequence[_Lines], extra: Sequence[_Lines]) -> str:
    """What is wrong if an operator that is not understood may have moved some of the tokens."""
    roots = frozenset(root for lines in own for root in lines.source.all_roots)
    for lines in (*own, *extra):
        is_own = any(lines is other for other in own)
        if lines.source.kind == "opaque" and (
            _mixes(lines, own, roots) or (is_own and len(own) > 1 and _is_lattice(lines))
        ):
            return f"`{lines.source.name}` may have put tokens in another order"
    return ""


def _unless_ids_differ(run: Run, start: int, stop: int, beside: Sequence[_Lines]) -> Run:
    """The run, without its grid if position ids of the same tokens show another."""
    for lines in beside:
        if _is_partly_placed(lines, start, stop):
            return replace(run, grid=None, doubt="position ids are of other tokens, too")
        if lines.source.values is not None and _covers(lines, start, stop):
            grid = grid_from_ids(lines.source.values)
            if grid is None or [n for n in run.grid or () if n > 1] != [n for n in grid if n > 1]:
                why = why_no_grid(lines.source.values)
                return replace(run, grid=None, doubt=why, ids=lines.source.node)
    return run


def _mixes(lines: _Lines, own: Sequence[_Lines], roots: frozenset[Source]) -> bool:
    others = frozenset(
        root for other in own if other is not lines for root in other.source.all_roots
    )
    is_own = any(lines is other for other in own)
    return bool(lines.source.all_roots & (others if is_own else roots))


# --- the order of one source's tokens ------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """How the tokens of one source lie in a run.

    Attributes:
        source: the source.
        axes, lengths: its axes that vary in the run, slowest first, and how many cells of each.
        grid: the lengths, with those of size 1 put in, if the axes are known to be of space.
        trouble: why there is no such order.
        is_known: the order is known, and is another one.
    """

    source: Source
    axes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    grid: tuple[int, ...] | None = None
    trouble: str = ""
    is_known: bool = False


def _order(lines: _Lines, start: int, stop: int) -> _Order:
    source = lines.source
    vectors: dict[int, npt.NDArray[np.int64]] = {}
    for i, axis in enumerate(lines.axes):
        for pattern in axis:
            part = pattern[:, start:stop] if pattern.shape[1] > 1 else pattern
            if (part == UNKNOWN).any():
                return _Order(source, trouble="some tokens are mixtures of others")
            if (part == NONE).any() and not (part == NONE).all():
                return _Order(
                    source, trouble="special tokens lie between them, or other ones in each row"
                )
            vector = _relative(part, stop - start)
            if vector is None:
                return _Order(
                    source, trouble="their order differs between rows of the batch", is_known=True
                )
            if not vector.any():
                continue
            if i in vectors and not (vectors[i] == vector).all():
                return _Order(source, trouble="some tokens are mixtures of others")
            vectors[i] = vector
    if not vectors and stop - start > 1:
        return _Order(source)  # the same for all of them: a timestep, pooled text
    raster = _raster(list(vectors.values()), stop - start)
    if raster is None:
        return _Order(
            source,
            trouble="they are not in raster order: moved, left out or repeated",
            is_known=True,
        )
    axes = tuple(list(vectors)[i] for i, _ in raster)
    lengths = tuple(length for _, length in raster)
    return _Order(source, axes, lengths, _grid(lines, axes, lengths))


def _relative(part: Cells, n: int) -> npt.NDArray[np.int64] | None:
    """Coordinates from the first token's on, if they are the same in every row."""
    local = part.astype(np.int64) - part[:, :1]
    if not (local == local[:1]).all():
        return None
    return np.broadcast_to(local[0], (n,))


def _raster(vectors: Sequence[npt.NDArray[np.int64]], n: int) -> list[tuple[int, int]] | None:
    """Which vector is which axis of a raster of n cells, slowest first, and its length."""
    if not vectors:
        return [] if n == 1 else None
    periods = [int(np.argmax(vector != 0)) for vector in vectors]
    order = sorted(range(len(vectors)), key=lambda i: -periods[i])
    inner = n
    found = []
    index = np.arange(n)
    for i in order:
        period = periods[i]
        if inner % period:
            return None
        length = inner // period
        step = int(vectors[i][period])
        if step <= 0 or not (vectors[i] == step * (index // period % length)).all():
            return None
        found.append((i, length))
        inner = period
    return found if inner == 1 else None


def _grid(lines: _Lines, axes: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...] | None:
    """The lengths if the axes are known to be axes of space and time, else None.

    They are if an operator ran along each; if they are all those of an input [B, C, axes...]; and
    the slowest one beside two such is time, unless it is the batch's dimension.
    """
    source = lines.source
    if not axes or source.kind == "opaque":
        return None
    rank = len(source.extents)
    # The first dimension of an input is the batch's: other samples, whatever runs along it.
    space = source.spatial - ({0} if rank > 2 else set())
    if source.is_image and not lines.axes[1] and all(lines.axes[2:]):
        space |= set(range(2, rank))
    known = space & set(axes)
    single = sorted(
        (i for i in _single(lines) if i in space or (i > 0 and len(known) > 1)),
        key=lambda i: (i not in space, i),
    )[: max(rank - 2 - len(axes), 0)]
    if len(axes) + len(single) < 2:
        return None
    rest = set(axes) - space
    if rest and not (rest == {axes[0]} and axes[0] > 0 and len(known) > 1):
        return None
    result = list(zip(axes, lengths, strict=True))
    for i in sorted(single):
        at = next((place for place, (axis, _) in enumerate(result) if axis > i), len(result))
        result.insert(at, (i, 1))
    return tuple(length for _, length in result)


def _single(lines: _Lines) -> set[int]:
    """Axes of size 1, but for those that were summed over."""
    return {i for i, n in enumerate(lines.source.extents) if n == 1 and lines.axes[i]}


# --- grids of a flat sequence --------------------------------------------------------------------


def _shown(run: Run, order: _Order, start: int, stop: int, beside: Sequence[_Lines]) -> Run:
    """The run with the grid that something beside its tokens shows."""
    shown: dict[tuple[int, ...], str] = {}
    ids: fx.Node | None = None
    for lines in beside:
        if _is_partly_placed(lines, start, stop):
            return replace(run, doubt="position ids are of other tokens, too")
        if lines.source.values is not None and _covers(lines, start, stop):
            ids = lines.source.node
            grid = grid_from_ids(lines.source.values)
            if grid is None:
                return replace(run, doubt=why_no_grid(lines.source.values), ids=ids)
            assert ids is not None
            shown[grid] = f"values of {name_of(ids)}"
    (axis,) = order.axes
    own = next((lines for lines in beside if lines.source is order.source), None)
    # Of a lattice of several axes the tokens are a line.
    is_flat = own is not None and not any(a for i, a in enumerate(own.axes) if i not in (0, axis))
    if not shown and is_flat and order.source.kind != "opaque":
        grid = _grid_of_tables(beside, start, stop)
        if grid is not None:
            shown[grid] = "graph: a table of positions"
        if run.size == order.source.extents[axis]:
            for split in order.source.splits.get(axis, ()):
                shown.setdefault(split, "graph: reshape")
    if len(shown) > 1:
        both = " and as ".join(sorted(map(times, shown)))
        return replace(run, doubt=f"the tokens are used as {both}", ids=ids)
    for grid, why in shown.items():
        return replace(run, grid=grid, why=why, ids=ids)
    return replace(run, ids=ids)


def _is_partly_placed(lines: _Lines, start: int, stop: int) -> bool:
    """Whether position ids of places stand beside a run, but are not its own from end to end."""
    if not _is_plane(lines.source) or _covers(lines, start, stop):
        return False
    return any(
        (p[:, start:stop] > NONE).any() for axis in lines.axes for p in axis if p.shape[1] > 1
    )


def _covers(lines: _Lines, start: int, stop: int) -> bool:
    """Whether the run has all rows of position ids, in their order."""
    axis = len(lines.source.extents) - 2
    patterns = lines.axes[axis]
    if len(patterns) != 1 or patterns[0].shape[1] == 1:
        return False
    whole = np.arange(lines.source.extents[axis])
    part = patterns[0][:, start:stop]
    return part.shape[1] == len(whole) and bool((part == whole).all())


def _grid_of_tables(beside: Sequence[_Lines], start: int, stop: int) -> tuple[int, ...] | None:
    """The grid that counted positions show: rows in one table, columns in another."""
    n = stop - start
    vectors: list[npt.NDArray[np.int64]] = []
    for pattern in _positions(beside, start, stop):
        vector = _relative(pattern, n)
        if vector is None or not vector.any() or (np.diff(vector) == vector[1]).all():
            continue
        if not any((vector == other).all() for other in vectors):
            vectors.append(vector)
    raster = _raster(vectors, n) if 2 <= len(vectors) <= MAX_AXES else None
    return None if raster is None else tuple(length for _, length in raster)


def _positions(beside: Sequence[_Lines], start: int, stop: int) -> Iterator[Cells]:
    """The rows of tables that stand beside the tokens of a run, one pattern after another.

    A table may end where another begins (positions below zero, and from zero on): then the rows of
    the first count up to zero.
    """
    partial: list[tuple[Cells, int, int]] = []
    for lines in beside:
        if lines.source.kind not in ("table", "input") or lines.source.values is not None:
            continue
        if sum(any(map(_counts, axis)) for axis in lines.axes) > 1:
            continue  # a lattice of its own, not a table of positions
        for i, axis in enumerate(lines.axes):
            for pattern in axis:
                part = pattern[:, start:stop] if pattern.shape[1] > 1 else pattern
                if (part > NONE).all():
                    yield part
                elif not (part == UNKNOWN).any() and (part > NONE).any():
                    partial.append((part, i, lines.source.extents[i]))
    for first, i, extent in partial:
        for second, j, _ in partial:
            apart = first.shape == second.shape and ((first > NONE) != (second > NONE)).all()
            if apart and i == j and first.max() == extent - 1 and second[second > NONE].min() == 0:
                yield np.where(first > NONE, first - np.int32(extent), second)


def _counts(pattern: Cells) -> bool:
    known = pattern[pattern > NONE]
    return bool((known != known[:1]).any())


def _fits(lines: _Lines, grid: Sequence[int], start: int, stop: int) -> bool:
    """Whether a source beside the tokens counts along the grid's axes, or along some as one."""
    n = stop - start
    index = np.arange(n)
    periods = [prod(grid[i:]) for i in range(len(grid) + 1)]
    for axis in lines.axes:
        for pattern in axis:
            if pattern.shape[1] == 1:
                continue
            part = pattern[:, start:stop]
            if (part == NONE).all():
                continue
            if (part <= NONE).any():
                return False
            vector = _relative(part, n)
            if vector is None:
                return False
            if not vector.any():
                continue
            period = int(np.argmax(vector != 0))
            step = int(vector[period])
            wide = [p for p in periods if p % period == 0 and p > period]
            if (
                step <= 0
                or period not in periods
                or not any((vector == step * (index // period % (p // period))).all() for p in wide)
            ):
                return False
    return True


def times(grid: Sequence[object]) -> str:
    """Sizes as text: 30×48×80."""
    return "×".join(map(str, grid))


__all__ = ["Reading", "Relation", "Run", "read", "times"]
