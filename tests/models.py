"""Small real models with random weights: diffusers, transformers and timm classes as users run them.

`build(name)` gives a model in eval mode and the keyword arguments of one forward call. Sizes are
small and every axis of a token grid has another length, so that swapped axes show. Weights are
seeded, and none is zero: models in training start with zeroed output layers, which would hide what
attention computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Grid = tuple[int, ...]
Inputs = dict[str, Any]

VIDEO: Grid = (5, 6, 8)
IMAGE: Grid = (8, 10)
SQUARE: Grid = (10, 10)
TEXT = 14
"""Text tokens of models that take text."""
HIDDEN_TEXT = 5
"""How many of them, at the end, a model's text mask hides."""
TEXT_WIDTH = 32
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""Under torch 2.11 transformers hands ViT and DINOv2 a mask that hides nothing: they stay dense."""


@dataclass(frozen=True)
class Recipe:
    """How to make one model and its inputs.

    Attributes:
        library: "diffusers", "transformers" or "timm".
        grid: default token grid, (T, H, W) or (H, W).
        model: makes the model; a model with a table of positions is made for one grid.
        inputs: (grid, batch) to the keyword arguments of `forward`.
        any_grid: one model takes every grid.
    """

    library: Literal["diffusers", "transformers", "timm"]
    grid: Grid
    model: Callable[[Grid], nn.Module]
    inputs: Callable[[Grid, int], Inputs]
    any_grid: bool = True


@dataclass(frozen=True)
class Built:
    """A model, the keyword arguments of one forward call, and the token grid that they have."""

    model: nn.Module
    inputs: Inputs
    grid: Grid

    def run(self, model: Callable[..., Any] | None = None) -> Tensor:
        """The main output of `model` (by default this one) on the inputs, without gradients."""
        with torch.no_grad():
            return main_output((self.model if model is None else model)(**self.inputs))


def build(
    name: str,
    grid: Grid | None = None,
    *,
    batch: int = 1,
    seed: int = 0,
    written_out: bool = False,
) -> Built:
    """Makes the model `name` of `MODELS` and its inputs.

    Args:
        grid: token grid; by default the recipe's.
        batch: samples in the batch.
        seed: of weights and inputs; equal seeds give equal values.
        written_out: attention as matmul, softmax, matmul instead of the fused function; the
            weights are the same. transformers and timm only.
    """
    recipe = MODELS[name]
    grid = grid or recipe.grid
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.model(grid).eval()
        randomize(model, seed)
        torch.manual_seed(seed + 1)
        inputs = recipe.inputs(grid, batch)
    if written_out:
        write_out_attention(model)
    return Built(model, inputs, grid)


def inputs_for(name: str, grid: Grid, *, batch: int = 1, seed: int = 0) -> Inputs:
    """Other inputs for a model that takes every grid."""
    recipe = MODELS[name]
    if not recipe.any_grid:
        raise ValueError(f"{name} is made for one grid")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return recipe.inputs(grid, batch)


def main_output(result: Any) -> Tensor:
    """The main tensor of what a forward returned: a tensor, a tuple, or a library's output class."""
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, Mapping) else result[0]
    return result


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draws all weights anew so that signals keep their size and no weight is zero.

    Libraries start some layers at zero and others so small that every attention is a plain mean.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            # Weights of linear layers and convolutions; a position table has (1, tokens, width).
            inputs = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            parameter.normal_(0.0, inputs**-0.5, generator=generator)
        elif not parameter.any():
            parameter.normal_(0.0, 0.1, generator=generator)


def write_out_attention(model: nn.Module) -> None:
    """Switches a transformers or timm model from fused attention to matmul, softmax, matmul."""
    switch: Any = getattr(model, "set_attn_implementation", None)
    by_class = any(type(module).__name__.endswith("SdpaAttention") for module in model.modules())
    if switch is not None and not by_class:
        switch("eager")
        return
    fused: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not fused:
        raise ValueError(
            f"{type(model).__name__} has no switch from fused to written-out attention"
        )
    for module in fused:
        module.fused_attn = False


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _steps(batch: int) -> Tensor:
    return torch.linspace(300, 700, batch)


def _text_mask(batch: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """[batch, TEXT]: the last tokens are padding; later samples have one more each."""
    mask = torch.ones(batch, TEXT, dtype=dtype)
    for sample in range(batch):
        mask[sample, TEXT - HIDDEN_TEXT - sample :] = 0
    return mask


def _flux(grid: Grid) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def flux_ids(grid: Grid, columns: int = 3) -> Tensor:
    """[H * W, columns] positions of packed latents: column 1 the row, column 2 the column."""
    height, width = grid
    ids = torch.zeros(height, width, columns)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(height * width, columns)


def _flux_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": _noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "pooled_projections": _noise(batch, 24),
        "timestep": _steps(batch) / 1000,
        "img_ids": flux_ids(grid),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def _flux2(grid: Grid) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux2_inputs(grid: Grid, batch: int) -> Inputs:
    text_ids = torch.zeros(TEXT, 4)
    text_ids[:, 3] = torch.arange(TEXT)
    return {
        "hidden_states": _noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "timestep": _steps(batch) / 1000,
        "img_ids": flux_ids(grid, columns=4),
        "txt_ids": text_ids,
        "guidance": torch.full((batch,), 3.5),
        "return_dict": False,
    }


def _hunyuan_video(grid: Grid) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan_video_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": _noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": _steps(batch),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": _text_mask(batch),
        "pooled_projections": _noise(batch, 24),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def _wan(grid: Grid) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )


def _wan_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": _noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": _steps(batch),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def _cosmos(grid: Grid) -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=16,
        max_size=(32, 64, 64),
        concat_padding_mask=False,  # resizing that mask is the one thing that needs torchvision
    )


def _cosmos_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": _noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": _steps(batch),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "fps": 24,
        "return_dict": False,
    }


def _cogvideox(grid: Grid) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )


def _cogvideox_inputs(grid: Grid, batch: int) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), frames)
    return {
        "hidden_states": _noise(batch, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "timestep": _steps(batch).long(),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


def _ltx(grid: Grid) -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )


def _ltx_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": _noise(batch, frames * height * width, 8),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "timestep": _steps(batch).long(),
        "encoder_attention_mask": _text_mask(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


def _sd3(grid: Grid) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _sd3_inputs(grid: Grid, batch: int) -> Inputs:
    height, width = grid
    return {
        "hidden_states": _noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "pooled_projections": _noise(batch, 24),
        "timestep": _steps(batch),
        "return_dict": False,
    }


def _mochi(grid: Grid) -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    )


def _mochi_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": _noise(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "timestep": _steps(batch),
        "encoder_attention_mask": _text_mask(batch),
        "return_dict": False,
    }


def _allegro(grid: Grid) -> nn.Module:
    from diffusers import AllegroTransformer3DModel

    return AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=2 * grid[1],
        sample_width=2 * grid[2],
        sample_frames=grid[0],
        caption_channels=TEXT_WIDTH,
    )


def _allegro_inputs(grid: Grid, batch: int) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    tables = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (height, width)), (height, width), frames)
    positions = torch.cartesian_prod(*(axis.long() for axis in tables[3:]))
    return {
        "hidden_states": _noise(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "timestep": _steps(batch).long(),
        "encoder_attention_mask": _text_mask(batch, torch.float32),
        "image_rotary_emb": (tables[:3], positions.reshape(-1, 3).t().reshape(3, 1, -1).unbind()),
        "return_dict": False,
    }


def _allegro_masked_inputs(grid: Grid, batch: int) -> Inputs:
    """As above, with the mask of valid latents that the model also takes: here all of them."""
    inputs = _allegro_inputs(grid, batch)
    latents = inputs["hidden_states"]
    return {**inputs, "attention_mask": torch.ones(batch, *latents.shape[2:])}


def _pixart(grid: Grid) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=32,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )


def _pixart_inputs(grid: Grid, batch: int) -> Inputs:
    height, width = grid
    return {
        "hidden_states": _noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": _text_mask(batch, torch.float32),
        "timestep": _steps(batch).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _qwen_image(grid: Grid) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": _noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "encoder_hidden_states_mask": _text_mask(batch),
        "timestep": _steps(batch) / 1000,
        "img_shapes": [[(1, *grid)]] * batch,
        "return_dict": False,
    }


def _sd_unet(grid: Grid) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=grid,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),  # the number of heads; the name is a known slip of diffusers
        norm_num_groups=8,
    )


def _sd_unet_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "sample": _noise(batch, 4, *grid),
        "timestep": _steps(batch),
        "encoder_hidden_states": _noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}


def _pixels(grid: Grid, batch: int) -> Inputs:
    return {"pixel_values": _noise(batch, 3, 4 * grid[0], 4 * grid[1])}


def _pixels_interpolated(grid: Grid, batch: int) -> Inputs:
    return {**_pixels(grid, batch), "interpolate_pos_encoding": True}


def _vit(grid: Grid) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**VISION, image_size=(4 * grid[0], 4 * grid[1])))


def _dinov2(grid: Grid) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    vision = {**VISION, "mlp_ratio": 2}
    del vision["intermediate_size"]
    return Dinov2Model(Dinov2Config(**vision, image_size=32))


def _dinov3(grid: Grid) -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**VISION, image_size=40, num_register_tokens=4))


def _clip(grid: Grid) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**VISION, image_size=32, projection_dim=16))


def _siglip(grid: Grid) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=32))


def _sam(grid: Grid) -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    vision = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    return SamVisionModel(
        SamVisionConfig(
            **vision,
            mlp_dim=64,
            output_channels=16,
            image_size=4 * grid[0],
            window_size=5,
            global_attn_indexes=[1],
        )
    )


def _qwen2_vl(grid: Grid) -> nn.Module:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VisionTransformerPretrainedModel,
        Qwen2VLVisionConfig,
    )

    return Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4)
    )


def _qwen2_5_vl(grid: Grid) -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionConfig,
    )

    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=32,
            num_heads=2,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
        )
    )


def _qwen_vl_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": _noise(batch * frames * height * width, 3 * 2 * 4 * 4),
        "grid_thw": torch.tensor([grid] * batch),
    }


def _timm(name: str, grid: Grid, patch: int) -> nn.Module:
    from torchvision_stub import torchvision_stub

    with torchvision_stub():
        import timm
    return timm.create_model(
        name,
        img_size=(patch * grid[0], patch * grid[1]),
        patch_size=patch,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    )


def _timm_inputs(grid: Grid, batch: int) -> Inputs:
    return {"x": _noise(batch, 3, 4 * grid[0], 4 * grid[1])}


MODELS: dict[str, Recipe] = {
    "flux": Recipe("diffusers", IMAGE, _flux, _flux_inputs),
    "flux2": Recipe("diffusers", IMAGE, _flux2, _flux2_inputs),
    "hunyuan-video": Recipe("diffusers", VIDEO, _hunyuan_video, _hunyuan_video_inputs),
    "wan": Recipe("diffusers", VIDEO, _wan, _wan_inputs),
    "cosmos": Recipe("diffusers", VIDEO, _cosmos, _cosmos_inputs),
    "cogvideox": Recipe("diffusers", VIDEO, _cogvideox, _cogvideox_inputs),
    "ltx": Recipe("diffusers", VIDEO, _ltx, _ltx_inputs),
    "sd3": Recipe("diffusers", IMAGE, _sd3, _sd3_inputs),
    "mochi": Recipe("diffusers", VIDEO, _mochi, _mochi_inputs),
    "allegro": Recipe("diffusers", VIDEO, _allegro, _allegro_inputs),
    "allegro-masked": Recipe("diffusers", VIDEO, _allegro, _allegro_masked_inputs),
    "pixart": Recipe("diffusers", IMAGE, _pixart, _pixart_inputs),
    "qwen-image": Recipe("diffusers", IMAGE, _qwen_image, _qwen_image_inputs),
    "sd-unet": Recipe("diffusers", IMAGE, _sd_unet, _sd_unet_inputs),
    "vit": Recipe("transformers", IMAGE, _vit, _pixels, any_grid=False),
    "dinov2": Recipe("transformers", IMAGE, _dinov2, _pixels),
    "dinov3": Recipe("transformers", IMAGE, _dinov3, _pixels),
    "clip": Recipe("transformers", IMAGE, _clip, _pixels_interpolated),
    "siglip": Recipe("transformers", IMAGE, _siglip, _pixels_interpolated),
    "sam": Recipe("transformers", SQUARE, _sam, _pixels, any_grid=False),
    "qwen2-vl": Recipe("transformers", (2, 6, 8), _qwen2_vl, _qwen_vl_inputs),
    "qwen2.5-vl": Recipe("transformers", (2, 6, 8), _qwen2_5_vl, _qwen_vl_inputs),
    "timm-vit": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("vit_tiny_patch16_224", grid, 4),
        _timm_inputs,
        any_grid=False,
    ),
    "timm-eva02": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("eva02_tiny_patch14_224", grid, 4),
        _timm_inputs,
        any_grid=False,
    ),
}
