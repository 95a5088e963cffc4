"""Random programs that move tokens through nested `vmap`s before an attention, and their truth.

A program only moves elements, so that a run on numbers that name cells and samples shows exactly
which token of which sample each row of the queries, keys and values is. It shares no code with the
package.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HEIGHT, WIDTH, CHANNELS = 4, 5, 8
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Move = Callable[[Tensor], Tensor]


def _overwritten(x: Tensor) -> Tensor:
    x = x.clone()
    x[0] = x[1]
    return x


def _turned_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x.copy_(x.flip(-1))
    return x


# Of a batch of batches of images [E, B, C, H, W], in the same shape.
_BEFORE: dict[str, Move] = {
    "nothing": lambda x: x,
    "+ 0": lambda x: x + 0,
    "reshape": lambda x: x.flatten(3).unflatten(3, x.shape[3:]),
    "flip samples": lambda x: x.flip(0),
    "flip batch": lambda x: x.flip(1),
    "roll samples": lambda x: x.roll(1, 0),
    "cat samples": lambda x: torch.cat([x[1:], x[:1]]),
    "flip rows": lambda x: x.flip(3),
    "first sample": lambda x: x[:1].expand_as(x),
    "mixed samples": lambda x: x.transpose(0, 1).reshape(x.shape),
    "merged samples": lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "setitem": _overwritten,
}
# Of what one sample is.
_INSIDE: dict[str, Move] = {
    "nothing": lambda x: x,
    "clone": lambda x: x.clone().add_(0),
    "flip columns": lambda x: x.flip(-1),
    "roll columns": lambda x: x.roll(1, -1),
    "transpose": lambda x: x.mT,
    "crop": lambda x: x[..., 1:, :],
    "copy_": _turned_in_place,
}


def tokens(image: Tensor) -> Tensor:
    """[.., C, H, W] as [1 or B, 1, H * W, C]."""
    image = image.flatten(-2).mT
    while image.ndim < 4:
        image = image.unsqueeze(-3)
    return image


@dataclass(frozen=True)
class Program:
    """`run(x, attend)` for x [E, B, C, H, W].

    Attributes:
        text: what it does, for messages.
        batch: E and B.
    """

    run: Callable[[Tensor, Attention], Tensor]
    text: str
    batch: tuple[int, int]


def program(seed: int) -> Program:
    chance = random.Random(seed)

    def pick(moves: dict[str, Move]) -> tuple[str, Move]:
        # Most of them move nothing.
        names = [*moves, *["nothing"] * 3 * len(moves)]
        name = chance.choice(names)
        return name, moves[name]

    depth = chance.choice([1, 1, 2])
    batch = chance.choice([(2, 3), (3, 2), (2, 2), (1, 3)])
    before = [pick(_BEFORE) for _ in range(3)]
    inside = [pick(_INSIDE) for _ in range(3)]
    in_dims = [chance.choice([0, 0, 1, 1, -5, -4, 3]), chance.choice([0, 0, 0, -4, 2])][:depth]
    others = [chance.choice([dim, dim, dim, dim, 0, 1, None]) for dim in in_dims]
    out_dims = [chance.choice([0, 1, -1]) for _ in range(depth)]
    operands = [chance.choice("aaaab") for _ in range(3)]
    is_outside = chance.random() < 0.3
    if is_outside:
        out_dims = [abs(dim) for dim in out_dims]

    def sample(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        while b.ndim > a.ndim:
            b = b[-1]
        return tuple(
            move({"a": a, "b": b}[name]) for name, (_, move) in zip(operands, inside, strict=True)
        )

    def run(x: Tensor, attend: Attention) -> Tensor:
        def attention(*parts: Tensor) -> Tensor:
            return attend(*map(tokens, parts))

        def function(a: Tensor, b: Tensor) -> Tensor | tuple[Tensor, ...]:
            return sample(a, b) if is_outside else attention(*sample(a, b))

        for dims in reversed(list(zip(in_dims, others, out_dims, strict=True))):
            function = torch.vmap(function, in_dims=dims[:2], out_dims=dims[2])
        x = before[0][1](x)
        result = function(before[1][1](x), before[2][1](x))
        return attention(*result) if isinstance(result, tuple) else result

    names = [name for name, _ in (*before, *inside)]
    text = f"{names} in_dims {in_dims} and {others} out_dims {out_dims} {operands} {is_outside}"
    return Program(run, f"program {seed}: {text}", batch)


def named(batch: tuple[int, int]) -> Tensor:
    """Images whose first channel names the cell and whose second one names the image."""
    images = torch.zeros(*batch, CHANNELS, HEIGHT, WIDTH)
    images[:, :, 0] = torch.arange(HEIGHT * WIDTH).view(HEIGHT, WIDTH)
    images[:, :, 1] = torch.arange(batch[0] * batch[1]).view(*batch, 1, 1)
    images[:, :, 2] = 1
    return images


@dataclass(frozen=True)
class Truth:
    """What each row of an attention is; one entry for each row and token, all in one order.

    Attributes:
        tokens: for queries, keys and values, the cell and the image: six tensors.
        position: the token's place in the sequence.
        row: equal for the tokens of a row.
    """

    tokens: list[Tensor]
    position: Tensor
    row: Tensor

    def is_self(self) -> bool:
        query, key, value = (self.tokens[i : i + 2] for i in (0, 2, 4))
        return all(
            torch.equal(a, b) and torch.equal(a, c)
            for a, b, c in zip(query, key, value, strict=True)
        )

    def is_raster(self, grid: tuple[int, ...]) -> bool:
        """Whether each row is the raster of a box of one image."""
        if len(grid) != 2 or grid[0] * grid[1] != int(self.position.max()) + 1:
            return False
        for label in self.row.unique():
            here = self.row == label
            order = self.position[here].argsort(stable=True)
            cells, images = (part[here][order] for part in self.tokens[:2])
            copies = len(cells) // (grid[0] * grid[1])
            cells = cells.view(*grid, copies).long()
            rows, columns = cells // WIDTH, cells % WIDTH
            if not (
                bool((images == images[0]).all())
                and bool((cells == cells[..., :1]).all())
                and bool((rows == rows[:, :1]).all() and (columns == columns[:1]).all())
                and bool((rows.diff(dim=0) > 0).all() and (columns.diff(dim=1) > 0).all())
            ):
                return False
        return True


def truth(the_program: Program) -> Truth | None:
    """What a program's attention is on; None if it is no program, since shapes do not fit."""

    def value(of: Attention) -> Tensor:
        def attend(*operands: Tensor) -> Tensor:
            if len({operand.shape for operand in operands}) > 1:
                raise ValueError("not as many keys as queries")
            return of(*operands)

        return the_program.run(named(the_program.batch), attend).flatten()

    def position(query: Tensor, *_: Tensor) -> Tensor:
        return torch.arange(query.shape[-2]).view(-1, 1).expand(*query.shape[:-1], 1)

    def row(query: Tensor, *_: Tensor) -> Tensor:
        label = query[..., :1] * 37 + query[..., 1:2] * 1009
        return (label + label.square()).sum(-2, keepdim=True).expand(*query.shape[:-1], 1)

    try:
        parts = [
            value(lambda *operands, i=i: operands[i // 2][..., i % 2 : i % 2 + 1]) for i in range(6)
        ]
        return Truth(parts, value(position), value(row))
    except (RuntimeError, IndexError, ValueError):
        return None
