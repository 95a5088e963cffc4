"""The models that other tests use: they run, and what they compute depends on their attention."""

from __future__ import annotations

import pytest
import torch
from masked_model import Call, attention_calls, masked
from models import HIDDEN_TEXT, MODELS, TEXT, build, inputs_for
from torch import Tensor

# Qwen's towers cut the batch into one attention per image (and per window) in Python.
SELF_ATTENTIONS = {
    "flux": [94] * 4,
    "flux2": [94] * 4,
    "hunyuan-video": [14] + [254] * 4,
    "wan": [240] * 2,
    "cosmos": [240] * 2,
    "cogvideox": [254] * 2,
    "ltx": [240] * 2,
    "sd3": [94, 80, 94],
    "mochi": [249] * 2,
    "allegro": [240] * 2,
    "allegro-masked": [240] * 2,
    "pixart": [80] * 2,
    "qwen-image": [94] * 2,
    "sd-unet": [80, 20, 80, 80],
    "vit": [81] * 2,
    "dinov2": [81] * 2,
    "dinov3": [85] * 2,
    "clip": [81] * 2,
    "siglip": [80] * 2,
    "sam": [25, 100],
    "qwen2-vl": [48] * 4,
    "qwen2.5-vl": [16, 16, 8, 8] * 2 + [48] * 2,
    "timm-vit": [81] * 2,
    "timm-eva02": [81] * 2,
}

OTHER_GRIDS = {2: (6, 12), 3: (4, 8, 6)}


def test_every_model_has_its_row() -> None:
    assert SELF_ATTENTIONS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_runs_and_depends_on_its_attention(name: str) -> None:
    built = build(name)
    output = built.run()
    assert output.isfinite().all()
    tokens = [call.query[-2] for call in attention_calls(built.model, built.inputs) if call.is_self]
    assert tokens == SELF_ATTENTIONS[name]

    def own_token(call: Call) -> Tensor | None:
        return torch.eye(call.query[-2], dtype=torch.bool) if call.is_self else None

    with masked(built.model, own_token):
        assert (built.run() - output).abs().max() > 0.3 * output.std()


@pytest.mark.parametrize("name", MODELS)
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
    assert before != after


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
