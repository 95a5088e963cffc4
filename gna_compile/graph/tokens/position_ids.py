"""Position ids of packed latents: a tensor whose rows are the coordinates of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from gna_compile import _torch

COLUMNS = (3, 4)  # t, h, w, and l (place in a sequence) in newer models


def may_be_ids(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor may hold position ids: by its name and its shape [.., tokens, 3 or 4]."""
    return "ids" in name and value.ndim in (2, 3) and value.shape[-1] in COLUMNS


def name_of(node: fx.Node) -> str:
    """The model's own name of an ids input: `img_ids` of Dynamo's `l_kwargs_img_ids_`."""
    found = re.search(r"(?:[a-z]+_)?ids", node.name)
    return found.group() if found else node.name


Piece = int | tuple[int, int]
"""A number of tokens off any image, or height and width of one."""


@dataclass(frozen=True)
class ReadIds:
    """What position ids showed of neighboring tokens.

    Attributes:
        tables: the graph's inputs that are their ids one after another, and of each the rows from
            the first to before the last; None for all of them, however many.
        pieces: what `pieces_of` makes of them together; () if that is text of any length.
    """

    tables: tuple[tuple[fx.Node, tuple[int, int] | None], ...]
    pieces: tuple[Any, ...]


def pieces_of(ids: torch.Tensor) -> tuple[Piece, ...]:
    """What tokens with these position ids are, in order: images, and tokens off any image.

    Columns are (t, h, w) or (t, h, w, l). t, and l where there is one, tell images apart (a model for
    image editing gives its reference images other values), so they are no axes: a new image begins
    where they change.

        t   0 0 0 | 0 0 0 0 0 0 | 1 1 1 1
        h   0 0 0 | 0 0 0 1 1 1 | 0 0 1 1     three tokens of text, each with an l of its own,
        w   0 0 0 | 0 1 2 0 1 2 | 0 1 0 1     an image of 2 x 3, then one of 2 x 2
        l   1 2 3 | 0 0 0 0 0 0 | 0 0 0 0

    Every value is checked: within an image h and w must count up in equal steps in raster order,
    from any first value. Tokens that count along one line, or not at all, are off any image.

    Args:
        ids: coordinates [tokens, columns], or [batch, tokens, columns] with equal rows for the
            whole batch. Copied to the host once.

    Returns:
        The pieces, neighboring ones off images as one; () if some tokens are anything else, or if
        two images have the same t and l.
    """
    table = _table_of(ids)
    if table is None:
        return ()
    apart = table[:, [0, *range(3, table.shape[1])]]
    starts = (apart[1:] != apart[:-1]).any(1).nonzero().flatten() + 1
    pieces: list[Piece] = []
    images: set[tuple[float, ...]] = set()
    is_off = torch.ones(len(table), dtype=torch.bool)
    for start, stop in pairwise([0, *starts.tolist(), len(table)]):
        if stop - start > 1:
            rows, columns = table[start:stop, 1], table[start:stop, 2]
            image = _raster(rows, columns)
            if image is not None and min(image) > 1:
                name = tuple(apart[start].tolist())
                if name in images:
                    return ()  # two parts of one image, it may be
                images.add(name)
                pieces.append(image)
                is_off[start:stop] = False
                continue
            if not (_has_equal_steps(rows) and _has_equal_steps(columns)):
                return ()
        if pieces and isinstance(pieces[-1], int):
            pieces[-1] += stop - start
        else:
            pieces.append(stop - start)
    return () if is_off.any() and _is_plane(table[is_off, 1:3]) else tuple(pieces)


Table = tuple[torch.Tensor, tuple[int, int] | None]
"""Position ids, and which rows of them; None for all."""


def pieces_together(tables: Sequence[Table]) -> tuple[Piece, ...]:
    """As `pieces_of`, of rows of tables one after another; () if the rows cut an image of a table.

    A line of an image is no text, and its half is no image.
    """
    parts = []
    for table, rows in tables:
        if rows is not None:
            if part_of(pieces_of(table), *rows) is None:
                return ()
            table = table[..., slice(*rows), :]
        parts.append(table)
    if len(parts) == 1:
        return pieces_of(parts[0])
    alike = len({(part.ndim, part.shape[-1], *part.shape[:-2]) for part in parts}) == 1
    return pieces_of(torch.cat(parts, -2)) if alike else ()


def _table_of(ids: torch.Tensor) -> torch.Tensor | None:
    """The coordinates [tokens, columns] on the host, if they can be read and are one for a batch."""
    unreadable = isinstance(ids, _torch.FakeTensor) or ids.is_meta
    if unreadable or ids.ndim not in (2, 3) or not ids.numel() or ids.shape[-1] not in COLUMNS:
        return None
    table = ids.detach().to("cpu", torch.float64)
    if table.ndim == 3:
        if not bool((table == table[:1]).all()):
            return None
        table = table[0]
    return table


def are_places(ids: torch.Tensor) -> bool:
    """Whether position ids tell tokens apart on a plane, and do not merely enumerate them."""
    return _is_plane(ids.detach().to(torch.float64).reshape(-1, ids.shape[-1])[:, 1:3])


def _is_plane(places: torch.Tensor) -> bool:
    rows, columns, cells = (len(part.unique(dim=0)) for part in (*places.split(1, 1), places))
    return cells > max(rows, columns)


def counting_columns(ids: torch.Tensor) -> frozenset[int]:
    """The columns of position ids that tell tokens apart."""
    table = ids.detach().to(torch.float64).flatten(0, -2)
    return frozenset(i for i in range(table.shape[-1]) if bool((table[:, i] != table[0, i]).any()))


def one_grid(pieces: Sequence[Piece]) -> tuple[int, int] | None:
    """The grid if the tokens are one image."""
    images = images_in(pieces)
    return images[0] if len(pieces) == len(images) == 1 else None


def tokens_of(piece: Piece) -> int:
    return piece if isinstance(piece, int) else piece[0] * piece[1]


def part_of(pieces: Sequence[Piece], start: int, stop: int) -> tuple[Piece, ...] | None:
    """The pieces of the tokens start .. stop; None if that cuts an image."""
    found: list[Piece] = []
    first = 0
    for piece in pieces:
        last = first + tokens_of(piece)
        inside = min(last, stop) - max(first, start)
        if inside > 0:
            if isinstance(piece, tuple) and inside < last - first:
                return None
            found.append(piece if isinstance(piece, tuple) else inside)
        first = last
    return tuple(found) if sum(map(tokens_of, found)) == stop - start else None


def images_in(pieces: Sequence[Piece]) -> tuple[tuple[int, int], ...]:
    """Height and width of the images among pieces, in order."""
    return tuple(piece for piece in pieces if isinstance(piece, tuple))


def inner_pieces(pieces: Sequence[Piece]) -> tuple[Piece, ...] | None:
    """The pieces from the first image to the last; None if there is none."""
    places = [i for i, piece in enumerate(pieces) if isinstance(piece, tuple)]
    return tuple(pieces[places[0] : places[-1] + 1]) if places else None


def words_of_pieces(pieces: Sequence[Any]) -> str:
    """Pieces as text: `grid 64×64`, or `grids 64×64 + 12 + 32×32`."""
    texts = ["×".join(map(str, p)) if isinstance(p, tuple) else str(p) for p in pieces]
    return f"{'grids' if len(texts) > 1 else 'grid'} {' + '.join(texts)}"


def _raster(rows: torch.Tensor, columns: torch.Tensor) -> tuple[int, int] | None:
    """Height and width if these coordinates [tokens] are a raster of two or more tokens."""
    height, width = torch.unique(rows), torch.unique(columns)
    if len(rows) < 2 or len(height) * len(width) != len(rows):
        return None
    if not (_has_equal_steps(height) and _has_equal_steps(width)):
        return None
    expected = torch.meshgrid(height, width, indexing="ij")
    shown = zip(expected, (rows, columns), strict=True)
    if not all(torch.equal(want.reshape(-1), got) for want, got in shown):
        return None
    return len(height), len(width)


def _has_equal_steps(values: torch.Tensor) -> bool:
    steps = values.diff()
    return bool((steps == steps[:1]).all())


class SeenIds:
    """Reads position ids again exactly when their content is not that of the last ones.

    A private copy of the ids that were read last is compared with those of each call, on their
    device: identity and version say too little, since `.data`, NumPy and kernels change values
    behind them. On an accelerator that is one comparison and one synchronization a call; ids on the
    CPU wait for nothing. A copy or a pickle of this object has seen nothing yet.
    """

    def __init__(self) -> None:
        self._seen: tuple[list[Table], tuple[Piece, ...]] | None = None

    def pieces(self, *tables: Table) -> tuple[Piece, ...]:
        """As `pieces_together`."""
        if any(isinstance(table, _torch.FakeTensor) or table.is_meta for table, _ in tables):
            return ()
        seen = self._seen
        if seen is None or not _are_same(seen[0], tables):
            with torch.no_grad():
                copies: list[Table] = [(table.detach().clone(), rows) for table, rows in tables]
            # Of the copies, which nothing else can change in between.
            self._seen = seen = copies, pieces_together(copies)
        return seen[1]

    def __reduce__(self) -> Any:
        return SeenIds, ()


def _are_same(seen: Sequence[Table], tables: Sequence[Table]) -> bool:
    return [rows for _, rows in seen] == [rows for _, rows in tables] and all(
        same_content(copy, table) for (copy, _), (table, _) in zip(seen, tables, strict=True)
    )


def same_content(copy: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype, device and values; waits for their device."""
    alike = copy.shape == ids.shape and copy.dtype == ids.dtype and copy.device == ids.device
    return alike and torch.equal(copy, ids)
