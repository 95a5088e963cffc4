"""What the operands of one attention are, at one point of the graph's sizes.

`relation` says whether queries, keys and values are the same tokens, `runs` what the tokens are: a
list of runs, each from other sources, and for each whether it is the raster of a lattice in order.
Nothing is concluded from sizes: only coordinates count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from gna_compile.graph.tokens.beside import (
    MAX_AXES,
    NO_IMAGE,
    fits,
    is_partly_placed,
    on_a_plane,
    read_ids,
    shown_beside,
)
from gna_compile.graph.tokens.cells import NONE, Source, Tokens
from gna_compile.graph.tokens.order import Order, order_of
from gna_compile.graph.tokens.position_ids import images_in
from gna_compile.graph.tokens.rows import (
    Lines,
    Relation,
    Rows,
    heads_are_rows,
    is_lattice,
    is_own,
    is_plane,
    presence,
    relation_of,
    rows_of,
)
from gna_compile.graph.tokens.run import Run, times
from gna_compile.graph.tokens.side_by_side import grids_apart

__all__ = ["Reading", "Relation", "Run", "read", "times"]


@dataclass(frozen=True)
class Reading:
    """What is known of one attention."""

    relation: Relation
    runs: tuple[Run, ...] = ()
    has_heads: bool = False
    """Whether dimension -3 is proven to tell heads apart, and all of them."""


def read(query: Tokens, key: Tokens, value: Tokens) -> Reading:
    """Reads the operands [.., heads, tokens, head_dim] of an attention."""
    if any(size < 1 for tokens in (query, key, value) for size in tokens.shape):
        return Reading("unknown")
    # A dimension of heads may as well hold frames or windows: then it is part of the batch.
    are_rows = any(map(heads_are_rows, (query, key, value)))
    if are_rows and len({tokens.shape[:-2] for tokens in (query, key, value)}) > 1:
        return Reading("unknown")
    q, k, v = (rows_of(tokens, are_rows) for tokens in (query, key, value))
    relation = relation_of(q, k, v, query, key)
    if relation == "cross":
        return Reading(relation)
    has_heads = len(query.shape) == 4 and not are_rows and _are_samples(v, value.shape[0])
    return Reading(relation, tuple(_runs(q, v)), has_heads)


def _are_samples(v: Rows, count: int) -> bool:
    """Whether no two rows of the batch are the same tokens, as they are where heads are folded into it."""
    if count == 1:
        return True
    patterns = [
        np.broadcast_to(pattern.reshape(pattern.shape[0], -1)[:, :1], (count, 1))
        for lines in v.values()
        if is_own(lines)
        for axis in lines.axes
        for pattern in axis
        if pattern.shape[0] in (1, count)
    ]
    return bool(patterns) and len(np.unique(np.hstack(patterns), axis=0)) == count


def _runs(q: Rows, v: Rows) -> list[Run]:
    """The runs of the values' tokens, in order; rows of the batch may be of different sources."""
    groups = _groups_of_rows(v)
    found = [list(_runs_of(_only(q, rows), _only(v, rows))) for rows in groups]
    if not found:
        return list(_runs_of(q, v))
    first, *others = found
    shapes = [(run.size, run.grid, run.axes) for run in first]
    if any([(run.size, run.grid, run.axes) for run in runs] != shapes for runs in others):
        return [Run(sum(run.size for run in first), doubt="rows of the batch lie differently")]
    return [_with_reads(run, [runs[i] for runs in others]) for i, run in enumerate(first)]


def _with_reads(run: Run, others: Sequence[Run]) -> Run:
    """A run with what ids show of the same tokens in other rows of the batch."""
    reads = [read for other in others for read in (other.read, *other.also) if read is not None]
    return replace(run, also=(*run.also, *reads))


def _groups_of_rows(v: Rows) -> list[npt.NDArray[np.int64]]:
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


def _only(rows: Rows, chosen: npt.NDArray[np.int64]) -> Rows:
    """The lines of some rows."""
    found = {}
    for source, lines in rows.items():
        axes = tuple(tuple(p[chosen] if p.shape[0] > 1 else p for p in axis) for axis in lines.axes)
        axes = tuple(tuple(p for p in axis if not (p == NONE).all()) for axis in axes)
        if any(axes):
            found[source] = replace(lines, axes=axes)
    return found


def _runs_of(q: Rows, v: Rows) -> Iterator[Run]:
    own = [lines for lines in v.values() if is_own(lines)]
    n = max((p.shape[1] for lines in own for axis in lines.axes for p in axis), default=0)
    if n == 0:
        return
    present = {lines.source: presence(lines, n) for lines in own}
    # A source that is only where another one is, too, adds to its tokens and cuts nothing off. But
    # a lattice adds to nothing flat: a table of positions may run on over other tokens.
    flat = {lines.source for lines in own if not is_lattice(lines)}
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
        found, source = _run(start, stop, main, parts, q, v, present)
        runs += [(run, source) for run in found]
    cuts = [0, *accumulate(run.size for run, _ in runs)]
    # What turns queries and keys alone says where the tokens are.
    turning = {source: lines for source, lines in q.items() if lines.varies() and source not in v}
    yield from _doubted(runs, cuts, own, present, q, turning)


def _doubted(
    runs: Sequence[tuple[Run, Source | None]],
    cuts: Sequence[int],
    own: Sequence[Lines],
    present: dict[Source, npt.NDArray[np.int8]],
    q: Rows,
    turning: Rows,
) -> Iterator[Run]:
    """The runs, in doubt where what lies beside a grid may be no global tokens.

    They are if they come from other inputs, and from none that is a lattice itself. A grid in doubt
    is beside the other grids, too: then none is left.
    """
    why = "tokens beside the grid are cells of a lattice, too"
    side_by_side = grids_apart(runs, cuts, q, turning)
    found = [run for run, _ in side_by_side]
    for i, (run, main) in enumerate(side_by_side):
        for j, (other, _) in enumerate(side_by_side):
            if run.grid is None or main is None or i == j or other.grid is not None:
                continue
            if run.read is not None and run.read is other.read:
                continue
            there = [line for line in own if present[line.source][cuts[j] : cuts[j + 1]].any()]
            if any(
                line.source.whole is main.whole
                or (line.source.kind == "opaque" and line.source.all_roots & main.all_roots)
                or is_lattice(line)
                or _goes_back(line, cuts[j], cuts[j + 1])
                for line in there
            ) or _is_placed(q, turning, cuts, j, other):
                found[i] = replace(run, grid=None, doubt=why)
    is_lost = any(
        before.grid and not run.grid for run, (before, _) in zip(found, runs, strict=True)
    )
    for run in found:
        yield replace(run, grid=None, doubt=why) if run.grid and is_lost else run


def _goes_back(lines: Lines, start: int, stop: int) -> bool:
    """Whether places in a flat sequence do not rise along the run: it was viewed as a plane."""
    parts = (p[:, start:stop] for axis in lines.axes for p in axis if p.shape[1] > 1)
    return any(bool(((np.diff(p) < 0) & (p[:, 1:] > NONE)).any()) for p in parts)


def _is_placed(q: Rows, turning: Rows, cuts: Sequence[int], place: int, run: Run) -> bool:
    """Whether position ids or tables put some tokens of a run on a plane."""
    here = slice(cuts[place], cuts[place + 1])
    if on_a_plane([*turning.values()], here.start, here.stop):
        return True
    return run.read is None and any(
        is_plane(source) and lines.varies() and bool(presence(lines, cuts[-1])[here].any())
        for source, lines in q.items()
    )


def _run(
    start: int,
    stop: int,
    own: Sequence[Lines],
    adding: Sequence[Lines],
    q: Rows,
    v: Rows,
    present: dict[Source, npt.NDArray[np.int8]],
) -> tuple[tuple[Run, ...], Source | None]:
    """What the tokens start .. stop are: cells of `own`, to some of which `adding` was added.

    Returns:
        One run, or several if position ids tell them apart; and the source whose cells they are.
    """
    size = stop - start
    if not own:
        return (Run(size),), None
    orders = [order_of(lines, start, stop) for lines in own]
    # Where one source's tokens are in order, another's may count along some of its axes only.
    beside = [
        lines for lines, order in zip(own, orders, strict=True) if order.trouble and order.is_known
    ]
    if any(len(lines.source.extents) > 2 and lines.axes[0] for lines in beside):
        beside = []  # tokens with a batch, not a table of places: they have to be in order
    if beside and len(beside) < len(own):
        orders = [order for order in orders if not (order.trouble and order.is_known)]
    lattices = [lines for lines in adding if is_lattice(lines)]
    if len(lattices) > 1 and len({present[lines.source].tobytes() for lines in lattices}) > 1:
        return (Run(size, doubt="the tokens come from several lattices", has_tokens=True),), None
    added: list[tuple[Order, int]] = []
    for lines in adding:
        there = start + np.nonzero(present[lines.source][start:stop])[0]
        part = order_of(lines, int(there[0]), int(there[-1]) + 1)
        if part.trouble:
            orders.append(part)
        elif is_lattice(lines):
            added.append((part, int(there[0]) - start))
    for order in orders:
        if order.trouble:
            known, unknown = (order.trouble, "") if order.is_known else ("", order.trouble)
            return (Run(size, disorder=known, doubt=unknown, has_tokens=True),), None
    best = max(
        orders, key=lambda o: (o.grid is not None, len(o.axes), -int(present[o.source].sum()))
    )
    if not best.axes and size > 1:
        return (Run(size, disorder="all of them are one token", has_tokens=True),), None
    run = Run(size, best.grid, best.lengths, f"graph: {best.source.name}", has_tokens=True)
    own = [*own, *adding]
    everything = [lines for lines in q.values() if lines.varies()]
    sources = {lines.source for lines in own}
    extra = [lines for lines in everything if lines.source not in sources]
    doubt = (
        _several_lattices(orders)
        or _added_elsewhere(best, added)
        or _reordered(own, extra)
        or _summed_away(best, own, v, start, stop)
        or (_several_origins(own, start, stop, present) if run.grid is not None else "")
    )
    if run.grid is not None and len(run.grid) > MAX_AXES:
        doubt = doubt or f"the tokens lie on {len(run.grid)} axes, {times(run.grid)}"
    if doubt:
        return (replace(run, grid=None, doubt=doubt),), None
    if run.grid is None and len(run.axes) == 1:
        if v[best.source].mixed:
            doubt = f"the tokens lie along one axis of `{best.source.name}` and mix another"
            return (replace(run, doubt=doubt),), None
        # What was added to the tokens tells them apart; what turns queries and keys alone, where
        # they are.
        turning = [
            lines for lines in everything if lines.source.kind != "table" or lines.source not in v
        ]
        runs = shown_beside(run, best, start, stop, turning)
    elif run.grid is not None:
        runs = (_unless_ids_differ(run, start, stop, everything),)
    else:
        runs = (run,)
    doubt = _at_odds(runs, start, own, [*beside, *extra], present)
    if doubt:
        return (replace(run, grid=None, axes=(), doubt=doubt),), None
    return runs, best.source


def _at_odds(
    runs: Sequence[Run],
    start: int,
    own: Sequence[Lines],
    others: Sequence[Lines],
    present: dict[Source, npt.NDArray[np.int8]],
) -> str:
    """What is wrong if sources of the tokens do not lie as the runs that were found from `start` on."""
    for run in runs:
        stop = start + run.size
        if run.read is not None and run.grid and _is_cut(own, start, stop, present):
            return "position ids place tokens of several origins on one image"
        for lines in others:
            if lines.source.kind != "table" and not fits(lines, run.grid or run.axes, start, stop):
                return f"`{lines.source.name}` does not lie in the order of the tokens"
        start = stop
    return ""


def _several_origins(
    own: Sequence[Lines], start: int, stop: int, present: dict[Source, npt.NDArray[np.int8]]
) -> str:
    """What is wrong if a sequence is behind some cells of a grid only: text that was convolved along."""
    for lines in own:
        there = present[lines.source][start:stop] > 0
        if is_lattice(lines) or there.all() or not there.any():
            continue
        here = (p[:, start:stop][:, there] for axis in lines.axes for p in axis if p.shape[1] > 1)
        if any(bool((part != part[:, :1]).any()) for part in here):
            return f"only some of the tokens come from `{lines.source.name}`"
    return ""


def _is_cut(
    own: Sequence[Lines], start: int, stop: int, present: dict[Source, npt.NDArray[np.int8]]
) -> bool:
    """Whether a source stands behind some tokens of a piece only."""
    parts = (present[lines.source][start:stop] for lines in own)
    return any(bool((part != part[0]).any()) for part in parts)


def _several_lattices(orders: Sequence[Order]) -> str:
    """What is wrong if sources of the same tokens lie on different lattices."""
    lattices = {o.lengths for o in orders if len(o.lengths) > 1}
    return f"the tokens are used as {' and as '.join(sorted(map(times, lattices)))}" * (
        len(lattices) > 1
    )


def _added_elsewhere(order: Order, added: Sequence[tuple[Order, int]]) -> str:
    """What is wrong if a lattice was added to some tokens only, and not to whole slices of theirs.

    Args:
        order: of the tokens.
        added: the order of each lattice, and the first of the tokens that it was added to.
    """
    for part, first in added:
        ours = order.lengths[-len(part.lengths) :] if part.lengths else ()
        inner = part.lengths[1:] or part.lengths  # frames of a video, or one whole row
        are_slices = part.lengths and part.lengths[0] <= ours[0] and inner == ours[-len(inner) :]
        if not are_slices or first % prod(inner):
            return f"cells of `{part.source.name}` were added to some of the tokens"
    return ""


def _summed_away(order: Order, own: Sequence[Lines], v: Rows, start: int, stop: int) -> str:
    """What is wrong if the order may be that of positions, and the tokens were summed over.

    They may be mixtures (a product along them, with weights or with what was made of themselves)
    to which the positions were added.
    """
    weighed = frozenset(
        root for lines in own if lines.source.kind == "opaque" for root in lines.source.all_roots
    )
    is_input = order.source.kind == "input"
    for source, lines in v.items():
        if source.kind not in ("input", "stem") or source is order.source:
            continue
        here = [p[:, start:stop] for axis in lines.axes for p in axis if p.shape[1] > 1]
        if any(bool((p != p[:, :1]).any()) for p in here):
            continue  # it tells the tokens apart
        if here and all(bool((p == NONE).all()) for p in here):
            continue  # of other tokens
        is_mixed = source.is_mixed or bool(source.all_roots & weighed)
        if is_mixed or (is_input and (source.is_image or len(source.spatial) > 1)):
            return f"the tokens may be mixtures of those of `{source.name}`"
    return ""


def _reordered(own: Sequence[Lines], extra: Sequence[Lines]) -> str:
    """What is wrong if an operator that is not understood may have moved some of the tokens."""
    roots = frozenset(root for lines in own for root in lines.source.all_roots)
    for lines in (*own, *extra):
        is_own = any(lines is other for other in own)
        if lines.source.kind == "opaque" and (
            _mixes(lines, own, roots) or (is_own and len(own) > 1 and is_lattice(lines))
        ):
            return f"`{lines.source.name}` may have put tokens in another order"
    return ""


def _unless_ids_differ(run: Run, start: int, stop: int, beside: Sequence[Lines]) -> Run:
    """The run, without its grid if position ids of the same tokens show another.

    Where it has three axes, its frames may be told apart by ids as images are.
    """
    for lines in beside:
        if is_partly_placed(lines, start, stop):
            return replace(run, grid=None, doubt="position ids are of other tokens, too")
        read = read_ids(lines, start, stop)
        if read is not None:
            images = images_in(read.pieces)
            grid = (len(images), *images[0]) if len(set(images)) == 1 else ()
            ours, theirs = ([n for n in lengths if n > 1] for lengths in (run.grid or (), grid))
            if ours != theirs or len(images) < len(read.pieces):
                return replace(run, grid=None, doubt=NO_IMAGE, ids=lines.source.node)
    return run


def _mixes(lines: Lines, own: Sequence[Lines], roots: frozenset[Source]) -> bool:
    others = frozenset(
        root for other in own if other is not lines for root in other.source.all_roots
    )
    is_own = any(lines is other for other in own)
    return bool(lines.source.all_roots & (others if is_own else roots))
