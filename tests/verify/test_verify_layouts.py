"""`verify="layouts"`: true layouts pass, forged ones are named, and nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import Built, build, flux_ids, inputs_for, main_output
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.checkpoint import checkpoint

import gna_compile
from gna_compile import LayoutError, decide
from gna_compile.backend import gna
from gna_compile.graph.tokens.declared import resolve
from gna_compile.graph.tokens.layouts import Layout, TokenFlow
from gna_compile.options import OptionsError
from gna_compile.reasons import Decline
from gna_compile.verify import layouts as verify_layouts
from gna_compile.verify.probe import Probe

GRID = (6, 9)
WIDTH = 32
WINDOWS = {"window": "1/2", "stride": 1}
POLICY: dict[str, Any] = {
    "version": 1,
    "min_tokens": 20,
    "min_speedup": 0,
    "key_mask": "global_tokens",
    "rules": [WINDOWS],
}


def policy(**more: Any) -> dict[str, Any]:
    return {**POLICY, **more}


def verified(model: Callable[..., Any], policy: Any = POLICY, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    given = {"policy": policy, "inner": "eager", "verify": "layouts", **options}
    return torch.compile(model, backend="gna", options=given, dynamic=dynamic)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], tuple[int, int, list[str]]]:
    """How many layouts were verified, of how many, and the warnings that some could not be."""
    caplog.set_level(logging.INFO, "gna_compile")

    def read() -> tuple[int, int, list[str]]:
        records = [record for record in caplog.records if record.name == "gna_compile"]
        sums = [r.args for r in records if r.msg.startswith("layouts verified")]
        numbers = [args for args in sums if isinstance(args, tuple)]
        doubts = [r.getMessage() for r in records if "could not be verified" in r.getMessage()]
        return sum(int(str(n)) for n, _ in numbers), sum(int(str(n)) for _, n in numbers), doubts

    return read


class Attention(nn.Module):
    """Attention over [batch, tokens, WIDTH], with keys and values of tokens that `keys` makes."""

    def __init__(self, keys: Callable[[Tensor], Tensor] | None = None, form: str = "sdpa") -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.keys, self.form = keys, form

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.keys is None else self.keys(x)
        q, k, v = (
            f(t).unflatten(-1, (2, -1)).transpose(1, 2)
            for f, t in ((self.q, x), (self.k, other), (self.v, other))
        )
        if self.form == "sdpa":
            out = attend(q, k, v)
        elif self.form == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)) * (WIDTH // 2) ** -0.5
            out = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 2))
        else:
            scores = q @ k.permute(0, 1, 3, 2) * (WIDTH // 2) ** -0.5
            out = scores.softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)


class Image(nn.Module):
    """Patches of 2×2 of [batch, 3, H, W], text before and behind them, and attention twice."""

    def __init__(
        self,
        arrange: Callable[[Tensor], Tensor] | None = None,
        text: int = 0,
        behind: int = 0,
        checkpointed: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Attention(**attention) for _ in range(2))
        self.text = nn.Parameter(torch.randn(1, text, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.arrange, self.checkpointed = arrange, checkpointed

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image)
        if self.arrange is not None:
            x = self.arrange(x)
        x = x.flatten(2).transpose(1, 2)
        more = [t.expand(len(x), -1, -1) for t in (self.text, self.behind)]
        x = torch.cat([more[0], x, more[1]], 1)
        for block in self.blocks:
            if self.checkpointed:
                x = x + checkpoint(block, self.norm(x), use_reentrant=False)
            else:
                x = x + block(self.norm(x))
        return x


def image(batch: int = 1, grid: Sequence[int] = GRID) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 2 * grid[0], 2 * grid[1], generator=generator)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture
def forged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the backend take every attention for one of its own tokens, on a layout of ours."""

    def forge(grid: Sequence[int] = GRID, prefix: int = 0, suffix: int = 0) -> None:
        layout = Layout.of_grid(tuple(grid), prefix, suffix, "forged")
        monkeypatch.setattr(decide, "resolve", lambda *_: layout)
        monkeypatch.setattr(TokenFlow, "relation", lambda *_: "self")

    return forge


# True layouts


@pytest.mark.parametrize(
    "name",
    [
        *("wan", "wan-vace", "cogvideox", "hunyuan-video", "ltx", "latte", "cosmos"),
        *("flux", "flux3-reference", "sd3", "qwen-image", "pixart", "vit", "vitpose", "segformer"),
        *("dinov2-registers", "x-clip", "videomae", "timm-eva02"),
    ],
)
def test_real_models_pass(name: str, said: Callable[[], tuple[int, int, list[str]]]) -> None:
    built = _built(name)
    expected = built.run(verified(built.model, verify=None))
    torch._dynamo.reset()
    assert torch.equal(built.run(verified(built.model)), expected)
    right, of, doubts = said()
    assert right == of > 0 and not doubts


def _built(name: str) -> Built:
    from models import MODELS

    if name not in MODELS:
        pytest.skip(f"{name} is not in the libraries that are installed")
    return build(name)


@pytest.mark.parametrize("written_out", [False, True])
def test_batches_and_attention_written_out(
    written_out: bool, said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    built = build("timm-vit", batch=3, written_out=written_out)
    built.run(verified(built.model))
    assert said() == (2, 2, [])


@pytest.mark.parametrize("form", ["sdpa", "bmm", "matmul"])
@pytest.mark.parametrize("behind", [0, 3])
def test_forms_and_global_tokens(
    form: str, behind: int, said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    model = seeded(lambda: Image(text=5, behind=behind, form=form))
    with torch.no_grad():
        verified(model)(image(2))
    assert said() == (2, 2, [])


def test_a_convolutional_network_around_it(
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    built = build("sd-unet", (32, 40))
    built.run(verified(built.model))
    right, of, doubts = said()
    assert right == of > 0 and not doubts


def test_what_cannot_be_told_is_a_warning(
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    built = build("sd-unet")  # convolutions reach over most of so small an image
    built.run(verified(built.model))
    right, of, doubts = said()
    assert right == 0 and of > 0 and doubts
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in doubts[0]


def test_tokens_of_a_table_are_a_warning(
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    table, attention = nn.Embedding(54, WIDTH), seeded(Attention)

    def model(places: Tensor) -> Tensor:
        out: Tensor = attention(table(places))
        return out

    declared = policy(layout={"grid": list(GRID)})
    with torch.no_grad():
        verified(model, declared)(torch.arange(54)[None])
    right, of, doubts = said()
    assert (right, of, len(doubts)) == (0, 1, 1)


# Forged layouts


def test_swapped_axes(forged: Callable[..., None]) -> None:
    forged((9, 6))
    model = seeded(Image)
    message = (
        r"blocks\.0: its 54 tokens do not lie on the grid 9×6 with prefix 0 and suffix 0 \(forged\): "
        r"when cell \(0, 5\) was changed \(image\[:, :, 10:12, 0:2\]\), row 5 was expected to "
        r"react, but of the queries row 45 did\..*dense: true"
    )
    with pytest.raises(LayoutError, match=message), torch.no_grad():
        verified(model)(image())


@pytest.mark.parametrize(("prefix", "suffix"), [(4, 1), (6, 0), (5, 0)])
def test_a_prefix_that_is_off_by_one(prefix: int, suffix: int, forged: Callable[..., None]) -> None:
    forged(GRID, prefix, suffix)
    model = seeded(lambda: Image(text=5, behind=0 if prefix + suffix == 5 else 1))
    if prefix == 5:
        model = seeded(lambda: Image(text=4, behind=1))
    with pytest.raises(LayoutError, match=f"prefix {prefix} and suffix {suffix}"), torch.no_grad():
        verified(model)(image())


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda x: x.roll((1, 2), (2, 3)),
    "rolled along the last axis": lambda x: x.roll(1, 3),
    "flipped": lambda x: x.flip(2),
    "transposed": lambda x: x.transpose(2, 3).reshape(x.shape),
    "every other row first": lambda x: torch.cat([x[:, :, ::2], x[:, :, 1::2]], 2),
    "mixed with its mirror image": lambda x: x + x.flip(3),
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_tokens_in_another_order(order: str, forged: Callable[..., None]) -> None:
    forged()
    model = seeded(lambda: Image(ORDERS[order]))
    with pytest.raises(LayoutError, match=r"blocks\.0"), torch.no_grad():
        verified(model)(image())


def _other_images(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def _first_image(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _reversed(x: Tensor) -> Tensor:
    return x.flip(1)


@pytest.mark.parametrize("keys", [_other_images, _first_image, _reversed])
@pytest.mark.parametrize("form", ["sdpa", "matmul"])
def test_keys_of_other_tokens(
    keys: Callable[[Tensor], Tensor], form: str, forged: Callable[..., None]
) -> None:
    forged()
    model = seeded(lambda: Image(keys=keys, form=form))
    expected = "batch row" if keys is _other_images else "of the keys|of the values"
    if keys is _first_image:
        expected = "none of the keys|batch row"
    with pytest.raises(LayoutError, match=expected), torch.no_grad():
        verified(model)(image(3))


def test_keys_of_another_input(forged: Callable[..., None]) -> None:
    forged()
    one, other = seeded(Image), seeded(Attention)

    def model(left: Tensor, right: Tensor) -> Tensor:
        q = one.patch(left).flatten(2).transpose(1, 2)[:, None]
        k = one.patch(right).flatten(2).transpose(1, 2)[:, None]
        return attend(q, k, k) + other(q[:, 0])

    match = "with the input left, its keys with right"
    with pytest.raises(LayoutError, match=match), torch.no_grad():
        verified(model)(image(), image())


@pytest.mark.parametrize("own_grid", [(9, 30), (3, 90)])
def test_a_flattened_image_as_an_axis(
    own_grid: tuple[int, int], forged: Callable[..., None]
) -> None:
    forged(own_grid)
    attention = seeded(Attention)

    def model(video: Tensor) -> Tensor:
        out: Tensor = attention(video.flatten(2).transpose(1, 2))
        return out

    match = "along 3 dimensions of the input video"
    with pytest.raises(LayoutError, match=match), torch.no_grad():
        verified(model)(torch.randn(1, WIDTH, 9, 5, 6))


def test_ids_that_show_other_axes(
    monkeypatch: pytest.MonkeyPatch, forged: Callable[..., None]
) -> None:
    built = build("flux")
    height, width = built.grid
    resolved = resolve

    def swapped(*arguments: Any) -> Layout | Decline:
        layout = resolved(*arguments)
        assert isinstance(layout, Layout)
        return Layout.of_grid(layout.grid[::-1], layout.prefix, layout.suffix)

    monkeypatch.setattr(decide, "resolve", swapped)
    with pytest.raises(LayoutError, match=f"the input img_ids shows {height}×{width}"):
        built.run(verified(built.model))


def test_a_wan_with_a_forged_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("wan")
    frames, height, width = built.grid
    layout = Layout.of_grid((frames, width, height), source="forged")
    monkeypatch.setattr(decide, "resolve", lambda *_: layout)
    with pytest.raises(LayoutError, match=r"blocks\.0\.attn1.*hidden_states\["):
        built.run(verified(built.model))


def test_a_declared_grid_of_a_sequence_passes(
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    declared = policy(layout={"grid": list(GRID), "prefix": 2})
    attention = seeded(Attention)
    with torch.no_grad():
        verified(attention, declared)(torch.randn(2, 56, WIDTH))
    assert said() == (1, 1, [])


# When and how it runs


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []
    run = Probe.run

    def counting(self: Probe, inputs: Sequence[Any]) -> Any:
        runs.append(1)
        return run(self, inputs)

    monkeypatch.setattr(Probe, "run", counting)
    return runs


def test_only_the_first_call_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _counted(monkeypatch)
    model = seeded(Image)
    compiled = verified(model)
    with torch.no_grad():
        compiled(image())
        count = len(runs)
        assert count > 4
        compiled(image())
        compiled(image())
    assert len(runs) == count


def test_without_the_option_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _counted(monkeypatch)
    with torch.no_grad():
        verified(seeded(Image), verify=None)(image())
    assert not runs


def test_a_refused_graph_is_refused_again(forged: Callable[..., None]) -> None:
    forged((9, 6))
    compiled = verified(seeded(Image))
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(LayoutError):
                compiled(image())


@pytest.mark.parametrize("dynamic", [False, True])
def test_checkpointed_blocks_in_training(
    dynamic: bool,
    forged: Callable[..., None],
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    model = seeded(lambda: Image(checkpointed=True)).train()
    verified(model, dynamic=dynamic, inner="aot_eager")(image()).sum().backward()
    assert said() == (2, 2, [])
    assert all(p.grad is not None for p in model.blocks.parameters())
    torch._dynamo.reset()
    forged((9, 6))
    with pytest.raises(LayoutError, match=r"blocks\.0"):
        verified(model, dynamic=dynamic)(image())


def test_dynamic_shapes(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    built = build("wan")
    compiled = verified(built.model, dynamic=True)
    built.run(compiled)
    assert said() == (2, 2, [])
    runs = _counted(monkeypatch)
    with torch.no_grad():
        main_output(compiled(**inputs_for("wan", (6, 8, 10))))
    assert not runs


def test_packed_latents_of_a_prepared_model(
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    built = build("flux")
    gna_compile.prepare(built.model, POLICY)
    compiled = verified(built.model, None)
    built.run(compiled)
    assert said() == (4, 4, [])
    with torch.no_grad():
        main_output(compiled(**{**built.inputs, "img_ids": flux_ids(built.grid[::-1])}))
    right, of, doubts = said()
    assert right == of and not doubts


def test_block_by_block(said: Callable[[], tuple[int, int, list[str]]]) -> None:
    built = build("flux")
    gna_compile.prepare(built.model, POLICY)
    model: Any = built.model
    model.compile_repeated_blocks(backend="gna", options={"inner": "eager", "verify": "layouts"})
    built.run()
    right, of, doubts = said()
    assert right == of > 0 and not doubts


def test_each_graph_once_in_all_phases(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    phased = policy(
        phases={"warmup": {"first": 1, "of": 4}},
        rules=[{"phases": "warmup", "dense": True}, WINDOWS],
    )
    compiled = verified(seeded(Image), phased)
    with torch.no_grad():
        with gna_compile.phase("warmup"):
            compiled(image())
        assert said() == (2, 2, [])
        runs = _counted(monkeypatch)
        compiled(image())
    assert not runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    dtype: torch.dtype,
    forged: Callable[..., None],
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    model = seeded(lambda: Image(text=3)).to(dtype)
    with torch.no_grad():
        verified(model)(image().to(dtype))
        assert said() == (2, 2, [])
        torch._dynamo.reset()
        forged(GRID, 2, 1)
        with pytest.raises(LayoutError):
            verified(model)(image().to(dtype))


def test_autocast_and_inference_mode(
    said: Callable[[], tuple[int, int, list[str]]],
) -> None:
    model = seeded(lambda: Image(text=3))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        verified(model)(image())
    assert said() == (2, 2, [])


class Stateful(Image):
    """A network that writes to its input and its buffers, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm2d(3)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        image += 1
        self.steps += 1
        image = nn.functional.dropout(self.statistics(image), 0.1)
        return super().forward(image) + torch.rand(())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inputs_buffers_gradients_and_random_numbers_are_left_alone(
    inner: str, said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    results = []
    for verify in (None, "layouts"):
        torch._dynamo.reset()
        model = seeded(Stateful).train()
        given = image()
        torch.manual_seed(7)
        out = verified(model, inner=inner, verify=verify)(given)
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([given, out, torch.rand(3), *model.buffers(), *grads])
    assert said() == (2, 2, [])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_an_input_that_is_a_parameter(
    forged: Callable[..., None], said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    forged()
    latent = nn.Parameter(image())
    verified(seeded(Image))(latent).sum().backward()
    assert latent.grad is not None
    assert said() == (2, 2, [])


def test_windows_as_batches(said: Callable[[], tuple[int, int, list[str]]]) -> None:
    """Windows of 6×9 of an image of 12×27, as rows of the batch."""
    attention = seeded(Attention)

    def model(x: Tensor) -> Tensor:
        x = x.unflatten(3, (3, 9)).unflatten(2, (2, 6)).permute(0, 2, 4, 3, 5, 1)
        out: Tensor = attention(x.reshape(-1, 54, WIDTH))
        return out

    declared = policy(layout={"grid": list(GRID)})
    with torch.no_grad():
        verified(model, declared)(torch.randn(2, WIDTH, 12, 27))
    right, of, doubts = said()
    assert right == of and not doubts


def test_frames_as_batches(
    forged: Callable[..., None], said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    """[batch, frames × height × width, channels], attention within each frame, and to the first."""
    attention = seeded(Attention)

    def model(x: Tensor) -> Tensor:
        out: Tensor = attention(x.reshape(-1, 54, WIDTH))
        return out

    def to_the_first(x: Tensor) -> Tensor:
        frames = x.reshape(-1, 4, 54, WIDTH)
        first = frames[:, :1].expand(frames.shape)
        q, k, v = (t[:, :, None] for t in (frames, first, first))
        return attend(q, k, v)

    forged()
    given = torch.randn(2, 4 * 54, WIDTH)
    with torch.no_grad():
        verified(model)(given)
        assert said() == (1, 1, [])
        with pytest.raises(LayoutError, match="keys"):
            verified(to_the_first)(given)


def test_a_graph_that_does_not_run_as_it_is_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], tuple[int, int, list[str]]]
) -> None:
    def fails(self: Probe, inputs: Sequence[Any]) -> Any:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(Probe, "run", fails)
    with torch.no_grad():
        verified(seeded(Image))(image())
    assert "NotImplementedError: no kernel" in said()[2][0]


@pytest.mark.parametrize("value", ["masks", True, ["layouts"], ""])
def test_other_values_are_refused(value: Any) -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(OptionsError, match="'verify' must be 'layouts'"):
        gna(graph, [], options={"verify": value})


def test_the_error_is_public() -> None:
    assert gna_compile.LayoutError is verify_layouts.LayoutError
    assert issubclass(LayoutError, RuntimeError)
    assert LayoutError.__doc__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_a_gpu(mode: str | None, said: Callable[[], tuple[int, int, list[str]]]) -> None:
    model = seeded(lambda: Image(text=3)).to("cuda", torch.bfloat16)
    loose = policy(allow_slow_providers=True)
    with torch.no_grad():
        compiled = verified(model, loose, inner="inductor", mode=mode)
        for _ in range(3):
            compiled(image(2).to("cuda", torch.bfloat16))
    assert said() == (2, 2, [])
