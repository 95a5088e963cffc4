"""Identities of tokens: which cell of which source stands behind each element of a tensor.

A step of a program (`token_steps`) is one function over `Ops`, and it is run twice. `Values` runs it
as a model. `Identities` runs it on integer tensors of the same shapes, where each element says which
cell it comes from: whatever moves elements is the same torch operator in both runs, so the order at
an attention site is known and not inferred. What computes with elements (`Ops`' methods) says by a
rule of its own what becomes of identities. `Truth` judges the layout that is claimed for a site.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 16  # channels
IDS = (
    "img_ids",
    *(f"{name}_ids" for name in ("cond", "pose", "mask", "face", "edge", "depth", "end")),
)
"""What models call their position ids."""
HEADS = 2

# Codes that stand for no cell. Each is weaker than the next where two meet; cells come after
# SPECIAL, MIXED wins over everything.
NEUTRAL, CONTEXT, SPECIAL, MIXED = 0, 1, 2, 3
FLAT_RANK, CELL_RANK, MIXED_RANK = 3, 4, 5


@dataclass(frozen=True)
class Cell:
    """One cell of one source.

    Attributes:
        source: the input that it comes from, and how often its lattice was made coarser.
        row: batch row of the input.
        at: its center along time, height and width.
        is_flat: a sequence (text, audio): a grid of one axis, or global tokens beside another grid.
        is_vague: nothing shows that its places are places in an image; may count as global tokens.
    """

    source: str
    row: int
    at: tuple[float, float, float]
    is_flat: bool = False
    is_vague: bool = False


class Atlas:
    """Numbers for cells."""

    def __init__(self) -> None:
        self.cells: list[Cell | None] = [None] * 4
        self.codes: dict[Cell, int] = {}
        self.pairs: dict[tuple[int, int], int] = {}
        self._table: dict[str, np.ndarray] | None = None

    def code(self, cell: Cell) -> int:
        if cell not in self.codes:
            self.codes[cell] = len(self.cells)
            self.cells.append(cell)
            self._table = None
        return self.codes[cell]

    @property
    def table(self) -> dict[str, np.ndarray]:
        """Columns over codes: rank, family (source and batch row as a number), at, is_vague."""
        if self._table is None:
            families: dict[tuple[str, int], int] = {}
            rank = [0, 1, 2, MIXED_RANK]
            family, at = [-1] * 4, [(0.0, 0.0, 0.0)] * 4
            for cell in self.cells[4:]:
                assert cell is not None
                rank.append(FLAT_RANK if cell.is_flat else CELL_RANK)
                family.append(families.setdefault((cell.source, cell.row), len(families)))
                at.append(cell.at)
            vague = [cell is not None and cell.is_vague for cell in self.cells]
            self._table = {"rank": np.array(rank), "family": np.array(family), "at": np.array(at)}
            self._table["is_vague"] = np.array(vague)
        return self._table

    def sources(self, codes: np.ndarray) -> set[str]:
        return {cell.source for code in np.unique(codes) if (cell := self.cells[code])}

    def meet(self, a: int, b: int) -> int:
        """What an elementwise operator makes of two codes."""
        if a == b:
            return a
        key = (min(a, b), max(a, b))
        if key not in self.pairs:
            ranks = self.table["rank"]
            if ranks[a] != ranks[b]:
                self.pairs[key] = a if ranks[a] > ranks[b] else b
            else:
                one, two = self.cells[a], self.cells[b]
                assert one is not None and two is not None
                self.pairs[key] = MIXED
                if one.at == two.at:
                    # Two streams aligned cell by cell, as a control signal is with latents.
                    names = sorted({*one.source.split("&"), *two.source.split("&")})
                    rows = one.row
                    if one.row != two.row:
                        rows = 1000 + 37 * min(one.row, two.row) + max(one.row, two.row)
                    joined = replace(one, source="&".join(names), row=rows)
                    self.pairs[key] = self.code(joined)
        return self.pairs[key]

    def merge(self, rows: np.ndarray, label: str) -> np.ndarray:
        """What a contraction over the last dimension of [R, K] makes: [R].

        Cells of one source and batch row become one cell of a coarser lattice.
        """
        first = rows[:, 0]
        if (rows == first[:, None]).all():
            return first
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        return np.array([self._merged(row, label) for row in unique])[inverse.reshape(-1)]

    def _merged(self, row: np.ndarray, label: str) -> int:
        codes = [int(code) for code in np.unique(row)]
        ranks = self.table["rank"]
        best = max(ranks[code] for code in codes)
        codes = [code for code in codes if ranks[code] == best]
        if len(codes) == 1:
            return codes[0]
        cells = [cell for code in codes if (cell := self.cells[code]) is not None]
        if len({(cell.source, cell.row) for cell in cells}) == 1:
            at = np.array([cell.at for cell in cells])
            t, y, x = (float(round(value, 6)) for value in at.mean(0))
            return self.code(replace(cells[0], source=f"{cells[0].source}/{label}", at=(t, y, x)))
        code = codes[0]
        for other in codes[1:]:
            code = self.meet(code, other)
        return code


@dataclass
class State:
    """What steps hand on: tokens, and the lattice that they pretend to be."""

    x: Tensor
    b: int
    t: int
    h: int
    w: int
    inputs: Sequence[Tensor]
    pre: int = 0
    post: int = 0


class Ops:
    """What a step may do with tokens besides moving them. Moving is torch's own operators."""

    def weight(self, index: int) -> Tensor:
        """A parameter or constant that belongs to no token."""
        raise NotImplementedError

    def buffer(self, index: int) -> Tensor:
        """An index tensor, the same in both runs."""
        raise NotImplementedError

    def neutral(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor computed from sizes alone, such as a RoPE table."""
        raise NotImplementedError

    def special(self, x: Tensor) -> Tensor:
        """`x` as special tokens."""
        raise NotImplementedError

    def each(self, function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """An elementwise operator, or a normalization within tokens or over all of them."""
        raise NotImplementedError

    def inplace(self, function: Callable[[Tensor], Any], x: Tensor) -> None:
        """Changes of values in place that move nothing."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: int) -> Tensor:
        """A contraction over the last dimension."""
        raise NotImplementedError

    def conv(self, x: Tensor, weight: int, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        """A convolution; kernel = stride without padding merges, others keep the center's cell."""
        raise NotImplementedError

    def pool(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Average pooling of the trailing dimensions."""
        raise NotImplementedError

    def mean(self, x: Tensor, dim: int) -> Tensor:
        """The mean over a dimension, which is gone."""
        raise NotImplementedError

    def opaque(self, function: Callable[[Tensor], Tensor], x: Tensor, code: int) -> Tensor:
        """An operator that mixes tokens; what becomes of them is not decided here."""
        raise NotImplementedError

    def lattice(
        self, x: Tensor, values: Callable[[Tensor], Tensor], scale: Sequence[float], form: str
    ) -> Tensor:
        """`values` makes a finer or larger lattice of `x`; its cells lie at index * scale."""
        raise NotImplementedError

    def site(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """An attention site."""
        raise NotImplementedError


Step = Callable[[Ops, State], State]


class Site(nn.Module):
    """One attention, spelled in one of the usual ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.spelling == "matmul":
            return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
        if self.spelling == "scaled":
            return torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1) @ v
        if self.spelling == "einsum":
            weights = torch.einsum("...id,...jd->...ij", q * scale, k).softmax(-1)
            return torch.einsum("...ij,...jd->...id", weights, v)
        return F.scaled_dot_product_attention(q, k, v)


class Values(nn.Module, Ops):
    """The program as a model."""

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self.steps = list(maker.steps)
        self.weights = nn.ParameterList(maker.weights)
        for index, buffer in enumerate(maker.buffers):
            self.register_buffer(f"index{index}", buffer)
        self.sites = nn.ModuleList(Site(spelling) for spelling in maker.spellings)
        ids = [i for i, spec in enumerate(maker.inputs) if spec.name.startswith("ids")]
        self.ids_at = dict(zip(IDS, ids, strict=False))
        self.reference: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, *inputs: Tensor, **ids: Tensor) -> Tensor:
        everything = list(inputs)
        for name, place in self.ids_at.items():
            everything.insert(place, ids[name])
        state = State(everything[0], 1, 1, 1, 1, tuple(everything))
        for step in self.steps:
            state = step(self, state)
        return state.x

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Position ids are arguments of names that models give them."""
        others = [x for i, x in enumerate(inputs) if i not in self.ids_at.values()]
        return others, {name: inputs[place] for name, place in self.ids_at.items()}

    def weight(self, index: int) -> Tensor:
        return self.weights[index]

    def buffer(self, index: int) -> Tensor:
        return getattr(self, f"index{index}")

    def neutral(self, make: Callable[[], Tensor]) -> Tensor:
        return make()

    def special(self, x: Tensor) -> Tensor:
        return x

    def each(self, function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        return function(*xs)

    def inplace(self, function: Callable[[Tensor], Any], x: Tensor) -> None:
        function(x)

    def linear(self, x: Tensor, weight: int) -> Tensor:
        return F.linear(x, self.weights[weight])

    def conv(self, x: Tensor, weight: int, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        return function(x, self.weights[weight], None, tuple(stride), tuple(padding))

    def pool(self, x: Tensor, size: Sequence[int]) -> Tensor:
        function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(size) - 1]
        return function(x, tuple(size))

    def mean(self, x: Tensor, dim: int) -> Tensor:
        return x.mean(dim)

    def opaque(self, function: Callable[[Tensor], Tensor], x: Tensor, code: int) -> Tensor:
        return function(x)

    def lattice(
        self, x: Tensor, values: Callable[[Tensor], Tensor], scale: Sequence[float], form: str
    ) -> Tensor:
        return values(x)

    def site(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.reference is not None:
            return self.reference(index, q, k, v)
        return self.sites[index](q, k, v)


class Identities(Ops):
    """The program on identities; collects the truth of each site."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.atlas = maker.atlas
        self.sites: dict[int, Truth] = {}
        self.lattices = 0

    def run(self, sizes: Sizes) -> dict[int, Truth]:
        inputs = [spec.identities(self.atlas, sizes) for spec in self.maker.inputs]
        state = State(inputs[0], 1, 1, 1, 1, inputs)
        for step in self.maker.steps:
            state = step(self, state)
        return self.sites

    def weight(self, index: int) -> Tensor:
        return torch.zeros_like(self.maker.weights[index], dtype=torch.int64)

    def buffer(self, index: int) -> Tensor:
        return self.maker.buffers[index]

    def neutral(self, make: Callable[[], Tensor]) -> Tensor:
        return torch.zeros_like(make(), dtype=torch.int64)

    def special(self, x: Tensor) -> Tensor:
        return torch.full_like(x, SPECIAL)

    def each(self, function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        result = xs[0].clone()
        for x in xs[1:]:
            a, b = torch.broadcast_tensors(result, x)
            result = a.clone()
            differ = a != b
            if differ.any():
                pairs = torch.stack([a[differ], b[differ]], 1).numpy()
                unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
                met = np.array([self.atlas.meet(int(one), int(two)) for one, two in unique])
                result[differ] = torch.from_numpy(met[inverse.reshape(-1)])
        return result

    def inplace(self, function: Callable[[Tensor], Any], x: Tensor) -> None:
        pass

    def linear(self, x: Tensor, weight: int) -> Tensor:
        return self._merged(x, self.maker.weights[weight].shape[0], f"linear{x.shape[-1]}")

    def _merged(self, x: Tensor, out: int, label: str) -> Tensor:
        merged = self.atlas.merge(x.reshape(-1, x.shape[-1]).numpy(), label)
        return torch.from_numpy(merged).reshape(*x.shape[:-1], 1).repeat_interleave(out, -1)

    def conv(self, x: Tensor, weight: int, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        kernel = self.maker.weights[weight]
        rank = len(stride)
        if not any(padding):
            windows = x
            for dim, size in enumerate(kernel.shape[2:]):
                windows = windows.unfold(2 + dim, size, stride[dim])
        else:
            steps: Any = (..., *(slice(None, None, step) for step in stride))
            windows = x[steps].reshape(*x[steps].shape, *[1] * rank)
        # [B, C, *out, *kernel] -> [B, *out, C * kernel]
        windows = windows.movedim(1, 1 + rank).flatten(1 + rank)
        return self._merged(windows, kernel.shape[0], f"conv{tuple(stride)}").movedim(-1, 1)

    def pool(self, x: Tensor, size: Sequence[int]) -> Tensor:
        rank = len(size)
        start = x.dim() - rank
        for dim, step in enumerate(size):
            x = x.unfold(start + dim, step, step)
        windows = x.flatten(start + rank)
        return self._merged(windows, 1, f"pool{tuple(size)}")[..., 0]

    def mean(self, x: Tensor, dim: int) -> Tensor:
        return self._merged(x.movedim(dim, -1), 1, f"mean{x.shape[dim]}")[..., 0]

    def opaque(self, function: Callable[[Tensor], Tensor], x: Tensor, code: int) -> Tensor:
        shape = function(torch.zeros(x.shape)).shape
        return torch.full(shape, code, dtype=torch.int64)

    def lattice(
        self, x: Tensor, values: Callable[[Tensor], Tensor], scale: Sequence[float], form: str
    ) -> Tensor:
        out = torch.full_like(values(x.float()), MIXED, dtype=torch.int64)
        self.lattices += 1
        codes = x.movedim(form.index("c"), -1).reshape(-1, x.shape[form.index("c")])
        ranks = self.atlas.table["rank"][codes.numpy()]
        if (ranks != CELL_RANK).any() or not _in_order(self.atlas, x, form):
            return out
        positions = torch.ones_like(out).nonzero().tolist()
        scales = dict(zip("thw", scale, strict=True))
        made = []
        dims = {letter: form.index(letter) for letter in form}
        for position in positions:
            at = [float(position[dims[a]]) * s if a in dims else 0.0 for a, s in scales.items()]
            cell = Cell(f"lattice{self.lattices}", position[0], (at[0], at[1], at[2]))
            made.append(self.atlas.code(cell))
        return torch.tensor(made).reshape(out.shape)

    def site(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [self._rows(x) for x in (q, k, v)]
        self.sites[index] = Truth(self.atlas, *rows)
        out = torch.from_numpy(rows[0].reshape(q.shape[:-1]))
        return out[..., None].repeat_interleave(v.shape[-1], -1)

    def _rows(self, x: Tensor) -> np.ndarray:
        """[batch and heads, tokens]; MIXED where a row holds channels of several tokens."""
        codes = x.reshape(-1, *x.shape[-2:]).numpy()
        first = codes[..., 0]
        return np.where((codes == codes[..., :1]).all(-1), first, MIXED)


def _in_order(atlas: Atlas, x: Tensor, form: str) -> bool:
    """Whether each batch entry of `x` is one raster."""
    lattice = [dim for dim, letter in enumerate(form) if letter in "thw"]
    codes = x.movedim(form.index("c"), -1)[..., 0]
    sizes = [x.shape[dim] for dim in lattice]
    codes = codes.reshape(codes.shape[0], -1)
    return all(_grid_of(atlas, row)[0] == _squeezed(sizes) for row in codes.numpy())


def _squeezed(grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in grid if size != 1)


def _grid_of(atlas: Atlas, codes: np.ndarray) -> tuple[tuple[int, ...] | None, str, bool]:
    """The grid that a run of cells is the raster of, without axes of length 1; why not; whether its
    axes stand in the usual order and are evenly spaced."""
    table = atlas.table
    if (table["rank"][codes] == MIXED_RANK).any():
        return None, "mixed tokens", False
    if (table["rank"][codes] < FLAT_RANK).any():
        return None, "special tokens inside the grid", False
    if len(set(table["family"][codes])) != 1:
        several = len(atlas.sources(codes)) > 1
        return None, "several sources" if several else "several batch rows", False
    if len(set(codes)) != len(codes):
        return None, "copies of a token", False
    at = table["at"][codes]
    axes = [np.unique(at[:, axis]) for axis in range(3)]
    if len(axes[0]) * len(axes[1]) * len(axes[2]) != len(codes):
        return None, "not a box of the lattice", False
    even = all(len(axis) < 3 or np.ptp(np.diff(axis)) < 1e-4 for axis in axes)
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        raster = np.stack(np.meshgrid(*(axes[a] for a in order), indexing="ij"), -1).reshape(-1, 3)
        if (raster == at[:, list(order)]).all():
            return _squeezed([len(axes[a]) for a in order]), "", even and order == (0, 1, 2)
    return None, "order", False


@dataclass
class Truth:
    """What the rows of one site are: codes [batch and heads, tokens]."""

    atlas: Atlas
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def fault(self, *segments: Segment) -> str:
        """ "" if this layout is right, else what is wrong with it.

        Args:
            segments: in order, each a number of global tokens or a grid.
        """
        for name, other in (("keys", self.k), ("values", self.v)):
            if other.shape != self.q.shape:
                return f"{name} are not the queries' tokens"
            ranks = self.atlas.table["rank"]
            differ = (self.q != other) & (np.maximum(ranks[self.q], ranks[other]) >= FLAT_RANK)
            if differ.any():
                return f"{name} are not the queries' tokens"
        if self.q.shape[1] != sum(map(_tokens, segments)):
            return "token count"
        table = self.atlas.table
        for segment, codes in zip(segments, self._cut(segments), strict=True):
            if isinstance(segment, int):
                if ((table["rank"][codes] >= CELL_RANK) & ~table["is_vague"][codes]).any():
                    return "cells of a lattice taken for global tokens"
                continue
            for row in codes:
                actual, fault, _ = _grid_of(self.atlas, row)
                if actual is None:
                    return fault
                if actual != _squeezed(segment):
                    return "another grid"
        return self._fault_side_by_side(segments)

    def _cut(self, segments: Sequence[Segment]) -> list[np.ndarray]:
        stops = np.cumsum([_tokens(segment) for segment in segments])
        return np.split(self.q, stops[:-1], 1)

    def _fault_side_by_side(self, segments: Sequence[Segment]) -> str:
        """Two grids with nothing between them must not be one grid in two parts."""
        parts = list(zip(segments, self._cut(segments), strict=True))
        for (one, before), (other, after) in pairwise(parts):
            if isinstance(one, tuple) and isinstance(other, tuple):
                together = np.concatenate([before, after], 1)
                if any(_grid_of(self.atlas, row)[0] is not None for row in together):
                    return "one grid taken for two"
        return ""

    @property
    def expected(self) -> tuple[Segment, ...] | None:
        """The layout of two or three axes that the site should be rewritten with, if there is one."""
        return self.layout(only_usual=True)

    def layout(self, *, only_usual: bool) -> tuple[Segment, ...] | None:
        """The layout of two or three axes that the cells have; a usual order is that of its lattice."""
        is_cell = self.atlas.table["rank"][self.q] >= CELL_RANK
        columns = np.flatnonzero(is_cell.any(0))
        if not len(columns):
            return None
        prefix, stop = int(columns[0]), int(columns[-1]) + 1
        grid, _, usual = _grid_of(self.atlas, self.q[0, prefix:stop])
        if grid is None or len(grid) < 2 or (only_usual and not usual):
            return None
        segments: list[Segment] = [prefix, grid, self.q.shape[1] - stop]
        layout = tuple(segment for segment in segments if segment)
        return None if self.fault(*layout) else layout

    def several_grids(self) -> tuple[Segment, ...] | None:
        """The layout with a grid wherever neighbors are cells of one source, if each is a raster."""
        row = self.q[0]
        is_cell = self.atlas.table["rank"][row] >= CELL_RANK
        family = np.where(is_cell, self.atlas.table["family"][row], -1)
        segments: list[Segment] = []
        for part in np.split(row, np.flatnonzero(np.diff(family)) + 1):
            if self.atlas.table["rank"][part[0]] < CELL_RANK:
                segments.append(len(part))
                continue
            grid = _grid_of(self.atlas, part)[0]
            if grid is None:
                return None
            segments.append(grid)
        return None if self.fault(*segments) else tuple(segments)

    def visible(self, claim: Claim) -> np.ndarray:
        """Bool [batch and heads, tokens, tokens] from the cells' places, by the definition of GNA."""
        rows, tokens = self.q.shape
        see = np.ones((rows, tokens, tokens), dtype=bool)
        stops = np.cumsum([_tokens(segment) for segment in claim.segments])
        for segment, stop in zip(claim.segments, stops, strict=True):
            if isinstance(segment, int):
                continue
            inside = slice(stop - _tokens(segment), stop)
            for row in range(rows):
                at = self.atlas.table["at"][self.q[row, inside]]
                for axis in range(3):
                    places, rank = np.unique(at[:, axis], return_inverse=True)
                    if len(places) > 1:
                        table = axis_table(len(places), claim.stride)
                        see[row, inside, inside] &= table[rank[:, None], rank[None, :]]
        return see


def axis_table(length: int, stride: int) -> np.ndarray:
    """Which keys each query sees along one axis: half the axis, rounded down, at least one."""
    window = max(length // 2, 1)
    stride = min(stride, window)
    see = np.zeros((length, length), dtype=bool)
    for query in range(length):
        leader = min(stride * (query // stride) + stride // 2, length - 1)
        first = max(0, min(leader - window // 2, length - window))
        see[query, first : first + window] = True
    return see


Segment = int | tuple[int, ...]
"""A number of global tokens, or a grid."""


def _tokens(segment: Segment) -> int:
    return segment if isinstance(segment, int) else int(np.prod(segment))


@dataclass(frozen=True)
class Claim:
    """A layout as the backend reports it."""

    segments: tuple[Segment, ...]
    stride: int

    @classmethod
    def parse(cls, layout: str, stride: int) -> list[Claim]:
        """`2 + 4x6x8 + 3`; without a grid of several axes any one of the numbers may be one."""
        parts = [tuple(map(int, part.split("x"))) for part in layout.split(" + ")]
        lines = [i for i, part in enumerate(parts) if len(part) == 1]
        chosen: list[int | None] = [None] if len(lines) < len(parts) else [*lines]
        return [
            cls(
                tuple(
                    part[0] if len(part) == 1 and i != grid else part
                    for i, part in enumerate(parts)
                ),
                stride,
            )
            for grid in chosen
        ]


@dataclass(frozen=True)
class Sizes:
    """The example sizes: batch, lattice, text tokens."""

    b: int
    t: int
    h: int
    w: int
    text: int


@dataclass
class InputSpec:
    """One input of a model: its shape, and which cells its elements are.

    Attributes:
        form: letters of its dimensions: b, t, h, w, c, n for h·w, l for a sequence.
        shape: sizes by Sizes.
        make: values, where they are not random.
        code: of all elements, if they are no cells.
        is_vague: as in Cell.
        order: which cell each place of dimension n holds, by default its own.
    """

    name: str
    form: str
    shape: Callable[[Sizes], tuple[int, ...]]
    make: Callable[[Sizes], Tensor] | None = None
    code: int | None = None
    order: Tensor | None = None
    is_vague: bool = False

    def values(self, sizes: Sizes, generator: torch.Generator) -> Tensor:
        if self.make is not None:
            return self.make(sizes)
        return torch.randn(self.shape(sizes), generator=generator)

    def identities(self, atlas: Atlas, sizes: Sizes) -> Tensor:
        shape = self.shape(sizes)
        if self.code is not None:
            return torch.full(shape, self.code, dtype=torch.int64)
        axes = {letter: dim for dim, letter in enumerate(self.form)}
        positions = np.indices(shape).reshape(len(shape), -1)

        def along(letter: str) -> np.ndarray:
            return positions[axes[letter]] if letter in axes else np.zeros(positions.shape[1], int)

        flat = "l" in axes
        if "n" in axes:
            n = along("n") if self.order is None else self.order.numpy()[along("n")]
            y, x = n // sizes.w, n % sizes.w
        else:
            y, x = along("h"), along("l" if flat else "w")
        columns = np.stack([along("b"), along("t"), y, x], 1)
        unique, inverse = np.unique(columns, axis=0, return_inverse=True)
        codes = [
            atlas.code(Cell(self.name, int(b), (float(t), float(r), float(c)), flat, self.is_vague))
            for b, t, r, c in unique
        ]
        return torch.from_numpy(np.array(codes)[inverse.reshape(-1)].reshape(shape))


class NotApplicable(Exception):
    """A step cannot follow what was made so far."""


@dataclass
class Maker:
    """A program under construction.

    Attributes:
        form: letters of the current dimensions; f is b·t folded, n is h·w or t·h·w flattened.
        t, h, w: the lattice that the tokens pretend to be at the example sizes.
        pre, post: special tokens around dimension n.
        is_open: from here on a site may stay dense.
    """

    sizes: Sizes
    dynamic: bool
    wild: bool
    generator: torch.Generator
    rng: random.Random = field(default_factory=random.Random)
    form: str = ""
    t: int = 1
    h: int = 1
    w: int = 1
    pre: int = 0
    post: int = 0
    is_open: bool = False
    atlas: Atlas = field(default_factory=Atlas)
    steps: list[Step] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    weights: list[nn.Parameter] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    inputs: list[InputSpec] = field(default_factory=list)
    spellings: list[str] = field(default_factory=list)
    site_names: list[tuple[str, ...]] = field(default_factory=list)
    site_open: list[bool] = field(default_factory=list)

    def weight(self, *shape: int, scale: float | None = None) -> int:
        values = torch.randn(shape, generator=self.generator)
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values *= scale if scale is not None else 1.4 * fan**-0.5
        self.weights.append(nn.Parameter(values, requires_grad=False))
        return len(self.weights) - 1

    def index(self, values: Sequence[int] | Tensor) -> int:
        self.buffers.append(torch.as_tensor(values))
        return len(self.buffers) - 1

    def input(self, spec: InputSpec) -> int:
        self.inputs.append(replace(spec, name=f"{spec.name}{len(self.inputs)}"))
        return len(self.inputs) - 1

    def site(self, spelling: str | None = None) -> int:
        if spelling is None:
            spelling = self.rng.choice(["sdpa", "sdpa", "sdpa", "matmul", "scaled", "einsum"])
        self.spellings.append(spelling)
        self.site_names.append(tuple(self.names))
        self.site_open.append(self.is_open)
        return len(self.spellings) - 1

    def say(self, variant: str) -> None:
        """Adds a variant to the current step's name, for reports."""
        self.names[-1] += f" {variant}"

    def need(self, condition: bool) -> None:
        if not condition:
            raise NotApplicable

    def need_form(self, *forms: str) -> str:
        self.need(self.form in forms)
        return self.form

    @property
    def tokens(self) -> int:
        """Length of dimension n without special tokens."""
        return self.h * self.w * (self.t if self.form == "bnc" else 1)

    def text(self) -> int:
        return self.input(InputSpec("text", "blc", lambda s: (s.b, s.text, C)))
