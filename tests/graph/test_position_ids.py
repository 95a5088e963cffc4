"""Position ids: what their values show, and that it is their content at each call that decides."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from models import flux_ids
from torch import Tensor, nn
from torch.nn import functional as F

import gna_compile
from gna_compile.graph.tokens.position_ids import (
    SeenIds,
    one_grid,
    pieces_of,
    words_of_pieces,
)

POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 0,
    "min_speedup": 0,
    "phases": ["warmup"],
    "rules": [{"phases": "warmup", "window": 5}, {"window": 3}],
}
WIDTH = 16


class Attn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x)
        return x + y


class Packed(nn.Module):
    """Packed tokens and the ids of their places, as FLUX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, img_ids: Tensor) -> Tensor:
        x = x + self.position(img_ids.float())
        for block in self.blocks:
            x = block(x)
        return x


def masked(model: Packed, x: Tensor, ids: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The model with the brute-force mask of this grid."""
    mask = oracle.mask(grid, (window, window))
    x = x + model.position(ids.float())
    for block in model.blocks:
        q = block.get_submodule("attn.to_q")(x)[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]
    return x


def behind_the_version(ids: Tensor, new: Tensor) -> None:
    ids.data.copy_(new)


def through_numpy(ids: Tensor, new: Tensor) -> None:
    ids.detach().numpy()[...] = new.numpy()


def in_place(ids: Tensor, new: Tensor) -> None:
    ids.copy_(new)


@pytest.mark.parametrize("way", ["whole", "prepared", "regional"])
@pytest.mark.parametrize("change", [behind_the_version, through_numpy, in_place])
@pytest.mark.parametrize("inference", [False, True])
def test_the_content_of_position_ids_decides(
    way: str, change: Callable[[Tensor, Tensor], None], inference: bool
) -> None:
    torch.manual_seed(0)
    model = Packed().eval()
    plain = copy.deepcopy(model)
    options: Any = {"inner": "eager"}
    run: Any = model
    if way == "whole":
        run = torch.compile(model, backend="gna", options=options | {"policy": POLICY})
    else:
        gna_compile.prepare(model, POLICY)
        if way == "prepared":
            run = torch.compile(model, backend="gna", options=options)
        else:
            for block in model.blocks:
                block.compile(backend="gna", options=options)
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        ids, x = flux_ids((6, 8)), torch.randn(1, 48, WIDTH)
        for grid in ((6, 8), (6, 8), (8, 6), (6, 8)):
            change(ids, flux_ids(grid))
            for phase, window in (("default", 3), ("warmup", 5)):
                with gna_compile.phase(phase):
                    actual = run(x, ids)
                expected = masked(plain, x, ids, grid, window)
                if way == "whole" and grid == (8, 6):
                    expected = plain(x, ids)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_prepared_model_forgets_ids_that_are_not_given() -> None:
    class Optional(Packed):
        def forward(self, x: Tensor, img_ids: Tensor | None = None) -> Tensor:
            return super().forward(x, torch.zeros(48, 3) if img_ids is None else img_ids)

    torch.manual_seed(0)
    model = Optional().eval()
    plain, x = copy.deepcopy(model), torch.randn(1, 48, WIDTH)
    gna_compile.prepare(model, POLICY)
    for block in model.blocks:
        block.compile(backend="gna", options={"inner": "eager"})
    ids = flux_ids((6, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(x, ids), masked(plain, x, ids, (6, 8), 3))
        torch.testing.assert_close(model(x), plain(x))


def grid(seen: SeenIds, ids: Tensor) -> tuple[int, int] | None:
    return one_grid(seen.pieces((ids, None)))


def test_ids_of_another_kind_are_read_again() -> None:
    seen, ids = SeenIds(), flux_ids((6, 8))
    assert grid(seen, ids) == (6, 8)
    assert grid(seen, ids.half()) == (6, 8)
    assert grid(seen, ids.expand(2, -1, -1)) == (6, 8)
    assert grid(seen, torch.stack([ids, flux_ids((8, 6))])) is None
    assert grid(seen, ids.to("meta")) is None
    assert grid(seen, ids.long()) == (6, 8)
    assert grid(seen, torch.full((48, 3), float("nan"))) is None
    for twin in (copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert grid(twin, flux_ids((4, 12))) == (4, 12)


def images(*sizes: tuple[float, int, int], columns: int = 3) -> Tensor:
    """Ids of images one after another: (first id, height, width) of each."""
    parts = [flux_ids((h, w), columns) for _, h, w in sizes]
    for part, (first, _, _) in zip(parts, sizes, strict=True):
        part[:, 0] = first
    return torch.cat(parts)


@pytest.mark.parametrize("columns", [3, 4])
def test_images_one_after_another_are_no_axis(columns: int) -> None:
    two = images((0, 6, 10), (1, 6, 10), columns=columns)
    assert pieces_of(two) == ((6, 10), (6, 10))
    assert one_grid(pieces_of(two)) is None
    three = images((0, 6, 10), (10, 4, 4), (20, 1, 5), columns=columns)
    assert pieces_of(three) == ((6, 10), (4, 4), 5)  # a row is a mere enumeration
    assert words_of_pieces(pieces_of(three)) == "grids 6×10 + 4×4 + 5"
    assert pieces_of(images((10, 6, 10), columns=columns)) == ((6, 10),)


def test_text_may_lie_anywhere_among_images() -> None:
    text = torch.zeros(5, 4)
    text[:, 3] = torch.arange(1, 6)
    image, reference = images((0, 6, 8), columns=4), images((10, 4, 4), columns=4)
    assert pieces_of(torch.cat([text, image])) == (5, (6, 8))
    assert pieces_of(torch.cat([image, text, reference])) == ((6, 8), 5, (4, 4))
    counted = torch.arange(7.0)[:, None].expand(7, 3)  # (i, i, i), as language models have it
    shifted = images((7, 6, 8))
    assert pieces_of(torch.cat([counted, shifted, counted + 20])) == (7, (6, 8), 7)
    assert pieces_of(torch.cat([torch.zeros(3, 3), images((0, 6, 8))])) == ()  # of one image's t


def test_tokens_that_are_no_images_are_no_pieces() -> None:
    two = images((0, 6, 10), (1, 6, 10))
    mixed = two[torch.randperm(len(two), generator=torch.Generator().manual_seed(0))]
    alternating = torch.stack([two[:60], two[60:]], dim=1).flatten(0, 1)
    places = images((0, 6, 10), columns=4)
    places[:, 3] = torch.arange(60)
    for ids in (mixed, alternating, places, two[:, :2], two[None, None], two[:0]):
        assert pieces_of(ids) == ()
    assert pieces_of(torch.zeros(12, 3)) == (12,)
