"""Masks that are written out and hide nothing: left out where that is known, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_pixel_vit import C, H, Model, W, compiled, explained, image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

N = H * W
Mask = Callable[[Any, Tensor], Tensor]


def by_indices(m: Any, t: Tensor) -> Tensor:
    """As transformers writes it: of the indices of queries and keys, and of padding that is none."""
    batch, queries = torch.arange(1), torch.arange(N) + 0
    keys = torch.arange(N) + 0
    shown = queries[None, None, :, None].new_ones((), dtype=torch.bool)
    shown = shown & (queries[None, None, :, None] >= 0)
    padding = torch.ones((1, H, W)).to(dtype=torch.bool).view(1, -1)
    return (shown & padding[batch[:, None, None, None], keys[None, None, None, :]]).expand(
        1, 1, N, N
    )


def zeros(m: Any, t: Tensor) -> Tensor:
    return torch.zeros(1, 1, N, N)


def selected_zeros(m: Any, t: Tensor) -> Tensor:
    return torch.zeros(N, N).masked_fill(torch.arange(N) >= N, -torch.inf)


def ones_like_the_tokens(m: Any, t: Tensor) -> Tensor:
    return torch.ones_like(t[:, :, 0], dtype=torch.bool)[:, None, None]


def one_is_hidden(m: Any, t: Tensor) -> Tensor:
    return (torch.arange(N) != N - 1).expand(1, 1, N, N)


def causal(m: Any, t: Tensor) -> Tensor:
    return torch.ones(N, N).tril().bool()


def written_later(m: Any, t: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[:, 3] = False
    return mask


def written_through_a_view(m: Any, t: Tensor) -> Tensor:
    mask = torch.zeros(N, N)
    mask.view(-1)[5:].fill_(-1.0)
    return mask


def of_the_tokens(m: Any, t: Tensor) -> Tensor:
    return (t[:, :, 0] < 1e9)[:, None, None]


def of_a_buffer(m: Any, t: Tensor) -> Tensor:
    return m.shown.expand(1, 1, N, N)


def of_rounded_numbers(m: Any, t: Tensor) -> Tensor:
    return (torch.arange(0.0, 1.0, 1 / N) * N < N + 1).expand(1, 1, N, N)


def random(m: Any, t: Tensor) -> Tensor:
    return torch.rand(N, N) >= 0


IDLE = [by_indices, zeros, selected_zeros, ones_like_the_tokens]
DENSE = [
    *(one_is_hidden, causal, written_later, written_through_a_view, of_the_tokens, of_a_buffer),
    *(of_rounded_numbers, random),
]


def masked(mask: Mask) -> Model:
    def step(m: Any, x: Tensor) -> Tensor:
        t = m.tokens(x)
        m.mask = mask(m, t)
        return m.attention(t)

    return Model(step, shown=torch.ones(N, dtype=torch.bool))


@pytest.mark.parametrize("mask", IDLE)
def test_a_mask_that_hides_nothing_is_left_out(mask: Mask) -> None:
    torch.manual_seed(0)
    model, x = masked(mask), image()
    (row,) = explained(model, x)
    assert (row.decision, row.layout) == ("gna", "8x12")
    torch._dynamo.reset()
    plain = Model(lambda m, x: m.attention(m.tokens(x)))
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), compiled(plain)(x))


@pytest.mark.parametrize("mask", DENSE)
def test_any_other_mask_stays(mask: Mask) -> None:
    (row,) = explained(masked(mask), image())
    assert row.reason == "mask"


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [(lambda: torch.arange(N) >= N, ""), (lambda: torch.arange(N) > 5, "mask")],
)
def test_scores_are_filled_nowhere(hidden: Callable[[], Tensor], reason: str) -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        query, key, value = m.qkv(m.tokens(x)).chunk(3, -1)
        scores = query @ key.mT * C**-0.5
        return scores.masked_fill(hidden(), -torch.inf).softmax(-1) @ value

    (row,) = explained(Model(step), image())
    assert row.reason == reason


def test_a_mask_that_makes_a_larger_batch_stays() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        query, key, value = m.qkv(m.tokens(x))[:, None].chunk(3, -1)
        scores = query @ key.mT * C**-0.5 + torch.zeros(2, 1, N, N)
        return scores.softmax(-1) @ value

    (row,) = explained(Model(step), image())
    assert row.decision == "dense"


def test_with_symbolic_sizes_it_stays() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        t = m.tokens(x)
        query, key, value = m.qkv(t)[:, None].chunk(3, -1)
        mask = torch.ones(t.shape[1], t.shape[1], dtype=torch.bool)
        return attend(query, key, value, attn_mask=mask)

    x = image()
    torch._dynamo.mark_dynamic(x, 2)
    (row,) = explained(Model(step), x)
    assert row.reason == "mask"
