"""Grids side by side in one sequence: whether two of them may be parts of one.

That one image lies in several runs (of tokens of different origins, or with text in between) shows
where ids or a table place all of it together, and where two runs are cells of one lattice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gna_compile.graph.tokens.beside import grid_of_tables
from gna_compile.graph.tokens.cells import Source
from gna_compile.graph.tokens.position_ids import ReadIds, images_in, pieces_together
from gna_compile.graph.tokens.rows import Rows
from gna_compile.graph.tokens.run import Run

Found = tuple[Run, Source | None]
"""A run, and the source whose cells it is."""


def grids_apart(runs: Sequence[Found], cuts: Sequence[int], q: Rows, turning: Rows) -> list[Found]:
    """The runs, in doubt where two grids may be parts of one.

    Args:
        runs: in the order of the tokens.
        cuts: where each begins, and the number of tokens.
        q: the lines of the queries.
        turning: those among them that turn queries and keys alone, such as tables of positions.
    """
    return _one_lattice_once(_with_joined_ids(runs, q), cuts, turning)


def _with_joined_ids(runs: Sequence[Found], q: Rows) -> list[Found]:
    """The runs, where ids that place tokens on images do so together, too, and not only one by one.

    One image may lie in several runs: of tokens of different origins, or with text in between.
    """
    values = {source.node: source.values for source in q if source.values is not None}
    reads = list(
        dict.fromkeys(run.read for run, _ in runs if run.read and images_in(run.read.pieces))
    )
    if len(reads) < 2:
        return list(runs)
    tables = tuple(table for read in reads for table in read.tables)
    both = ReadIds(tables, tuple(piece for read in reads for piece in read.pieces))
    shown = pieces_together([(values[node], rows) for node, rows in tables])
    agree = images_in(shown) == images_in(both.pieces)
    both = replace(both, pieces=shown)
    found = []
    for run, main in runs:
        if run.read in reads and agree:
            run = replace(run, read=both)
        elif run.read in reads:
            doubt = run.doubt or "one image may lie in tokens of several origins"
            run = replace(run, grid=None, read=None, doubt=doubt)
        found.append((run, main))
    return found


def _one_lattice_once(runs: Sequence[Found], cuts: Sequence[int], turning: Rows) -> list[Found]:
    """The runs, in doubt where two grids may be parts of one.

    They may if they are of one lattice, unless each is a whole slice of it (the frames of a video
    with special tokens between them), or if one table places both on one raster.
    """
    found = list(runs)
    beside = [*turning.values()]
    for i, (before, main) in enumerate(runs):
        for j, (after, other) in enumerate(runs[i + 1 :], i + 1):
            if not (before.grid and after.grid and main and other) or before.read or after.read:
                continue
            doubt = ""
            if main.whole is other.whole and (j == i + 1 or not _are_slices(main, before, after)):
                doubt = f"cells of `{main.name}` are two grids"
            elif j == i + 1 and grid_of_tables(beside, cuts[i], cuts[j + 1]) is not None:
                doubt = "a table of positions places both grids on one"
            if doubt:
                for place in (i, j):
                    run, source = found[place]
                    found[place] = replace(run, grid=None, doubt=run.doubt or doubt), source
    return found


def _are_slices(source: Source, *runs: Run) -> bool:
    """Whether each run has the whole of the source's last axes of space, as a frame of a video has."""
    space = sorted(source.spatial - {source.channels})
    return all(
        len(space) > len(run.axes)
        and run.axes == tuple(source.extents[axis] for axis in space[-len(run.axes) :])
        for run in runs
    )
