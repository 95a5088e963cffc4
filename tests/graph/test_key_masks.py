"""Masks of padded text: recognized where it is proven that they show the grid, and only there."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from one_pixel_vit import C, H, Model, W, compiled, explained, image
from torch import Tensor, fx
from torch.nn import functional as F

from gna_compile.graph.shown_keys import shown_keys

TEXT, N = 5, H * W
Mask = Callable[[Tensor], Tensor]


def joint(mask: Mask) -> Model:
    """Text before the image, and a mask that is made of the text's."""

    def step(m: Any, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        m.mask = mask(text_mask)
        return m.attention(torch.cat([text, m.tokens(x)], 1))

    return Model(step)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shown = torch.ones(batch, TEXT, dtype=torch.bool)
    shown[0, 3:] = False
    return image(batch), torch.randn(batch, TEXT, C), shown


def ones(m: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(m.shape[0], N, dtype=dtype)


PROVEN: dict[str, Mask] = {
    "cat": lambda m: torch.cat([m, ones(m)], 1)[:, None, None],
    "pad": lambda m: F.pad(m, (0, N), value=True)[:, None, None, :],
    "of numbers": lambda m: (torch.cat([m.long(), ones(m, torch.long)], 1) == 1)[:, None, None],
    "of floats": lambda m: torch.cat([m.float(), ones(m, torch.float)], 1).bool()[:, None, None],
    "two at once": lambda m: (
        (torch.cat([m, ones(m)], 1) & torch.cat([ones(m)[:, :TEXT], ones(m)], 1))
        .unsqueeze(1)
        .unsqueeze(1)
    ),
    "expanded": lambda m: torch.cat([m[:, None, None], ones(m).view(-1, 1, 1, N)], -1),
    "pairs": lambda m: (
        torch.cat([m, ones(m)], 1)[:, None, None, :] & torch.cat([m, ones(m)], 1)[:, None, :, None]
    ),
}
OTHER: dict[str, Mask] = {
    "text hides the image": lambda m: torch.cat([m, ones(m) & m[:, :1]], 1)[:, None, None],
    "the image first": lambda m: torch.cat([ones(m), m], 1)[:, None, None],
    "negated": lambda m: (~torch.cat([m, ~ones(m)], 1))[:, None, None],
    "negated twice": lambda m: (~~torch.cat([m, ones(m)], 1))[:, None, None],
    "unequal": lambda m: (torch.cat([m.long(), ones(m, torch.long)], 1) != 7)[:, None, None],
    "random": lambda m: torch.cat([m, torch.rand(m.shape[0], N) > 0], 1)[:, None, None],
    "one pixel": lambda m: torch.cat([m, torch.arange(N).expand(m.shape[0], N) != 9], 1)[
        :, None, None
    ],
    "rounded": lambda m: (
        torch.cat([m.float(), ones(m, torch.float) * 1e-9], 1).half().bool()[:, None, None]
    ),
    "whole numbers": lambda m: (
        torch.cat([m.float(), ones(m, torch.float) / 2], 1).long().bool()[:, None, None]
    ),
    "pairs of two": lambda m: (
        torch.cat([m, ones(m)], 1)[:, None, None, :]
        & torch.cat([m.roll(1, 0), ones(m)], 1)[:, None, :, None]
    ),
}


def written(m: Tensor) -> Tensor:
    mask = torch.cat([m, ones(m)], 1)
    mask[:, TEXT + 3] = False
    return mask[:, None, None]


OTHER["written"] = written


def written_pairs(m: Tensor) -> Tensor:
    both = torch.cat([m, ones(m)], 1)
    mask = both[:, None, None, :] & both[:, None, :, None]
    mask[..., TEXT + 3] = False
    return mask


OTHER["written pairs"] = written_pairs
OTHER["seen as numbers"] = lambda m: (torch.cat([m, ~ones(m)], 1).view(torch.uint8) == 0)[
    :, None, None
]
OTHER["tiny"] = lambda m: (torch.cat([m.float(), ones(m, torch.float) * 0], 1) < 1e-60)[
    :, None, None
]


def shared(mask: Mask) -> Mask:
    """Pairs are made of one tensor, as models make them."""

    def pairs(m: Tensor) -> Tensor:
        both = torch.cat([m, ones(m)], 1)
        return both[:, None, None, :] * both[:, None, :, None]

    return pairs


PROVEN["pairs"] = shared(PROVEN["cat"])


@pytest.mark.parametrize("name", PROVEN)
def test_a_mask_of_padded_text_need_not_be_declared(name: str) -> None:
    torch.manual_seed(0)
    model, given = joint(PROVEN[name]), inputs()
    (row,) = explained(model, *given)
    assert (row.decision, row.layout) == ("gna", f"{TEXT} + {H}x{W}"), row.detail
    with torch.no_grad():
        actual = compiled(model)(*given)
        shown, see = model.mask, windowed()
        assert shown is not None
        both = shown & see
        q, k, v = model.qkv(torch.cat([given[1], model.tokens(given[0])], 1)).chunk(3, -1)
        expected = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], both)[:, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def windowed() -> Tensor:
    """The mask of the policy of `explained`: half of each axis."""
    return oracle.mask((H, W), (H // 2, W // 2), prefix=TEXT)


@pytest.mark.parametrize("name", OTHER)
def test_any_other_mask_stays(name: str) -> None:
    (row,) = explained(joint(OTHER[name]), *inputs())
    assert row.reason == "mask"


def test_rows_that_see_no_key_are_zero() -> None:
    """As plain attention has them, whatever is behind the tokens."""
    model, given = joint(PROVEN["pairs"]), inputs()
    with torch.no_grad():
        actual = compiled(model)(*given)
    assert not actual[0, 3:TEXT].any() and actual[1, :TEXT].any()


# Random masks, against what every input makes of them


def leaf(rng: random.Random) -> Mask:
    count = rng.randint(0, 3)
    return rng.choice(
        [
            lambda m: m,
            lambda m: torch.ones(2, 3, dtype=torch.bool),
            lambda m: torch.arange(3).expand(2, 3) < count,
            lambda m: torch.cat([m.float()[:, :1], torch.ones(2, 2)], 1).bool(),
            lambda m: (torch.arange(3) > 0).expand(2, 3) & m,
        ]
    )


def grown(rng: random.Random, depth: int) -> Mask:
    """A random mask [2, n] of a text mask [2, 3]."""
    if depth == 0:
        return leaf(rng)
    parts = grown(rng, depth - 1), grown(rng, depth - 1)
    before, value, factor, wanted = (rng.randint(0, 2) for _ in range(4))

    def both(m: Tensor) -> tuple[Tensor, Tensor]:
        one, two = parts[0](m), parts[1](m)
        n = min(one.shape[1], two.shape[1])
        return one[:, :n], two[:, :n]

    def number(m: Tensor) -> Tensor:
        one, two = both(m)
        return (one.long() * two.long() * factor) == wanted

    def where(m: Tensor) -> Tensor:
        one, two = both(m)
        return torch.where(one, two, ~two)

    def less(m: Tensor) -> Tensor:
        one, two = both(m)
        return one.float() <= two.float()

    return rng.choice(
        [
            lambda m: torch.cat([parts[0](m), parts[1](m)], 1),
            lambda m: torch.cat([parts[1](m), parts[0](m)], 1),
            lambda m: both(m)[0] & both(m)[1],
            lambda m: torch.logical_or(*both(m)),
            lambda m: both(m)[0] * both(m)[1],
            lambda m: F.pad(parts[0](m), (before, 1), value=bool(value)),
            lambda m: ~parts[0](m),
            lambda m: both(m)[0] ^ both(m)[1],
            lambda m: parts[0](m).flip(1),
            *(number, where, less),
        ]
    )


def graph_of(mask: Mask) -> fx.Graph:
    captured: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        captured.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(mask, backend=backend, fullgraph=True)(torch.ones(2, 3, dtype=torch.bool))
    return captured[0]


def test_what_is_shown_is_shown_for_every_input() -> None:
    rows = torch.tensor([[bool(bits >> i & 1) for i in range(3)] for bits in range(8)])
    texts = [torch.stack([one, two]) for one in rows for two in rows]
    proven = possible = 0
    for seed in range(80):
        mask = grown(random.Random(seed), 3)
        always = torch.cat([mask(text) for text in texts]).all(0)
        (output,) = graph_of(mask).find_nodes(op="output")
        shown = shown_keys(output.args[0][0])
        assert shown is not None and shown.shape == always.shape, seed
        assert not (shown & ~always).any(), seed
        proven, possible = proven + int(shown.sum()), possible + int(always.sum())
    assert possible > 100 and proven > possible / 3, (proven, possible)
