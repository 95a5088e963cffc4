"""Token layouts from data flow: what counts as a grid, what does not, and what a declaration does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import flux_ids
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.checkpoint import checkpoint

from gna_compile.graph.sites.find import find_sites
from gna_compile.graph.tokens.declared import resolve
from gna_compile.graph.tokens.layouts import Layout, TokenFlow
from gna_compile.graph.tokens.position_ids import one_grid, pieces_of
from gna_compile.policy import DeclaredLayout
from gna_compile.reasons import Decline, Reason

WIDTH = 8


@dataclass
class Seen:
    """What the graph of a function shows of its attention sites, in order."""

    relations: list[str]
    layouts: list[Layout | Decline]
    resolved: list[Layout | Decline]

    @property
    def texts(self) -> list[str]:
        return [text(layout) for layout in self.layouts]


def text(layout: Layout | Decline) -> str:
    if isinstance(layout, Decline):
        return layout.reason.value
    grid = "x".join(str(_hint(size)) for size in layout.grid)
    return f"{_hint(layout.prefix)}+{grid}+{_hint(layout.suffix)}"


def grid_from_ids(ids: Tensor) -> tuple[int, int] | None:
    return one_grid(pieces_of(ids))


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else size.node.hint


def look(
    function: Callable[..., Any],
    *inputs: Any,
    declared: DeclaredLayout | None = None,
    global_tokens: str | None = None,
    dynamic: bool = False,
) -> Seen:
    """Traces `function` with Dynamo and asks the flow about every site of the first graph."""
    found: list[Seen] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        flow, sites = TokenFlow(gm, example_inputs), find_sites(gm)
        found.append(
            Seen(
                [flow.relation(site) for site in sites],
                [flow.layout(site) for site in sites],
                [resolve(site, flow, declared, global_tokens) for site in sites],
            )
        )
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    return found[0]


def self_attention(tokens: Tensor) -> Tensor:
    """Tokens [batch, tokens, WIDTH], one head."""
    x = tokens.unsqueeze(1)
    return attend(x, x, x).squeeze(1)


def image(height: int = 6, width: int = 10) -> Tensor:
    return torch.randn(1, WIDTH, height, width)


def flattened(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


# What shows a grid


def by_flatten(x: Tensor) -> Tensor:
    return self_attention(flattened(x))


def by_permuted_reshape(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return self_attention(x.permute(0, 2, 3, 1).reshape(batch, height * width, channels))


def by_convolution(x: Tensor) -> Tensor:
    weight = torch.ones(WIDTH, WIDTH, 2, 2)
    return self_attention(flattened(nn.functional.conv2d(x, weight, stride=2)))


def by_unpatchify(tokens: Tensor) -> Tensor:
    """[1, 60, WIDTH]: the tokens become an image of 6x10 patches of 2x2 pixels at the end."""
    x = self_attention(tokens).reshape(1, 6, 10, 2, 2, WIDTH // 4)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(1, WIDTH // 4, 12, 20)


def by_rope_table(tokens: Tensor) -> Tensor:
    rows, columns = torch.arange(6.0), torch.arange(10.0)
    angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    turned = tokens * angles.repeat(1, WIDTH // 2).cos()
    return attend(turned[:, None], turned[:, None], tokens[:, None])[:, 0]


def with_class_token(x: Tensor) -> Tensor:
    return self_attention(torch.cat([torch.zeros(1, 1, WIDTH), flattened(x)], dim=1))


def with_text_behind(x: Tensor) -> Tensor:
    return self_attention(torch.cat([flattened(x), torch.zeros(1, 7, WIDTH)], dim=1))


def through_a_checkpoint(x: Tensor) -> Tensor:
    return checkpoint(self_attention, flattened(x), use_reentrant=False)


def split_off_and_joined_again(x: Tensor) -> Tensor:
    text = torch.zeros(1, 7, WIDTH)
    joint = self_attention(torch.cat([text, flattened(x)], dim=1))
    text, tokens = joint[:, :7], joint[:, 7:]
    return self_attention(torch.cat([tokens * 2, text + 1], dim=1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (by_flatten, image(), ["0+6x10+0"]),
        (by_flatten, torch.randn(1, WIDTH, 3, 6, 10), ["0+3x6x10+0"]),
        (by_flatten, torch.randn(1, WIDTH, 1, 6, 10), ["0+1x6x10+0"]),
        (by_permuted_reshape, image(), ["0+6x10+0"]),
        (by_convolution, image(), ["0+3x5+0"]),
        (with_class_token, image(), ["1+6x10+0"]),
        (with_text_behind, image(), ["0+6x10+7"]),
        (through_a_checkpoint, image(), ["0+6x10+0"]),
        (split_off_and_joined_again, image(), ["7+6x10+0", "0+6x10+7"]),
    ],
)
def test_shown_by_the_graph(
    function: Any, inputs: Tensor, expected: list[str], dynamic: bool
) -> None:
    assert look(function, inputs, dynamic=dynamic).texts == expected


@pytest.mark.parametrize("function", [by_unpatchify, by_rope_table])
def test_shown_further_on_or_beside(function: Any) -> None:
    assert look(function, torch.randn(1, 60, WIDTH)).texts == ["0+6x10+0"]


def test_symbols_stay_symbols() -> None:
    (layout,) = look(by_convolution, image(12, 20), dynamic=True).layouts
    assert isinstance(layout, Layout)
    assert all(isinstance(size, torch.SymInt) for size in layout.grid)


# What does not


def split_into_blocks(tokens: Tensor) -> Tensor:
    """A sequence cut into blocks for some work of its own: 60 = 6 x 10, and no grid."""
    x = tokens.reshape(1, 6, 10, WIDTH).cumsum(2).reshape(1, 60, WIDTH)
    return self_attention(x)


def of_batch_and_channels(x: Tensor) -> Tensor:
    """[6, 10, 60, WIDTH]: batch times heads happens to be the number of tokens."""
    return attend(x, x, x)


def rolled(x: Tensor) -> Tensor:
    return self_attention(flattened(x).roll(3, dims=1))


def flipped(x: Tensor) -> Tensor:
    return self_attention(flattened(x).flip(1))


def permuted(x: Tensor) -> Tensor:
    return self_attention(flattened(x)[:, torch.randperm(60)])


def in_both_orders(x: Tensor) -> Tensor:
    rows, columns = flattened(x), flattened(x.transpose(2, 3))
    return self_attention(rows + columns)


def two_images(x: Tensor) -> Tensor:
    return self_attention(torch.cat([flattened(x), flattened(x * 2)], dim=1))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (self_attention, torch.randn(1, 60, WIDTH)),
        (split_into_blocks, torch.randn(1, 60, WIDTH)),
        (of_batch_and_channels, torch.randn(6, 10, 60, WIDTH)),
        (rolled, image()),
        (flipped, image()),
        (permuted, image()),
        (in_both_orders, image()),
        (two_images, image()),
    ],
)
def test_refused(function: Any, inputs: Tensor) -> None:
    (layout,) = look(function, inputs).layouts
    assert isinstance(layout, Decline)
    assert layout.reason is Reason.LAYOUT_UNKNOWN


def test_transposed_tokens_lie_on_the_transposed_grid() -> None:
    seen = look(lambda x: by_flatten(x.transpose(2, 3)), image())
    assert seen.texts == ["0+10x6+0"]


def test_window_partition_and_its_reversal_keep_the_grid() -> None:
    def swin(x: Tensor) -> Tensor:
        windows = x.reshape(1, WIDTH, 3, 2, 2, 5).permute(0, 2, 4, 3, 5, 1)
        inner = self_attention(windows.reshape(6, 10, WIDTH))
        whole = inner.reshape(1, 3, 2, 2, 5, WIDTH).permute(0, 5, 1, 3, 2, 4)
        return by_flatten(whole.reshape(1, WIDTH, 6, 10))

    assert look(swin, image()).texts == ["0+2x5+0", "0+6x10+0"]


# Queries and keys


def test_relations() -> None:
    def attentions(x: Tensor, same_size: Tensor, text: Tensor) -> Any:
        own = flattened(x).unsqueeze(1)
        return (
            attend(own, own * 2, own + 1),
            attend(own, same_size.unsqueeze(1), same_size.unsqueeze(1)),
            attend(own, text.unsqueeze(1), text.unsqueeze(1)),
        )

    seen = look(attentions, image(), torch.randn(1, 60, WIDTH), torch.randn(1, 7, WIDTH))
    assert seen.relations == ["self", "unknown", "cross"]


# Declared layouts


@pytest.mark.parametrize(
    ("grid", "prefix", "suffix", "global_tokens", "tokens", "expected"),
    [
        ((4, 8), None, None, None, 32, "0+4x8+0"),
        ((4, 8), None, None, None, 33, None),
        ((4, 8), None, None, None, 31, None),
        ((4, 8), 5, None, None, 37, "5+4x8+0"),
        ((4, 8), 5, None, None, 38, None),
        ((4, 8), 1, 2, None, 35, "1+4x8+2"),
        ((4, 8), None, None, "prefix", 40, "8+4x8+0"),
        ((4, 8), None, None, "suffix", 40, "0+4x8+8"),
        ((4, 8), None, None, "suffix", 32, "0+4x8+0"),
        ((4, 8), None, None, "prefix", 31, None),
        ((4, 8), None, None, "none", 40, None),
        ((4, 8), 5, None, "prefix", 40, None),
    ],
)
def test_a_declared_layout_must_fit_the_tokens(
    grid: tuple[int, ...],
    prefix: int | None,
    suffix: int | None,
    global_tokens: str | None,
    tokens: int,
    expected: str | None,
) -> None:
    declared = DeclaredLayout.of_grid(grid, prefix, suffix)
    inputs = torch.randn(1, tokens, WIDTH)
    (layout,) = look(
        self_attention, inputs, declared=declared, global_tokens=global_tokens
    ).resolved
    assert text(layout) == (expected or "layout-mismatch")


@pytest.mark.parametrize(
    ("grid", "expected"), [((6, 10), "7+6x10+0"), ((10, 6), "layout-mismatch")]
)
def test_a_declared_layout_must_not_contradict_the_graph(
    grid: tuple[int, ...], expected: str
) -> None:
    def with_text(x: Tensor) -> Tensor:
        return self_attention(torch.cat([torch.zeros(1, 7, WIDTH), flattened(x)], dim=1))

    (layout,) = look(with_text, image(), declared=DeclaredLayout.of_grid(grid)).resolved
    assert text(layout) == expected


def test_the_side_of_global_tokens_must_not_contradict_the_graph() -> None:
    (layout,) = look(with_text_behind, image(), global_tokens="prefix").resolved
    assert text(layout) == "layout-mismatch"


# Position ids


def with_ids(tokens: Tensor, img_ids: Tensor) -> Tensor:
    return self_attention(tokens * img_ids.sum(-1, keepdim=True).cos())


def test_position_ids_show_a_grid_by_their_values() -> None:
    (layout,) = look(with_ids, torch.randn(1, 60, WIDTH), flux_ids((6, 10))).layouts
    assert text(layout) == "0+6x10+0"
    assert isinstance(layout, Layout)
    assert layout.ids
    (layout,) = look(with_ids, torch.randn(1, 60, WIDTH), flux_ids((10, 6))).layouts
    assert text(layout) == "0+10x6+0"


@given(
    grid=st.lists(st.integers(2, 6), min_size=2, max_size=2),
    start=st.integers(-3, 3),
    step=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    columns=st.sampled_from([3, 4]),
)
def test_only_a_raster_is_a_grid(
    grid: list[int], start: int, step: int, seed: int, columns: int
) -> None:
    axes = torch.meshgrid(*(start + step * torch.arange(n) for n in grid), indexing="ij")
    ids = torch.full((grid[0] * grid[1], columns), 7)
    ids[:, 1:3] = torch.stack([axis.flatten() for axis in axes], dim=-1)
    assert grid_from_ids(ids) == tuple(grid)
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    if not torch.equal(shuffled, ids):
        assert grid_from_ids(shuffled) is None
    assert grid_from_ids(ids[:-1]) is None
    for column in {0, columns - 1} - {2}:  # images, or places in a sequence, are no axis
        more = ids.clone()
        more[:, column] = torch.arange(len(ids)) // grid[1]
        assert grid_from_ids(more) is None


def test_ids_that_enumerate_show_nothing() -> None:
    enumeration = torch.stack([torch.zeros(12), torch.zeros(12), torch.arange(12.0)], dim=-1)
    assert grid_from_ids(enumeration) is None
    assert grid_from_ids(torch.zeros(12, 3)) is None
    assert grid_from_ids(torch.zeros(0, 3)) is None
