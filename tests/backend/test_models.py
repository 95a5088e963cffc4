"""The models that other tests use: they run, and what they compute depends on their attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from math import prod

import pytest
import torch
from masked_model import (
    Call,
    attention_calls,
    layout_mask,
    layout_masks,
    masked,
    parse_layout,
    segments_of,
)
from models import HIDDEN_TEXT, MODELS, TEXT, TRUE_LAYOUTS, build, inputs_for, main_output
from torch import Tensor

# Read in the models' code, as TRUE_LAYOUTS are. Qwen's towers cut the batch into one attention per
# image (and per window) in Python.
SELF_ATTENTIONS = {
    "flux": [94] * 4,
    "flux-kontext": [174] * 4,
    "flux2": [94] * 4,
    "flux2-references": [204] * 4,
    "flux3": [14] * 2 + [80] * 2 + [94] * 2,
    "flux3-reference": [14] * 2 + [80] * 2 + [30] * 2 + [124] * 2,
    "sd3": [94, 80, 94],
    "pixart": [80] * 2,
    "qwen-image": [94] * 2,
    "sd-unet": [80, 20, 80, 80],
    "cogview3-plus": [94] * 2,
    "cogview4": [94] * 2,
    "glm-image": [94] * 2,
    "aura-flow": [102] * 4,
    "hunyuan-dit": [80] * 4,
    "dit": [100] * 2,
    "chroma": [94] * 4,
    "chroma-masked": [94] * 4,
    "longcat-image": [94] * 4,
    "ovis-image": [94] * 4,
    "bria": [94] * 4,
    "bria-fibo": [94] * 4,
    "qwen-image-edit": [124] * 2,
    "hunyuan-image": [14] + [100] * 4,
    "hunyuan-image-refiner": [14] + [94] * 4,
    "lumina2": [14, 80, 89, 89],
    "z-image": [96, 32, 128, 128],
    "z-image-padded": [96, 32, 128, 128],
    "hidream-image": [142] * 2,
    "hidream-image-padded": [162] * 2,
    "krea2": [3, 14, 94, 94],
    "ideogram4": [94] * 2,
    "prx": [],
    "ernie-image": [94] * 2,
    "sana": [],
    "omnigen": [95] * 2,
    "bria-fibo2": [80, 8, 88, 88],
    "bria-fibo2-edit": [110, 8, 118, 118],
    "nucleus-image": [],
    "joy-image-edit": [174] * 2,
    "joy-image-edit-plus": [124] * 2,
    "dreamlite": [80] * 4,
    "lumina-next": [80] * 2,
    "transformer-2d": [80] * 2,
    "qwen-image-21": [14] * 2,
    "hunyuan-video": [14] + [254] * 4,
    "wan": [240] * 2,
    "wan-i2v": [240] * 2,
    "wan-vace": [240] * 3,
    "wan-animate": [240] * 2,
    "chrono-edit": [96] * 2,
    "skyreels-v2": [240] * 2,
    "skyreels-v2-causal": [192] * 2,
    "cosmos": [240] * 2,
    "cogvideox": [254] * 2,
    "consis-id": [254] * 2,
    "ltx": [240] * 2,
    "ltx2": [240, 9] * 2,
    "ltx2-coordinates": [240, 9] * 2,
    "mochi": [249] * 2,
    "allegro": [240] * 2,
    "allegro-masked": [240] * 2,
    "kandinsky5": [14, 240, 240],
    "easy-animate": [254] * 2,
    "latte": [48, 5] * 2,
    "motif-video": [254, 254, 480],
    "hunyuan-video15": [14, 267, 267],
    "kandinsky6": [14, 14] + [240, 9] * 2,
    "any-flow": [240] * 2,
    "helios": [364] * 2,
    "framepack": [14, 380, 380],
    "minimax-h3": [14, 272, 272],
    "sana-video": [],
    "spatio-temporal": [80, 5],
    "stable-audio": [81] * 2,
    "temporal": [5] * 2,
    "cosmos3": [14] * 2,
    "sana-wm-refiner": [240] * 2,
    "sana-wm": [240] * 2,
    "wan-animate2": [240] * 2,
    "stable-audio3": [84] * 4,
    "ace-step": [80] * 2,
    "longcat-audio": [80] * 2,
    "minimax-music3": [81] * 2,
    "vit": [81] * 2,
    "deit": [82] * 2,
    "ijepa": [80] * 2,
    "dinov2": [81] * 2,
    "dinov2-registers": [85] * 2,
    "dinov3": [85] * 2,
    "clip": [81] * 2,
    "owlv2": [81] * 2,
    "siglip": [80] * 2,
    "yolos": [87] * 2,
    "dpt": [101] * 2,
    "depth-anything": [81] * 2,
    "vitpose": [80] * 2,
    "segformer": [80] * 2,
    "sam": [25, 100],
    "qwen2-vl": [48] * 4,
    "qwen2.5-vl": [16, 16, 8, 8] * 2 + [48] * 2,
    "videomae": [240] * 2,
    "vivit": [241] * 2,
    "vjepa2": [144] * 2,
    "vjepa2-predictor": [144, 144, 288],
    "x-clip": [5, 50] * 2,
    "timm-vit": [81] * 2,
    "timm-deit": [82] * 2,
    "timm-eva02": [81] * 2,
    "timm-eva02-clip": [81] * 2,
    "timm-rope": [81] * 2,
    "timm-rope-mixed": [81] * 2,
    "timm-naflex": [84] * 2,
    "timm-naflex-patches": [84] * 2,
}

OTHER_GRIDS = {1: (90,), 2: (10, 12), 3: (4, 8, 10)}
PADDED = {"hidream-image-padded"}
"""All images to the same number of tokens."""


def test_every_model_has_its_row() -> None:
    assert MODELS.keys() <= SELF_ATTENTIONS.keys()
    if sys.version_info >= (3, 11):
        assert MODELS.keys() == SELF_ATTENTIONS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_layout_has_as_many_tokens_as_its_attention(name: str) -> None:
    layouts, tokens = TRUE_LAYOUTS[name], SELF_ATTENTIONS[name]
    assert len(layouts) == len(tokens)
    for layout, count in zip(layouts, tokens, strict=True):
        if layout:
            assert sum(map(size, segments_of(layout))) == count


def size(segment: int | tuple[int, ...]) -> int:
    return segment if isinstance(segment, int) else prod(segment)


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ("5", (0, (5,), 0)),
        ("5x6x8", (0, (5, 6, 8), 0)),
        ("8 + 14 + 8x10", (22, (8, 10), 0)),
        ("1 + 6x8 + 1 + 3", (1, (6, 8), 4)),
    ],
)
def test_layouts_are_read(layout: str, parts: tuple[int, tuple[int, ...], int]) -> None:
    assert parse_layout(layout) == parts


def test_a_text_without_a_grid_is_no_layout() -> None:
    for text in ("", "1 + 5"):
        with pytest.raises(ValueError, match="no grid"):
            parse_layout(text)


def test_the_mask_of_a_layout() -> None:
    mask = layout_mask("2 + 3x4 + 1", [(1, 2)], [(1, 2)])
    seen = torch.zeros(3, 4, 3, 4, dtype=torch.bool)
    for row in range(3):
        for column in range(4):
            seen[row, column, row, column // 2 * 2 : column // 2 * 2 + 2] = True
    assert mask[:2].all() and mask[-1].all() and mask[:, :2].all() and mask[:, -1].all()
    assert torch.equal(mask[2:-1, 2:-1], seen.reshape(12, 12))


def test_queries_of_five_dimensions_are_masked_too() -> None:
    query = torch.randn(3, 2, 2, 6, 4)
    with masked(torch.nn.Identity(), lambda call: layout_mask("2x3", [(1, 3)])) as calls:
        rows = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert calls[0].masked and calls[0].query == query.shape
    first = query[..., :3, :]
    alone = torch.nn.functional.scaled_dot_product_attention(first, first, first)
    torch.testing.assert_close(rows[..., :3, :], alone)


def own_token(call: Call) -> Tensor | None:
    return torch.eye(call.query[-2], dtype=torch.bool) if call.is_self else None


TEXT_ALONE = {"cosmos3", "qwen-image-21"}
"""Models whose only self-attention is that of the text; the image's queries see both."""


@pytest.mark.parametrize("name", MODELS)
def test_runs_and_depends_on_its_attention(name: str) -> None:
    built = build(name)
    output = built.run()
    assert output.isfinite().all()
    tokens = [call.query[-2] for call in attention_calls(built.model, built.inputs) if call.is_self]
    assert tokens == SELF_ATTENTIONS[name]

    if tokens and name not in TEXT_ALONE:
        with masked(built.model, own_token):
            assert (built.run() - output).abs().max() > 0.3 * output.std()

    # A window of every true layout, so that it is one that `masked` takes, and that it matters.
    with masked(built.model, layout_masks(TRUE_LAYOUTS[name], half)) as calls:
        windows = built.run()
    assert [call.masked for call in calls if call.is_self] == list(map(bool, TRUE_LAYOUTS[name]))
    assert windows.isfinite().all()
    if any(TRUE_LAYOUTS[name]):
        assert (windows - output).abs().max() > 1e-3 * output.std()


def half(grid: tuple[int, ...]) -> list[int]:
    return [(length + 1) // 2 for length in grid]


# Sites whose rows do not come from the model's main input, place by place.
ELSEWHERE = {
    "flux3-reference": {4, 5},  # the reference image's
    "ltx2": {1, 3},  # sound
    "ltx2-coordinates": {1, 3},
    "x-clip": {0, 2},  # made of class tokens
    "kandinsky6": {3, 5},  # sound
}
OTHERS_FROM_THE_INPUT = {"motif-video": {2}}
"""Sites whose tokens off the grid come from the main input, too."""
BLURRED = {"dreamlite", "sd-unet", "segformer"}
"""Convolutions mix what neighbors hold."""
NEW_IMAGE_LAST = {"joy-image-edit"}
"""In the input; the model puts it first."""


@pytest.mark.parametrize(
    "name", [name for name in MODELS if any(TRUE_LAYOUTS[name]) and name not in BLURRED]
)
def test_tokens_lie_as_the_layout_says(name: str) -> None:
    """Where in the input a query comes from, by its gradient while no token sees another one."""
    built = build(name)
    layouts = TRUE_LAYOUTS[name]
    queries: list[Tensor] = []

    def choose(call: Call) -> Tensor | None:
        if call.is_self:
            assert call.tensors is not None
            queries.append(call.tensors[0])
        return own_token(call)

    main = next(iter(built.inputs))
    value = built.inputs[main]
    many = isinstance(value, list)  # of samples
    image = (value[0] if many else value).clone().requires_grad_()
    given = [image, *value[1:]] if many else image
    with masked(built.model, choose):
        main_output(built.model(**{**built.inputs, main: given}))
    assert len(queries) == len(layouts)

    for site, (layout, query) in enumerate(zip(layouts, queries, strict=True)):
        if not layout or site in ELSEWHERE.get(name, ()):
            continue
        rows = query.reshape(-1, *query.shape[-3:])[0].transpose(0, 1).flatten(1)
        segments = segments_of(layout)
        sources = sources_of(segments, image, built.grid)
        start = 0
        for segment, source in zip(segments, sources, strict=True):
            tokens = range(start, start + size(segment))
            start += size(segment)

            grid = built.grid if source == slice(None) or source is None else segment
            assert isinstance(grid, tuple)

            def place(
                token: int,
                rows: Tensor = rows,
                source: slice | None = source,
                grid: tuple[int, ...] = grid,
            ) -> tuple[int, ...] | None:
                (gradient,) = torch.autograd.grad(
                    rows[token].square().sum(), image, retain_graph=True, allow_unused=True
                )
                if gradient is None or not gradient.any():
                    return None
                if source is None:
                    return ()
                own = gradient[:, source] if source != slice(None) else gradient
                assert own.square().sum() > 0.99 * gradient.square().sum()
                return cell(own, grid)

            if source is not None:
                assert isinstance(segment, tuple)
                check_raster_order(tokens.start, segment, place, name in NEW_IMAGE_LAST)
            elif site not in OTHERS_FROM_THE_INPUT.get(name, ()):
                assert not any(place(token) is not None for token in tokens)


def sources_of(
    segments: list[int | tuple[int, ...]], image: Tensor, grid: tuple[int, ...]
) -> list[slice | None]:
    """Which part of the main input's second dimension a segment comes from, None for no part.

    All of it where the input is an image; rows of it where it is the packed tokens of all grids, of
    the first ones, or of the whole sequence.
    """
    grids = [segment for segment in segments if isinstance(segment, tuple)]
    rows = image.shape[1]
    packed = (image.ndim == 3 and len(grid) > 1) or rows == sum(map(size, grids))
    if rows == prod(grid) or not packed:
        main = grid if len(grids) > 1 else grids[0]
        return [slice(None) if segment == main else None for segment in segments]
    whole = rows == sum(map(size, segments))
    sources: list[slice | None] = []
    start = 0
    for segment in segments:
        is_grid = isinstance(segment, tuple)
        end = start + size(segment) if is_grid or whole else start
        sources.append(slice(start, end) if is_grid and end <= rows else None)
        start = end
    return sources


def check_raster_order(
    before: int,
    grid: tuple[int, ...],
    place: Callable[[int], tuple[int, ...] | None],
    turned: bool,
) -> None:
    """One step along an axis of the layout is a step along one axis of the input, in order."""
    origin, last = place(before), place(before + prod(grid) - 1)
    assert origin is not None
    axes = []
    end = list(origin)
    for axis, length in enumerate(grid):
        if length == 1:
            continue
        there = place(before + prod(grid[axis + 1 :]))
        assert there is not None
        step = [b - a for a, b in zip(origin, there, strict=True)]
        (along,) = (i for i, by in enumerate(step) if by)
        assert step[along] > 0 or (turned and axis == 0)
        axes.append(along)
        end[along] += (length - 1) * step[along]
    assert axes == sorted(set(axes))
    assert last == tuple(end)


def cell(gradient: Tensor, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The cell of the grid at which a gradient is largest, by the axes of the input that fit it."""
    if gradient.shape[1] == prod(grid):  # packed latents
        return _largest(gradient[0].abs().flatten(1).sum(-1).reshape(grid))
    fitting = [
        dims
        for dims in combinations(range(gradient.ndim), len(grid))
        if all(gradient.shape[dim] % length == 0 for dim, length in zip(dims, grid, strict=True))
        and (
            len(grid) == 1
            or gradient.shape[dims[-1]] * grid[-2] == gradient.shape[dims[-2]] * grid[-1]
        )
    ]
    dims = fitting[-1]
    rest = tuple(dim for dim in range(gradient.ndim) if dim not in dims)
    pooled = gradient.abs().sum(rest)
    for axis, length in enumerate(grid):
        pooled = pooled.unflatten(2 * axis, (length, -1))
    return _largest(pooled.sum(tuple(range(1, pooled.ndim, 2))))


def _largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


@pytest.mark.parametrize("name", list(MODELS)[::4])  # all are drawn by the same function
def test_seeds_decide_the_values(name: str) -> None:
    first, again, other = build(name).run(), build(name).run(), build(name, seed=1).run()
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.3 * first.std()


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].any_grid])
def test_one_model_takes_other_grids_and_batches(name: str) -> None:
    built = build(name)
    grid = OTHER_GRIDS[len(built.grid)]
    inputs = inputs_for(name, grid, batch=2)
    with torch.no_grad():
        built.model(**inputs)
    before = sum(call.query[-2] for call in attention_calls(built.model, built.inputs))
    after = sum(call.query[-2] for call in attention_calls(built.model, inputs))
    assert (before == after) == (name in PADDED)


@pytest.mark.parametrize(
    "name", [n for n in MODELS if MODELS[n].library != "diffusers" and n != "sam"]
)
def test_written_out_attention_gives_the_same(name: str) -> None:
    fused, written_out = build(name), build(name, written_out=True)
    assert attention_calls(fused.model, fused.inputs)
    assert not attention_calls(written_out.model, written_out.inputs)
    torch.testing.assert_close(written_out.run(), fused.run(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "sam"])
def test_no_switch_to_written_out_attention_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="no switch"):
        build(name, written_out=True)


def test_hunyuan_video_hides_some_text() -> None:
    built = build("hunyuan-video", batch=2)
    plain = built.run()
    text = built.inputs["encoder_hidden_states"]
    text[:, TEXT - HIDDEN_TEXT :] += 1.0
    torch.testing.assert_close(built.run(), plain, rtol=1e-4, atol=1e-4)
    text[:, 0] += 1.0
    assert (built.run() - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02"])
def test_timm_compiles_without_torchvision(name: str) -> None:
    built = build(name)
    compiled = torch.compile(built.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(built.run(compiled), built.run())


def test_the_stub_leaves_no_torchvision_behind() -> None:
    build("timm-vit")
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    assert torchvision.__file__, "a stub is still in sys.modules"
