"""What looks like evidence of a grid and is none, and operators that bring in other tokens unseen.

The neighbors of a real model's code: each case differs from a rewritten model in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import flux_ids
from one_pixel_vit import (
    OPTIONS,
    POLICY,
    C,
    H,
    Model,
    W,
    compiled,
    explained,
    image,
    permutation,
)
from torch import Tensor, nn

N = H * W
Step = Callable[..., Tensor]


def flipped(x: Tensor) -> Tensor:
    return x.flip(1)


def picked_by_embedding(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    return m.attention(F.embedding(m.order, t[0])[None] + t)


def sampled_around(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    return m.attention(t + torch.normal(flipped(t), 0.0 * t.abs()))


def scattered_onto(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    index = torch.arange(N)[None, :, None].expand_as(t)
    return m.attention(flipped(t).scatter(1, index, t, reduce="add"))


def weighed_by_tokens(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    return m.attention(F.linear(t.mT, (flipped(t) @ t.mT)[0]).mT)


def biased_by_tokens(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    return m.attention(t + torch.addmm(flipped(t)[0], t[0], m.square)[None])


def filled_where_others_are(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    return m.attention(t.masked_fill(flipped(t) > 0, 0.0) + t)


def normalized_by_tokens(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)[0].mT  # [C, N]: a weight for each token
    return m.attention(F.layer_norm(t, (N,), weight=t.flip(1)[0]).mT[None] + m.tokens(x))


def sorted_by_a_product(m: Any, x: Tensor) -> Tensor:
    t = m.tokens(x)
    return m.attention(F.one_hot(t[..., 0].argsort(1), N).float() @ t)


def sorted_then_placed(m: Any, x: Tensor, places: Tensor) -> Tensor:
    sorting = F.one_hot(x[..., 0].argsort(1), N).float()
    return m.attention(sorting @ x + m.tokens(places))


def mixed_then_placed(m: Any, x: Tensor, places: Tensor) -> Tensor:
    return m.attention(m.mixing @ x + m.tokens(places))


def written_through_an_expanded_twin(m: Any, x: Tensor) -> Tensor:
    one, other = m.tokens(x).clone().expand(2, -1, -1).unbind(0)
    one.copy_(one[m.order].clone())
    return m.attention(other[None])


def order_written_row_by_row(m: Any, x: Tensor) -> Tensor:
    order = torch.arange(N).view(H, W)
    for row in order.unbind(0)[1::2]:
        row.copy_(row.flip(0))
    return m.attention(m.tokens(x)[:, order.flatten()])


def order_written_in_halves(m: Any, x: Tensor) -> Tensor:
    order = torch.arange(N)
    first, second = order.chunk(2)
    first += N // 2
    second -= N // 2
    return m.attention(m.tokens(x)[:, order])


def frames_for_heads_and_shifted_channels(m: Any, video: Tensor) -> Tensor:
    t = m.tokens(video)[None]
    t = torch.cat([t[..., : C // 2], t[..., C // 2 :].roll(1, 1)], -1)
    return F.scaled_dot_product_attention(t, t.roll(1, 1), t.roll(1, 1))


@pytest.mark.parametrize(
    ("step", "inputs"),
    [
        *(
            (step, [image()])
            for step in (
                *(picked_by_embedding, sampled_around, scattered_onto, weighed_by_tokens),
                *(biased_by_tokens, filled_where_others_are, normalized_by_tokens),
                *(sorted_by_a_product, written_through_an_expanded_twin),
                *(order_written_row_by_row, order_written_in_halves),
            )
        ),
        (sorted_then_placed, [torch.randn(1, N, C), image()]),
        (mixed_then_placed, [torch.randn(1, N, C), image()]),
        (frames_for_heads_and_shifted_channels, [image(4)]),
    ],
)
def test_other_tokens_come_in_unseen(step: Step, inputs: list[Tensor]) -> None:
    tensors = {"order": permutation(), "square": torch.randn(C, C), "mixing": torch.randn(N, N)}
    (row,) = explained(Model(step, **tensors), *inputs)
    assert row.reason in ("layout-unknown", "cross-attention"), row.layout


def test_tokens_picked_by_embedding_keep_their_places() -> None:
    def half_by_embedding(m: Any, x: Tensor) -> Tensor:
        t = m.tokens(x)
        upper = F.embedding(torch.arange(N // 2), t[0])[None]
        return m.attention(torch.cat([upper, t[:, N // 2 :]], 1))

    (row,) = explained(Model(half_by_embedding), image())
    assert row.layout == f"{H}x{W}"


def test_one_region_called_with_two_orders() -> None:
    class Block(Model):
        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[:, self.order])  # type: ignore[index]

    class Both(Model):
        def __init__(self) -> None:
            super().__init__(lambda m, x: x)
            self.straight = Block(lambda m, x: x, order=torch.arange(N))
            self.shuffled = Block(lambda m, x: x, order=permutation())

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.straight(self.tokens(x)) + self.shuffled(self.tokens(x))

    for row in explained(Both(), image()):
        assert row.reason == "layout-unknown"


# Dimensions that are no axes


def frames_by_flat_patches(m: Any, features: Tensor) -> Tensor:
    return m.attention(m.pointwise(features.permute(0, 3, 1, 2)).flatten(2).mT)


def unflattened_frames(m: Any, features: Tensor) -> Tensor:
    return frames_by_flat_patches(m, features.unflatten(1, (4, 36)))


def learned_tables(m: Any, x: Tensor) -> Tensor:
    frames, patches = m.frames(torch.arange(4)), m.patches(torch.arange(36))
    return m.attention(x + (frames[:, None] + patches[None]).flatten(0, 1))


def added_tables(m: Any, x: Tensor) -> Tensor:
    return m.attention(x + (m.agents[:, None] + m.times[None]).flatten(0, 1))


def merged_neighbors(m: Any, x: Tensor) -> Tensor:
    x = x.unflatten(1, (4, 2)).mean(2).unflatten(2, (9, 4)).flatten(3)
    return m.attention(m.merge(x).flatten(1, 2))


def images_stacked_on_channels(m: Any, x: Tensor) -> Tensor:
    x = m.strided(x.unflatten(1, (2, 3)).flatten(0, 1)).unflatten(0, (1, -1))
    return m.attention(x.permute(0, 1, 3, 4, 2).flatten(1, 3))


def a_token_for_each_channel(m: Any, x: Tensor) -> Tensor:
    x = m.of_one(x.transpose(0, 1)).unflatten(0, (1, 3))
    return m.attention(x.permute(0, 1, 3, 4, 2).flatten(1, 3))


@pytest.mark.parametrize(
    ("step", "inputs"),
    [
        (frames_by_flat_patches, [torch.randn(1, 4, 36, C)]),
        (unflattened_frames, [torch.randn(1, 144, C)]),
        (learned_tables, [torch.randn(1, 144, C)]),
        (added_tables, [torch.randn(1, 60, C)]),
        (merged_neighbors, [torch.randn(1, 8, 36, C)]),
        (images_stacked_on_channels, [torch.randn(1, 6, 16, 24)]),
        (a_token_for_each_channel, [torch.randn(1, 3, 16, 24)]),
    ],
)
def test_dimensions_that_are_no_axes(step: Step, inputs: list[Tensor]) -> None:
    model = Model(step, agents=torch.randn(6, C), times=torch.randn(10, C))
    for name in ("agents", "times"):  # buffers, as tables that are computed once are
        value = getattr(model, name).data
        delattr(model, name)
        model.register_buffer(name, value)
    model.pointwise = nn.Conv2d(C, C, 1)
    model.frames, model.patches = nn.Embedding(4, C), nn.Embedding(36, C)
    model.merge = nn.Linear(4 * C, C)
    model.strided, model.of_one = nn.Conv2d(3, C, 2, 2), nn.Conv2d(1, C, 2, 2)
    (row,) = explained(model, *inputs)
    assert row.reason == "layout-unknown", row.layout


def turned(m: Any, x: Tensor) -> Tensor:
    """Attention over 144 tokens whose queries and keys are turned by their places in a 12 x 12 grid."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    angles = torch.cat(
        [rows.flatten()[:, None].expand(-1, 4), columns.flatten()[:, None].expand(-1, 4)], -1
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat([-second, first], -1) * sin

    query, key, value = m.qkv(x).chunk(3, -1)
    return F.scaled_dot_product_attention(turn(query)[:, None], turn(key)[:, None], value[:, None])


def strips(m: Any, x: Tensor) -> Tensor:
    return turned(m, m.strip(m.patch(x).permute(0, 2, 3, 1).flatten(2)))


def pooled_rows(m: Any, x: Tensor) -> Tensor:
    return turned(m, m.strip(x.permute(0, 2, 3, 1).flatten(2).repeat(1, 1, 6)[..., : 4 * C]))


@pytest.mark.parametrize(
    ("step", "given", "expected"),
    [
        (turned, torch.randn(1, 144, C), "12x12"),
        (strips, torch.randn(1, 3, 144, 4), "layout-unknown"),
        (pooled_rows, torch.randn(1, 3, 144, 4), "layout-unknown"),
    ],
)
def test_positions_do_not_split_an_axis_of_an_image(
    step: Step, given: Tensor, expected: str
) -> None:
    model = Model(step)
    model.strip = nn.Linear(4 * C, C)
    (row,) = explained(model, given)
    assert (row.reason or row.layout) == expected


@pytest.mark.parametrize(("is_mixed", "expected"), [(True, "layout-unknown"), (False, "8x12")])
def test_mixed_frames_stay_mixed_where_heads_and_frames_are_one_dimension(
    is_mixed: bool, expected: str
) -> None:
    def sequence_first(t: Tensor) -> Tensor:
        frames, tokens, _ = t.shape
        return t.transpose(0, 1).reshape(tokens, frames * 2, C // 2).transpose(0, 1)

    def step(m: Any, video: Tensor) -> Tensor:
        x = m.patch(video.permute(0, 2, 1, 3, 4).flatten(0, 1)).flatten(2).mT
        if is_mixed:
            x = x + x.clone().index_copy_(0, torch.tensor([1, 0, 2]), x)
        query, key, value = map(sequence_first, m.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value)

    (row,) = explained(Model(step), torch.randn(1, 3, 3, H, W))
    assert (row.reason or row.layout) == expected


def mean_of_frames(m: Any, frames: Tensor) -> Tensor:
    return frames.mean(2).flatten(2).mT


def frames_as_channels(m: Any, frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 4, 2, 1).flatten(1, 2).flatten(2)


def weighed_frames(m: Any, frames: Tensor) -> Tensor:
    return m.square(frames_as_channels(m, frames))


def frames_in_rows_and_channels(m: Any, frames: Tensor) -> Tensor:
    """Rows of a batch, each of a frame, in [batch * heads, tokens, head_dim]."""
    return (
        frames.repeat_interleave(2, 2)
        .unflatten(2, (2, -1))
        .permute(2, 0, 4, 5, 3, 1)[:, 0]
        .flatten(1, 2)
        .flatten(2)
    )


@pytest.mark.parametrize(
    ("others", "expected"),
    [(slice(0, 2), "8x12"), (slice(2, 4), "cross-attention"), (slice(1, 3), "cross-attention")],
)
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    "pooled", [mean_of_frames, frames_as_channels, weighed_frames, frames_in_rows_and_channels]
)
def test_sums_of_some_frames_are_not_sums_of_others(
    pooled: Step, rank: int, others: slice, expected: str
) -> None:
    def step(m: Any, video: Tensor) -> Tensor:
        x = m.patch(video)
        query, key = pooled(m, x[:, :, 0:2]), pooled(m, x[:, :, others])
        if rank == 4:
            query, key = query[:, None], key[:, None]
        return F.scaled_dot_product_attention(query, key, key)

    model = Model(step)
    model.patch, model.square = nn.Conv3d(3, C, (1, 2, 2), (1, 2, 2)), nn.Linear(2 * C, 2 * C)  # type: ignore[assignment]
    (row,) = explained(model, torch.randn(1, 3, 4, 2 * H, 2 * W))
    assert (row.reason or row.layout) == expected


def test_a_condition_pooled_of_some_tokens_leaves_the_others_theirs() -> None:
    def step(m: Any, x: Tensor, text: Tensor) -> Tensor:
        t = m.tokens(x)
        return m.attention(t * (t[:, 5:].mean(1) + text[:, 1:].mean(1))[:, None])

    (row,) = explained(Model(step), image(), torch.randn(1, 7, C))
    assert row.layout == "8x12"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("first", "last"), [("mean", "zeros"), ("zeros", "mean"), ("mean", "mean")]
)
def test_a_mean_of_all_tokens_is_a_global_token(first: str, last: str, batch: int) -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        t = m.tokens(x)
        tokens = {"mean": t.mean(1, keepdim=True), "zeros": torch.zeros(t.shape[0], 1, C)}
        return m.attention(torch.cat([tokens[first], t, tokens[last]], 1))

    (row,) = explained(Model(step), image(batch))
    assert row.layout == "1 + 8x12 + 1"


def shuffled_pixels(m: Any, flat: Tensor, x: Tensor) -> Tensor:
    """A flat sequence viewed as a plane, each of its places split into four."""
    plane = flat.unflatten(1, (H // 2, W // 2)).unflatten(-1, (2, 2, C))
    tokens = plane.permute(0, 1, 3, 2, 4, 5).reshape(1, H * W, C)
    return m.attention(torch.cat([tokens, m.tokens(x)], 1))


def text_before(m: Any, flat: Tensor, x: Tensor) -> Tensor:
    return m.attention(torch.cat([flat[..., :C], m.tokens(x)], 1))


@pytest.mark.parametrize(
    ("step", "expected"), [(shuffled_pixels, "layout-unknown"), (text_before, "24 + 8x12")]
)
def test_what_was_viewed_as_a_plane_is_no_global_token(step: Step, expected: str) -> None:
    (row,) = explained(Model(step), torch.randn(1, H * W // 4, 4 * C), image())
    assert (row.reason or row.layout) == expected


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (lambda video, image: video[:, :, 0] + image, "3x8x12"),
        (
            lambda video, image: video[:, :, 0] + F.pad(image[..., -1:, -1:], (0, W - 1, 0, H - 1)),
            "",
        ),
        (lambda video, image: video[:, :, 0] + image[..., 2:3, 2:3], ""),
    ],
)
def test_a_lattice_is_added_to_whole_slices_of_another(added: Any, expected: str) -> None:
    def step(m: Any, video: Tensor, x: Tensor) -> Tensor:
        first = added(video, x)[:, :, None]
        return m.attention(m.volume(torch.cat([first, video[:, :, 1:]], 2)).flatten(2).mT)

    model = Model(step)
    model.volume = nn.Conv3d(3, C, 1)
    (row,) = explained(model, torch.randn(1, 3, 3, H, W), image())
    assert row.layout == expected


@pytest.mark.parametrize(
    ("added", "to", "expected"),
    [
        (slice(0, 2), slice(1, 3), "3x8x12"),
        (slice(0, 1), slice(2, 3), "3x8x12"),
        (slice(0, 2), slice(0, 3, 2), ""),
    ],
)
def test_frames_are_added_to_some_frames(added: slice, to: slice, expected: str) -> None:
    def step(m: Any, video: Tensor, pose: Tensor) -> Tensor:
        frames = m.volume(video)
        frames = torch.slice_scatter(
            frames,
            frames[:, :, to] + m.other(pose[:, :, added]),
            2,
            to.start,
            to.stop,
            to.step or 1,
        )
        return m.attention(frames.flatten(2).mT)

    model = Model(step)
    model.volume, model.other = nn.Conv3d(3, C, 1), nn.Conv3d(3, C, 1)
    (row,) = explained(model, torch.randn(1, 3, 3, H, W), torch.randn(1, 3, 2, H, W))
    assert row.layout == expected


def flat_frames(x: Tensor) -> Tensor:
    return x.flatten(3)


def frames_over_rows(x: Tensor) -> Tensor:
    return x.flatten(2, 3)


def windows(x: Tensor) -> Tensor:
    x = x[:, :, 0].unflatten(2, (3, 2)).unflatten(4, (3, 2))
    return x.permute(0, 1, 2, 4, 3, 5).flatten(2, 3)


def flipped_copies(x: Tensor) -> Tensor:
    return torch.stack([x[:, :, 0], x[:, :, 0].flip(-1)], 2)


def shuffled(x: Tensor) -> Tensor:
    return x[:, :, 0].flatten(2)[:, :, permutation(36)].unflatten(2, (6, 6))


@pytest.mark.parametrize(
    "hand_over", [flat_frames, frames_over_rows, windows, flipped_copies, shuffled]
)
@pytest.mark.parametrize("way", ["graph break", "block alone"])
def test_what_parts_of_a_model_hand_over_is_no_image(hand_over: Any, way: str) -> None:
    class Part(Model):
        def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.attention(y.flatten(2).mT)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Part(lambda m, x: x)})])

        def forward(self, x: Tensor) -> Tensor:
            y = hand_over(x)
            if way == "graph break":
                torch._dynamo.graph_break()
            return self.blocks[0]["attn"](y)  # type: ignore[index]

    model, x = Whole().eval(), torch.randn(1, C, 4, 6, 6)
    with torch.no_grad():
        expected = model(x)
        if way == "graph break":
            got = compiled(model)(x)
        else:
            model.blocks[0]["attn"].compile(backend="gna", options=OPTIONS)  # type: ignore[index]
            got = model(x)
    torch.testing.assert_close(got, expected)


# Position ids that the model replaces


def overwritten(ids: Tensor) -> Tensor:
    ids, n = ids.clone(), torch.arange(len(ids))
    ids[:, 1] = n // 16
    ids[:, 2] = n % 16
    return ids


def restacked(ids: Tensor) -> Tensor:
    n = torch.arange(len(ids))
    return torch.stack([ids[:, 0], n // 16, n % 16], 1)


def time_alone(ids: Tensor) -> Tensor:
    return ids[:, :1].expand(-1, 3)


@pytest.mark.parametrize("replaced", [overwritten, restacked, time_alone, None])
def test_position_ids_count_if_they_are_used(replaced: Any) -> None:
    class Turned(Model):
        def forward(self, x: Tensor, img_ids: Tensor) -> Tensor:  # type: ignore[override]
            ids = img_ids if replaced is None else replaced(img_ids)
            query, key, value = self.qkv(x).chunk(3, -1)
            turn = self.places(ids).cos()  # type: ignore[operator]
            query, key, value = (t[:, None] for t in (query * turn, key * turn, value))
            return F.scaled_dot_product_attention(query, key, value)

    model = Turned(lambda m, x: x)
    model.places = nn.Linear(3, C)
    (row,) = explained(model, torch.randn(1, 64, C), flux_ids((8, 8)))
    assert row.layout == ("8x8" if replaced is None else "")


# Sizes


@pytest.mark.parametrize(
    ("shift", "first", "second"),
    [
        (lambda h: h // 100 * 3, 16, 200),
        (lambda h: torch.sym_max(h - 70, 0), 16, 80),
        (lambda h: torch.sym_max(20 - h, 0), 24, 16),
        (lambda h: h % 2, 16, 17),
        (lambda h: (h + 1) // 2 - h // 2, 16, 17),
        (lambda h: h % 24 // 20, 16, 22),
    ],
)
def test_a_shift_that_other_sizes_have(shift: Any, first: int, second: int) -> None:
    def shifted(m: Any, x: Tensor) -> Tensor:
        t = m.patch(x)
        return m.attention(t.roll(shift(t.shape[2]), 2).flatten(2).mT)

    model = Model(shifted)
    run = torch.compile(model.eval(), backend="gna", options=OPTIONS, dynamic=True)
    with torch.no_grad():
        x = torch.randn(1, 3, first, 6)
        assert not torch.allclose(run(x), model(x), atol=1e-3)
        x = torch.randn(1, 3, second, 6)
        torch.testing.assert_close(run(x), model(x))


def test_a_layout_of_some_sizes_only_does_not_break_a_marked_size() -> None:
    model = Model(lambda m, x: m.attention(m.patch(x)[:, :, :4, :6].flatten(2).mT))
    x = image()
    for dim in (2, 3):
        torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


def test_the_policy_of_these_tests_rewrites() -> None:
    assert POLICY["min_speedup"] == 0
    (row,) = explained(Model(lambda m, x: m.attention(m.tokens(x))), image())
    assert row.layout == f"{H}x{W}"
