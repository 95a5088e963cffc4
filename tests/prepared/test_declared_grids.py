"""Declared grids of prepared models: held against the inputs of every call."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from masked_model import masked
from models import build, flux_ids, inputs_for, main_output
from token_nets import OPTIONS, WIDTH, Net, Tokens, image, policy
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gna_compile
from gna_compile.prepared.annotations import PACKED, WATCH
from gna_compile.prepared.declared_grids import Watch
from gna_compile.prepared.packed_grid import PackedGrid

# What the inputs of a call say


class Anything(nn.Module):
    """Takes whatever a model may take."""

    def forward(
        self,
        hidden_states: Any = None,
        timestep: Any = None,
        encoder_hidden_states: Any = None,
        img_ids: Any = None,
        img_shapes: Any = None,
        num_frames: Any = None,
        height: Any = None,
        width: Any = None,
        attention_mask: Any = None,
        image_cond_ids: Any = None,
    ) -> None:
        pass


def grid_of(shown: PackedGrid) -> tuple[int, ...] | None:
    """The one grid that a declared one has become."""
    if shown.segments[1] is None:
        return None
    (grid,) = shown.segments[1]
    assert isinstance(grid, tuple)
    return grid


def followed(declared: tuple[int, ...], *calls: Any) -> list[tuple[int, ...] | None]:
    """What has become of a declared grid in each call; a tuple is the shape of the latent."""
    shown, module = PackedGrid([(declared,)]), Anything()
    watch = Watch([shown], reads_ids=False)
    grids = []
    for call in calls:
        call = {"hidden_states": torch.empty(call)} if isinstance(call, tuple) else call
        watch.look(module, (), call)
        grids.append(grid_of(shown))
        assert (grids[-1] is None) == bool(shown.why[1])
    return grids


V = 5, 6, 8  # a video


@pytest.mark.parametrize(
    ("declared", "calls", "expected"),
    [
        (V, [(1, 4, 5, 12, 16), (1, 4, 5, 16, 12), (2, 4, 5, 12, 16)], [V, (5, 8, 6), V]),
        (V, [(1, 4, 5, 12, 16), (1, 4, 7, 10, 20), (1, 4, 5, 12, 17)], [V, (7, 5, 10), None]),
        (V, [(1, 4, 5, 16, 12), (1, 4, 5, 12, 16)], [None, V]),
        (V, [(1, 4, 5, 12, 16), (1, 5, 4, 16, 12)], [V, None]),
        (V, [(1, 5, 4, 12, 16), (1, 7, 4, 16, 12)], [V, (7, 8, 6)]),  # frames, then channels
        (V, [(1, 5, 6, 8, 64), (1, 5, 8, 6, 64)], [V, (5, 8, 6)]),  # channels last
        (V, [(1, 5, 5, 12, 16), (1, 5, 7, 12, 16)], [V, (7, 6, 8)]),  # as many channels as frames
        (V, [(1, 4, 10, 12, 16), (1, 4, 8, 12, 16)], [V, (4, 6, 8)]),  # two frames in a patch
        (V, [(1, 4, 5, 12, 24)], [None]),  # no square patches
        (V, [(1, 4, 12, 16)], [None]),
        ((6, 8), [(1, 3, 12, 16), (1, 3, 16, 12)], [(6, 8), (8, 6)]),
        ((6, 8), [(1, 3, 12, 16), (1, 3, 12, 15), (1, 3, 12, 16)], [(6, 8), None, (6, 8)]),
        ((6, 8), [(1, 4, 3, 12, 16), (1, 4, 9, 16, 12)], [(6, 8), (8, 6)]),  # frame by frame
        ((1, 6, 8), [(1, 4, 1, 12, 16), (1, 4, 1, 16, 12)], [(1, 6, 8), (1, 8, 6)]),
        ((1, 6, 8), [(1, 4, 1, 12, 16), (1, 4, 5, 12, 16)], [(1, 6, 8), (5, 6, 8)]),
        ((1, 6, 8), [(1, 3, 12, 16), (1, 3, 16, 12)], [(1, 6, 8), (1, 8, 6)]),
    ],
)
def test_another_size_of_the_latent_is_another_grid(
    declared: tuple[int, ...], calls: Sequence[Any], expected: Sequence[Any]
) -> None:
    assert followed(declared, *calls) == expected


def test_patches_that_the_model_is_configured_for() -> None:
    """Else a first call of another size could pass for one of larger patches."""
    shown, module = PackedGrid([((6, 8),)]), Anything()
    module.config = SimpleNamespace(patch_size=2)  # type: ignore[assignment]
    watch = Watch([shown], reads_ids=False)
    for height, width, grid in ((24, 32, None), (12, 16, (6, 8)), (24, 32, (12, 16))):
        watch.look(module, (torch.empty(1, 4, height, width),), {})
        assert grid_of(shown) == grid


@dataclass
class Batch:
    """What some models are called with."""

    latents: torch.Tensor


def test_every_input_that_may_be_the_latent_has_to_agree() -> None:
    def call(h: int, w: int, *, control: tuple[int, int] = (64, 64)) -> dict[str, Any]:
        return {"control": torch.empty(1, 3, *control), "hidden_states": torch.empty(1, 4, h, w)}

    assert followed((8, 8), call(8, 8), call(8, 8)) == [(8, 8), (8, 8)]
    # The control image could be the latent, too (of larger patches), and has not changed.
    assert followed((8, 8), call(8, 8), call(4, 16)) == [(8, 8), None]
    both = call(4, 16, control=(32, 128))
    assert followed((8, 8), call(8, 8), both) == [(8, 8), (4, 16)]
    # An image that cannot be the latent may stay as it is, but not change alone.
    odd = {"control": (50, 50)}
    assert followed((8, 8), call(8, 8, **odd), call(4, 16, **odd)) == [(8, 8), (4, 16)]
    assert followed((8, 8), call(8, 8, **odd), call(8, 8, control=(51, 50))) == [(8, 8), None]


def test_sizes_beside_an_image_are_looked_at() -> None:
    def call(h: int, w: int) -> dict[str, Any]:
        tokens, image = torch.empty(1, 64, 4), torch.empty(1, 3, 64, 64)
        return {"hidden_states": tokens, "image": image, "height": h, "width": w}

    assert followed((8, 8), call(8, 8), call(4, 16)) == [(8, 8), None]


def test_a_latent_inside_an_object_is_seen() -> None:
    calls = [{"batch": Batch(torch.empty(1, 4, h, w))} for h, w in ((8, 16), (16, 8))]
    assert followed((8, 16), *calls) == [(8, 16), (16, 8)]


def test_latents_in_a_list() -> None:
    calls = [{"hidden_states": [torch.empty(4, 5, h, w)] * 2} for h, w in ((12, 16), (16, 12))]
    mixed = {"hidden_states": [torch.empty(4, 5, 12, 16), torch.empty(4, 5, 16, 12)]}
    assert followed(V, *calls, mixed) == [V, (5, 8, 6), None]


def test_position_ids_say_more_than_shapes() -> None:
    def call(*grids: tuple[int, int], **more: Any) -> dict[str, Any]:
        ids = torch.cat([flux_ids(grid) + torch.tensor([i, 0, 0]) for i, grid in enumerate(grids)])
        return {"hidden_states": torch.empty(1, len(ids), 4), "img_ids": ids, **more}

    assert followed((6, 8), call((6, 8)), call((8, 6)), call((5, 7))) == [(6, 8), (8, 6), (5, 7)]
    assert followed((6, 8), call((8, 6)), call((6, 8))) == [None, (6, 8)]
    assert followed((6, 8), call((12, 16))) == [None]  # no patches
    assert followed((2, 6, 8), call((6, 8), (6, 8))) == [None]
    reference = call((6, 8), image_cond_ids=flux_ids((6, 8)) + torch.tensor([10, 0, 0]))
    assert followed((6, 8), call((6, 8)), reference) == [(6, 8), None]
    assert followed((1, 6, 8), call((6, 8)), call((8, 6))) == [(1, 6, 8), (1, 8, 6)]


def test_sizes_as_arguments() -> None:
    packed = {"hidden_states": torch.empty(1, 240, 4)}
    sizes = [{"num_frames": 5, "height": h, "width": w} for h, w in ((6, 8), (8, 6))]
    assert followed(V, *(packed | size for size in sizes)) == [V, (5, 8, 6)]
    shapes = [{"img_shapes": [[(5, h, w)]] * 2} for h, w in ((6, 8), (8, 6))]
    two = {"img_shapes": [[(5, 6, 8), (1, 6, 8)]]}
    assert followed(V, *(packed | s for s in shapes), packed | two) == [V, (5, 8, 6), None]


def test_where_no_input_shows_a_size_nothing_may_change() -> None:
    def call(tokens: int = 240, batch: int = 1, text: int = 7, **more: Any) -> dict[str, Any]:
        states = torch.empty(batch, tokens, 4)
        return {"hidden_states": states, "encoder_hidden_states": torch.empty(1, text, 4), **more}

    assert followed(V, call(), call(batch=2, text=9, timestep=7), call(200)) == [V, V, None]
    assert followed(V, call(height=6), call(height=8), call(height=6)) == [V, None, V]
    latent = {"hidden_states": torch.empty(1, 4, 5, 12, 16)}
    assert followed(V, latent, call(), latent) == [V, None, V]
    line = torch.empty(1, 4, 1, 240), torch.empty(1, 4, 1, 120)
    assert followed((240,), *({"hidden_states": x} for x in line)) == [(240,), None]


# Compiled models


def expected(model: nn.Module, x: Tensor, grid: tuple[int, int], window: int = 3) -> Tensor:
    with torch.no_grad(), masked(model, {"*": oracle.mask(grid, (window, window))}):
        out: Tensor = model(x)
    return out


def block_by_block(model: Any, rules: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """The model, prepared and compiled in blocks, and a twin that is neither."""
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, rules or policy(), **kwargs)
    for block in model.blocks:
        block.compile(backend="gna", options=OPTIONS)
    return model, plain


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


PHASED = policy({"phases": "early", "window": 5}, {"window": 3}, phases=["early"])


@pytest.mark.parametrize("where", ["prepare", "policy", "rule"])
def test_the_declared_grid_follows_the_image(where: str) -> None:
    layout = {"grid": [6, 8]}
    if where == "prepare":
        model, plain = block_by_block(Net(), PHASED, layout=layout)
    elif where == "policy":
        model, plain = block_by_block(Net(), {**PHASED, "layout": layout})
    else:
        rules = [{**rule, "layout": layout} for rule in PHASED["rules"]]
        model, plain = block_by_block(Net(), {**PHASED, "rules": rules})
    counters.clear()
    graphs = []
    with torch.no_grad():
        for grid in ((6, 8), (8, 6), (6, 8), (10, 6), (6, 10), (8, 6), (7, 9)):
            x = image(*grid)
            for name, window in (("default", 3), ("early", 5)):
                with gna_compile.phase(name):
                    close(model(x), expected(plain, x, grid, window))
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[1], "what was seen is found"
    assert graphs[4:] == [graphs[3]] * 3, "what has changed is dynamic"


def test_a_grid_that_does_not_follow_is_dense_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, plain = block_by_block(Net(), layout={"grid": [6, 8]})
    with torch.no_grad(), caplog.at_level(logging.WARNING, "gna_compile"):
        for height, width, grid in ((8, 6, None), (6, 8, (6, 8)), (8, 6, (8, 6))):
            x = image(height, width)
            close(model(x), expected(plain, x, grid) if grid else plain(x))
        odd = torch.randn(1, 3, 13, 16)  # 6x8 tokens, but no whole patches
        close(model(odd), plain(odd))
        assert len(caplog.records) == 1
    assert "declared is the grid 6×8, which does not fit image of 1×3×16×12" in caplog.text
    assert "blocks.0.attn stays dense" in caplog.text
    assert "layout={" in caplog.text


def test_positional_and_listed_inputs_and_a_batch() -> None:
    model, plain = block_by_block(Net(), layout={"grid": [6, 8]})
    with torch.no_grad():
        for x in (image(6, 8), image(8, 6).expand(3, -1, -1, -1)):
            grid = x.shape[-2] // 2, x.shape[-1] // 2
            close(model(image=x), expected(plain, x, grid))


def test_copies_follow_by_themselves_and_all_can_be_undone() -> None:
    torch.manual_seed(0)
    model = gna_compile.prepare(Net(), policy(), layout={"grid": [6, 8]})
    with torch.no_grad():
        model(image(6, 8))
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        plain = gna_compile.unprepare(copy.deepcopy(model))
        for part in (model, *twins):
            for block in part.blocks:
                block.compile(backend="gna", options=OPTIONS)
        model(image(8, 6))
        for twin in twins:
            assert twin.__dict__[PACKED] is not model.__dict__[PACKED]
            for grid in ((6, 8), (8, 6)):
                x = image(*grid)
                close(twin(x), expected(plain, x, grid))
    for module in plain.modules():
        assert not module.__dict__.keys() & {PACKED, WATCH}
        assert not module._forward_pre_hooks


def test_two_models_in_a_pipeline_have_a_grid_each() -> None:
    class Pipe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.high, self.low = Net(), Net()

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return self.high(left), self.low(right)

    pipe = Pipe()
    plain = copy.deepcopy(pipe)
    gna_compile.prepare(pipe, policy(), layout={"grid": [6, 8]})
    for net in (pipe.high, pipe.low):
        for block in net.blocks:
            block.compile(backend="gna", options=OPTIONS)
    with torch.no_grad():
        pipe(image(6, 8), image(6, 8))
        for left, right in (((6, 8), (8, 6)), ((8, 6), (6, 8))):
            inputs = image(*left), image(*right)
            for actual, net, x, grid in zip(
                pipe(*inputs), (plain.high, plain.low), inputs, (left, right), strict=True
            ):
                close(actual, expected(net, x, grid))


@pytest.mark.parametrize("change", ["size", "tokens"])
def test_what_cannot_be_checked_may_not_change(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = block_by_block(Tokens(), policy(global_tokens="prefix"), layout={"grid": [6, 8]})
    x = torch.randn(1, 48, WIDTH)
    other = {"x": x, "height": 8} if change == "size" else {"x": torch.randn(1, 50, WIDTH)}
    with torch.no_grad(), caplog.at_level(logging.WARNING, "gna_compile"):
        close(model(x), expected(plain, x, (6, 8)))
        close(model(x.expand(2, -1, -1)), expected(plain, x.expand(2, -1, -1), (6, 8)))
        close(model(**other), plain(**other))
        close(model(x), expected(plain, x, (6, 8)))
    assert len(caplog.records) == 1
    assert "when the model was first called" in caplog.text


@pytest.mark.parametrize("outer", [Net, Tokens])
def test_a_whole_model_and_a_larger_graph(outer: Any) -> None:
    """Inlined, the hook sees nothing: there the graph itself has to show the grid."""
    model = outer()
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, policy(), layout={"grid": [6, 8]})
    whole = torch.compile(model, backend="gna", options=OPTIONS)
    larger = torch.compile(lambda x: model(x), backend="gna", options=OPTIONS)
    x = image(6, 8) if outer is Net else torch.randn(1, 48, WIDTH)
    with torch.no_grad():
        close(whole(x), expected(plain, x, (6, 8)))
        close(larger(x), expected(plain, x, (6, 8)) if outer is Net else plain(x))
        if outer is Net:
            y = image(8, 6)
            close(whole(y), expected(plain, y, (8, 6)))
            close(larger(y), plain(y))  # what is declared is not what the graph shows


@pytest.mark.parametrize("breaks", [False, True])
def test_without_prepare_a_part_of_a_model_has_no_declared_grid(breaks: bool) -> None:
    """Its graph would run on any image of as many tokens."""

    class Broken(Net):
        def forward(self, image: Tensor) -> Tensor:
            x = self.patch(image).flatten(2).transpose(1, 2)
            torch._dynamo.graph_break()
            return self.blocks[1](self.blocks[0](x))

    model = Broken() if breaks else Net()
    plain = copy.deepcopy(model)
    options = {**OPTIONS, "policy": policy(layout={"grid": [6, 8]})}
    run: Any = model
    if breaks:
        run = torch.compile(model, backend="gna", options=options)
    else:
        for block in model.blocks:
            block.compile(backend="gna", options=options)
    with torch.no_grad():
        for grid in ((6, 8), (8, 6)):
            x = image(*grid)
            close(run(x), plain(x))
        gna_compile.prepare(model, policy(), layout={"grid": [6, 8]})
        torch._dynamo.reset()
        for grid in ((6, 8), (8, 6)):
            x = image(*grid)
            close(run(x), expected(plain, x, grid))


def test_a_grid_of_position_ids_that_is_declared_too() -> None:
    model: Any = build("flux").model
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, policy(), layout={"grid": [8, 10]})
    model.compile_repeated_blocks(backend="gna", options=OPTIONS)
    for grid in ((8, 10), (10, 8), (8, 10)):
        inputs = dict(build("flux").inputs) | {"img_ids": flux_ids(grid)}
        text = inputs["encoder_hidden_states"].shape[1]
        with torch.no_grad():
            with masked(plain, {"*": oracle.mask(grid, (3, 3), prefix=text)}):
                wanted = main_output(plain(**inputs))
            torch.testing.assert_close(main_output(model(**inputs)), wanted, rtol=1e-4, atol=1e-4)


def test_a_video_model_block_by_block() -> None:
    """As the README compiles Wan, first landscape and then portrait."""
    model: Any = build("wan").model
    plain = copy.deepcopy(model)
    rules = policy({"layers": "attn1", "window": 3})
    gna_compile.prepare(model, rules, layout={"grid": [5, 6, 8]})
    model.compile_repeated_blocks(backend="gna", options=OPTIONS)
    for grid in ((5, 6, 8), (5, 8, 6), (4, 6, 10)):
        inputs = inputs_for("wan", grid)
        with torch.no_grad():
            with masked(plain, {"blocks.*.attn1": oracle.mask(grid, (3, 3, 3))}):
                wanted = main_output(plain(**inputs))
            torch.testing.assert_close(main_output(model(**inputs)), wanted, rtol=1e-4, atol=1e-4)


def test_a_wrapper_whose_encoder_sees_tokens_only() -> None:
    """What lies around the blocks sees no image, the model around it does."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.encoder = nn.Conv2d(3, WIDTH, 2, 2), Tokens()

        def forward(self, image: Tensor) -> Any:
            return self.encoder(self.patch(image).flatten(2).transpose(1, 2))

    model = Wrapper()
    plain = copy.deepcopy(model)
    gna_compile.prepare(model, policy(), layout={"grid": [6, 8]})
    for block in model.encoder.blocks:
        block.compile(backend="gna", options=OPTIONS)
    with torch.no_grad():
        for grid in ((6, 8), (8, 6)):
            x = image(*grid)
            close(model(x), expected(plain, x, grid))
