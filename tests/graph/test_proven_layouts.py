"""Tokens that are not what their sizes suggest: each stays dense, or gets the grid that it has.

Every case is a small model in the manner of a real one. What must not be claimed is given by the
reason; what is rewritten is compared with the mask of the true grid.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from models import flux_ids
from one_pixel_vit import OPTIONS, C, H, Model, W, compiled, explained, image, permutation
from oracle import mask as grid_mask
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv1d, conv2d
from torch.nn.functional import scaled_dot_product_attention as attend

# Keys of other tokens


def two_views(m: Any, images: Tensor) -> Tensor:
    """Both views of a pair are encoded in one batch, then each attends to the other."""
    one, other = m.tokens(images).chunk(2, 0)
    return m.attention(one, other)


def swapped_pair(m: Any, one: Tensor, other: Tensor) -> Tensor:
    first, second = m.tokens(torch.cat([one, other])).chunk(2, 0)
    return m.attention(torch.cat([first, second]), torch.cat([second, first]))


def first_frame(m: Any, video: Tensor) -> Tensor:
    x = m.tokens(video)
    return m.attention(x, x[:1].expand_as(x))


def next_frame_in_the_place_of_heads(m: Any, video: Tensor) -> Tensor:
    x = m.qkv(m.tokens(video))[None, ..., :C]
    return attend(x, x.roll(1, 1), x.roll(1, 1))


def shared_positions(m: Any, one: Tensor, other: Tensor) -> Tensor:
    y = m.other_patch(other).flatten(2).transpose(1, 2)
    return m.attention(m.tokens(one) + m.table, y + m.table)


def cached_keys(m: Any, x: Tensor, key: Tensor, value: Tensor, cos: Tensor) -> Tensor:
    query = m.qkv(m.tokens(x))[..., :C]
    return attend((query * cos)[:, None], (key * cos)[:, None], value[:, None])


def rows() -> Tensor:
    return torch.randn(1, H * W, C)


@pytest.mark.parametrize(
    ("step", "inputs"),
    [
        (two_views, [image(2)]),
        (swapped_pair, [image(), image()]),
        (first_frame, [image(4)]),
        (next_frame_in_the_place_of_heads, [image(2)]),
        (shared_positions, [image(), image()]),
        (cached_keys, [image(), rows(), rows(), torch.randn(H * W, C)]),
    ],
)
def test_keys_of_other_tokens(step: Any, inputs: list[Tensor]) -> None:
    (row,) = explained(Model(step, table=torch.randn(1, H * W, C)), *inputs)
    # Of an input that only looks like an image it is not known whether another holds the same.
    is_known = step not in (shared_positions, cached_keys)
    assert row.reason == ("cross-attention" if is_known else "layout-unknown")


# Tokens in another order, and tokens that are no cells


def specials_per_frame(m: Any, video: Tensor) -> Tensor:
    x = m.tokens(video.flatten(0, 1)).unflatten(0, video.shape[:2])
    x = torch.cat([m.special.expand(1, x.shape[1], -1, -1), x], 2)
    return m.attention(x.flatten(1, 2))


def interlaced_rows(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.patch(x).permute(0, 2, 3, 1)[:, m.rows].flatten(1, 2))


def blocks_in_window_order(m: Any, x: Tensor) -> Tensor:
    groups = m.tokens(x).view(-1, H * W // 4, 4, C)
    return m.attention(groups[:, m.blocks].reshape(-1, H * W, C))


def table_of_windows(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.tokens(x)[:, m.windows.flatten()])


def rolled_with_residual(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return tokens + m.attention(tokens.roll(5, 1))


def flipped_with_positions(m: Any, x: Tensor) -> Tensor:
    return m.attention((m.patch(x).flip(2).permute(0, 2, 3, 1) + m.plane).flatten(1, 2))


def permuted_with_residual(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return tokens + m.attention(tokens.index_select(1, m.order))


def shifted_mixture(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return m.attention(tokens + tokens.roll(1, 1)) + tokens


def stacked_images(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return m.attention((torch.stack([tokens, 2 * tokens], 1) + m.each).flatten(1, 2))


def two_inputs_stacked(m: Any, one: Tensor, other: Tensor) -> Tensor:
    return m.attention(torch.stack([m.tokens(one), m.tokens(other)], 1).flatten(1, 2))


def set_by_index(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    out = torch.empty_like(tokens)
    out[:, m.order] = tokens
    return m.attention(out)


def copied_by_index(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return m.attention(torch.empty_like(tokens).index_copy_(1, m.order, tokens))


def scattered(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    order = m.order[None, :, None].expand_as(tokens)
    return m.attention(torch.empty_like(tokens).scatter_(1, order, tokens))


def unknown_operator(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.tokens(x).sort(dim=1).values)


def sum_over_tokens(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.tokens(x).cumsum(1))


def repeated_tokens(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.tokens(x).repeat_interleave(2, 1))


def sorted_by_equal_numbers(m: Any, x: Tensor) -> Tensor:
    """What an unstable sort does to equal numbers differs from device to device."""
    return m.attention(m.tokens(x)[:, (torch.arange(H * W) // W).argsort()])


def codebooks(m: Any, codes: Tensor) -> Tensor:
    """[batch, length, codebooks]: interleaved into one sequence, which is no image."""
    return m.attention(m.words[codes].flatten(1, 2))


WINDOWS = torch.arange(H * W).view(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 16)
TENSORS = {
    "special": torch.randn(1, 1, 5, C),
    "rows": torch.cat([torch.arange(0, H, 2), torch.arange(1, H, 2)]),
    "blocks": permutation(H * W // 4),
    "windows": WINDOWS,
    "order": permutation(),
    "plane": torch.randn(1, H, W, C),
    "each": torch.randn(1, 2, 1, C),
    "words": torch.randn(10, C),
    "temporal": torch.randn(C, C, 3, 1),
    "projection": torch.randn(C, C, 1),
}


@pytest.mark.parametrize(
    ("step", "inputs"),
    [
        (specials_per_frame, [torch.randn(1, 4, 3, H, W)]),
        (interlaced_rows, [image()]),
        (blocks_in_window_order, [image()]),
        (table_of_windows, [image()]),
        (rolled_with_residual, [image()]),
        (flipped_with_positions, [image()]),
        (permuted_with_residual, [image()]),
        (shifted_mixture, [image()]),
        (stacked_images, [image()]),
        (set_by_index, [image()]),
        (copied_by_index, [image()]),
        (scattered, [image()]),
        (unknown_operator, [image()]),
        (sum_over_tokens, [image()]),
        (repeated_tokens, [image()]),
        (codebooks, [torch.randint(10, (1, 24, 4))]),
        (sorted_by_equal_numbers, [image()]),
    ],
)
def test_tokens_off_the_raster(step: Any, inputs: list[Tensor]) -> None:
    (row,) = explained(Model(step, **TENSORS), *inputs)
    assert row.reason == "layout-unknown"
    assert row.detail


def test_two_images_of_one_size_are_no_video() -> None:
    class Packed(Model):
        def forward(self, x: Tensor, img_ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.attention(x * img_ids.sum(-1, keepdim=True).cos())

    target, reference = flux_ids((6, 10)), flux_ids((6, 10))
    reference[:, 0] = 1
    (row,) = explained(Packed(two_views), torch.randn(1, 120, C), torch.cat([target, reference]))
    assert row.layout == "6x10 + 6x10"


def test_images_of_two_inputs_are_no_video() -> None:
    (row,) = explained(Model(two_inputs_stacked, **TENSORS), image(), image())
    assert row.layout == f"{H}x{W} + {H}x{W}"


# What is on its grid all the same


def sorted_by_equal_numbers_in_order(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.tokens(x)[:, (torch.arange(H * W) // W).argsort(stable=True)])


def split_and_joined(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return m.attention(torch.cat([tokens[:, :W] * 2, tokens[:, W:] * 3], 1))


def order_undone(m: Any, x: Tensor) -> Tensor:
    return m.attention(m.tokens(x)[:, m.order][:, m.order.argsort()])


def reordered_by_numbers(m: Any, x: Tensor) -> Tensor:
    order = torch.arange(H * W).view(H, W).flip(0).flip(0).flatten()
    return m.attention(m.tokens(x)[:, order])


def written_in_halves(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    out = torch.empty_like(tokens)
    out[..., 0::2] = tokens[..., 1::2]
    out[..., 1::2] = tokens[..., 0::2]
    return m.attention(out)


def pooled_token_before(m: Any, x: Tensor) -> Tensor:
    tokens = m.tokens(x)
    return m.attention(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 1:]


def two_images_in_a_batch(m: Any, one: Tensor, other: Tensor) -> Tensor:
    return m.attention(torch.cat([m.tokens(one), m.tokens(other)]))


def pooled_grid(m: Any, x: Tensor) -> Tensor:
    return m.attention(avg_pool2d(m.patch(x), 2).flatten(2).transpose(1, 2))


def frames_by_flat_image(m: Any, video: Tensor) -> Tensor:
    """A 2-D convolution over [batch, C, frames, H * W] does not hide the grid of them."""
    x = video.flatten(3)
    return m.attention(conv2d(x, m.temporal, padding=(1, 0)).flatten(2).transpose(1, 2))


def flat_projection(m: Any, x: Tensor) -> Tensor:
    return m.attention(conv1d(m.patch(x).flatten(2), m.projection).transpose(1, 2))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("step", "inputs", "grid", "prefix"),
    [
        (split_and_joined, [image()], (H, W), 0),
        (order_undone, [image()], (H, W), 0),
        (reordered_by_numbers, [image()], (H, W), 0),
        (sorted_by_equal_numbers_in_order, [image()], (H, W), 0),
        (written_in_halves, [image()], (H, W), 0),
        (pooled_token_before, [image()], (H, W), 1),
        (two_images_in_a_batch, [image(), image()], (H, W), 0),
        (pooled_grid, [image()], (H // 2, W // 2), 0),
        (flat_projection, [image()], (H, W), 0),
        (frames_by_flat_image, [torch.randn(1, C, 4, H, W)], (4, H, W), 0),
    ],
)
def test_tokens_on_their_grid(
    step: Any,
    inputs: list[Tensor],
    grid: tuple[int, ...],
    prefix: int,
    dynamic: bool,
) -> None:
    torch.manual_seed(1)
    model = Model(step, **TENSORS).eval()
    run = torch.compile(model, backend="gna", options=OPTIONS, dynamic=dynamic)
    with torch.no_grad():
        actual, dense = run(*inputs), model(*inputs)
        model.mask = grid_mask(grid, tuple(n // 2 for n in grid), prefix=prefix)
        expected = model(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense, expected, rtol=1e-3, atol=1e-3)


def test_a_buffer_that_moves_tokens_is_compared_at_every_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever changes it: `.data` leaves neither another object nor another version."""
    model = Model(lambda m, x: m.attention(m.tokens(x)[:, m.order]), order=torch.arange(H * W))
    run, x = compiled(model), image()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "gna_compile"):
        assert not torch.allclose(run(x), model(x), rtol=1e-3, atol=1e-3)
        buffer: Any = model.order
        buffer.data.copy_(permutation())
        torch.testing.assert_close(run(x), model(x))
        torch.testing.assert_close(run(x), model(x))
    assert [record.message for record in caplog.records if "buffer" in record.message] == [
        "a buffer with the order of the tokens has changed since this graph was compiled; "
        "using dense attention. Compile the model again"
    ]


@pytest.mark.parametrize("size", [(1, 12), (12, 1)])
def test_an_axis_of_one_cell_is_an_axis(size: tuple[int, int]) -> None:
    model = Model(lambda m, x: m.attention(m.tokens(x)))
    (row,) = explained(model, torch.randn(1, 3, *size))
    assert row.layout == "x".join(map(str, size))


def test_a_mistake_in_the_analysis_costs_no_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("gna_compile.graph.tokens.layouts.read", broken)
    model = Model(lambda m, x: m.attention(m.tokens(x)))
    with caplog.at_level(logging.WARNING, "gna_compile"):
        (row,) = explained(model, image())
    assert row.reason == "layout-unknown"
    assert row.detail == "following the tokens failed: ZeroDivisionError: by nothing"
    assert any("Please report it" in record.message for record in caplog.records)
