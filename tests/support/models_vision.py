"""Recipes of transformers' and timm's vision models. `models` has the whole list."""

from __future__ import annotations

from typing import Any

import torch
from models_base import IMAGE, SQUARE, VIDEO, Grid, Inputs, Recipe, noise
from torch import nn

CLIP: Grid = (4, 6, 6)
"""Of a model that takes square frames."""

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}


def _pixels(grid: Grid, batch: int) -> Inputs:
    return {"pixel_values": noise(batch, 3, 4 * grid[0], 4 * grid[1])}


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
        "hidden_states": noise(batch * frames * height * width, 3 * 2 * 4 * 4),
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
    return {"x": noise(batch, 3, 4 * grid[0], 4 * grid[1])}


def _naflex_patches(grid: Grid, batch: int) -> Inputs:
    """An image in patches, as timm's loader gives it; no sample has padding."""
    rows, columns = (torch.arange(length) for length in grid)
    places = torch.cartesian_prod(rows, columns)
    return {
        "x": noise(batch, grid[0] * grid[1], 3 * 4 * 4),
        "patch_coord": places.expand(batch, -1, -1),
        "patch_valid": torch.ones(batch, grid[0] * grid[1], dtype=torch.bool),
    }


def _sized(grid: Grid) -> dict[str, Any]:
    return {**VISION, "image_size": (4 * grid[-2], 4 * grid[-1])}


def _deit(grid: Grid) -> nn.Module:
    from transformers import DeiTConfig, DeiTModel

    return DeiTModel(DeiTConfig(**_sized(grid)))


def _ijepa(grid: Grid) -> nn.Module:
    from transformers import IJepaConfig, IJepaModel

    return IJepaModel(IJepaConfig(**_sized(grid)))


def _dinov2_registers(grid: Grid) -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    vision = {**VISION, "mlp_ratio": 2}
    del vision["intermediate_size"]
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**vision, image_size=32, num_register_tokens=4)
    )


def _yolos(grid: Grid) -> nn.Module:
    from transformers import YolosConfig, YolosModel

    return YolosModel(
        YolosConfig(**_sized(grid), num_detection_tokens=6, use_mid_position_embeddings=True)
    )


def _owlv2(grid: Grid) -> nn.Module:
    from transformers import Owlv2VisionConfig, Owlv2VisionModel

    return Owlv2VisionModel(Owlv2VisionConfig(**VISION, image_size=32))


def _dpt(grid: Grid) -> nn.Module:
    from transformers import DPTConfig, DPTForDepthEstimation

    return DPTForDepthEstimation(
        DPTConfig(
            **VISION,
            image_size=4 * grid[0],
            backbone_out_indices=[0, 1],
            neck_hidden_sizes=[16, 16],
            reassemble_factors=[1, 0.5],
            fusion_hidden_size=16,
        )
    )


def _depth_anything(grid: Grid) -> nn.Module:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    vision = {**VISION, "mlp_ratio": 2}
    del vision["intermediate_size"]
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=Dinov2Config(
                **vision,
                image_size=32,
                out_features=["stage1", "stage2"],
                reshape_hidden_states=False,
            ),
            patch_size=4,
            reassemble_hidden_size=32,
            reassemble_factors=[1, 0.5],
            neck_hidden_sizes=[16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
        )
    )


def _vitpose(grid: Grid) -> nn.Module:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    vision = {**VISION, "mlp_ratio": 2, "patch_size": (8, 8)}
    del vision["intermediate_size"]
    return VitPoseForPoseEstimation(
        VitPoseConfig(
            backbone_config=VitPoseBackboneConfig(
                **vision, image_size=(8 * grid[0], 8 * grid[1]), out_features=["stage2"]
            ),
            num_labels=3,
        )
    )


def _double_pixels(grid: Grid, batch: int) -> Inputs:
    return {"pixel_values": noise(batch, 3, 8 * grid[0], 8 * grid[1])}


def _segformer(grid: Grid) -> nn.Module:
    from transformers import SegformerConfig, SegformerModel

    return SegformerModel(
        SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        )
    )


def _frames(grid: Grid, batch: int) -> Inputs:
    """Two frames to a token."""
    frames, height, width = grid
    return {"pixel_values": noise(batch, 2 * frames, 3, 4 * height, 4 * width)}


def _videomae(grid: Grid) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEModel

    return VideoMAEModel(VideoMAEConfig(**_sized(grid), num_frames=2 * grid[0], tubelet_size=2))


def _vivit(grid: Grid) -> nn.Module:
    from transformers import VivitConfig, VivitModel

    sizes = _sized(grid)
    del sizes["patch_size"]
    return VivitModel(VivitConfig(**sizes, num_frames=2 * grid[0], tubelet_size=[2, 4, 4]))


def _vjepa2(grid: Grid) -> nn.Module:
    from transformers import VJEPA2Config, VJEPA2Model

    return VJEPA2Model(
        VJEPA2Config(
            patch_size=4,
            crop_size=4 * grid[1],
            frames_per_clip=2 * grid[0],
            tubelet_size=2,
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            mlp_ratio=2.0,
            pred_hidden_size=32,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
            pred_num_mask_tokens=2,
            pred_mlp_ratio=2.0,
        )
    )


def _vjepa2_inputs(grid: Grid, batch: int) -> Inputs:
    return {"pixel_values_videos": _frames(grid, batch)["pixel_values"]}


def _vjepa2_encoder_inputs(grid: Grid, batch: int) -> Inputs:
    return {**_vjepa2_inputs(grid, batch), "skip_predictor": True}


def _x_clip(grid: Grid) -> nn.Module:
    from transformers import XCLIPVisionConfig, XCLIPVisionModel

    return XCLIPVisionModel(
        XCLIPVisionConfig(
            **VISION,
            image_size=32,
            num_frames=grid[0],
            mit_hidden_size=32,
            mit_intermediate_size=32,
            mit_num_hidden_layers=1,
            mit_num_attention_heads=2,
        )
    )


def _x_clip_inputs(grid: Grid, batch: int) -> Inputs:
    return _pixels_interpolated(grid[1:], batch * grid[0])


CLASS = "1 + 8x10"

RECIPES: dict[str, Recipe] = {
    "vit": Recipe("transformers", IMAGE, _vit, _pixels, (CLASS,) * 2, any_grid=False),
    # A class token and one that learns from a teacher.
    "deit": Recipe("transformers", IMAGE, _deit, _pixels, ("2 + 8x10",) * 2, any_grid=False),
    "ijepa": Recipe("transformers", IMAGE, _ijepa, _pixels, ("8x10",) * 2, any_grid=False),
    "dinov2": Recipe("transformers", IMAGE, _dinov2, _pixels, (CLASS,) * 2),
    "dinov2-registers": Recipe(
        "transformers", IMAGE, _dinov2_registers, _pixels, ("5 + 8x10",) * 2
    ),
    "dinov3": Recipe("transformers", IMAGE, _dinov3, _pixels, ("5 + 8x10",) * 2),
    "clip": Recipe("transformers", IMAGE, _clip, _pixels_interpolated, (CLASS,) * 2),
    "owlv2": Recipe("transformers", IMAGE, _owlv2, _pixels_interpolated, (CLASS,) * 2),
    "siglip": Recipe("transformers", IMAGE, _siglip, _pixels_interpolated, ("8x10",) * 2),
    # Six tokens of objects come last.
    "yolos": Recipe("transformers", IMAGE, _yolos, _pixels, ("1 + 8x10 + 6",) * 2),
    # Its head takes the root of the number of tokens for both height and width.
    "dpt": Recipe("transformers", SQUARE, _dpt, _pixels, ("1 + 10x10",) * 2, any_grid=False),
    "depth-anything": Recipe("transformers", IMAGE, _depth_anything, _pixels, (CLASS,) * 2),
    "vitpose": Recipe(
        "transformers", IMAGE, _vitpose, _double_pixels, ("8x10",) * 2, any_grid=False
    ),
    # The first stage's 16x20 queries have 8x10 keys, which a convolution made: no self-attention.
    "segformer": Recipe("transformers", IMAGE, _segformer, _double_pixels, ("8x10",) * 2),
    # The first has windows of 5x5 tokens: the batch is all windows.
    "sam": Recipe("transformers", SQUARE, _sam, _pixels, ("5x5", "10x10"), any_grid=False),
    # The order of tokens is that of blocks of 2x2, and each frame is one attention.
    "qwen2-vl": Recipe("transformers", (2, 6, 8), _qwen2_vl, _qwen_vl_inputs, ("",) * 4),
    # Windows first, of up to 4x4 tokens, their blocks of 2x2 one after another; then as above.
    "qwen2.5-vl": Recipe("transformers", (2, 6, 8), _qwen2_5_vl, _qwen_vl_inputs, ("",) * 10),
    "videomae": Recipe("transformers", VIDEO, _videomae, _frames, ("5x6x8",) * 2, any_grid=False),
    "vivit": Recipe("transformers", VIDEO, _vivit, _frames, ("1 + 5x6x8",) * 2, any_grid=False),
    "vjepa2": Recipe(
        "transformers", CLIP, _vjepa2, _vjepa2_encoder_inputs, ("4x6x6",) * 2, any_grid=False
    ),
    # The predictor sorts what it knows and what it is to predict by place: two tokens to a place.
    "vjepa2-predictor": Recipe(
        "transformers", CLIP, _vjepa2, _vjepa2_inputs, ("4x6x6", "4x6x6", ""), any_grid=False
    ),
    # One token of each frame to the others, then each frame with its own: the batch is all frames.
    "x-clip": Recipe(
        "transformers", VIDEO, _x_clip, _x_clip_inputs, ("5", "1 + 6x8 + 1") * 2, any_grid=False
    ),
    "timm-vit": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("vit_tiny_patch16_224", grid, 4),
        _timm_inputs,
        (CLASS,) * 2,
        any_grid=False,
    ),
    "timm-deit": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("deit_tiny_distilled_patch16_224", grid, 4),
        _timm_inputs,
        ("2 + 8x10",) * 2,
        any_grid=False,
    ),
    "timm-eva02": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("eva02_tiny_patch14_224", grid, 4),
        _timm_inputs,
        (CLASS,) * 2,
        any_grid=False,
    ),
    # Queries, keys and values apart, and a norm behind attention.
    "timm-eva02-clip": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("eva02_base_patch16_clip_224", grid, 4),
        _timm_inputs,
        (CLASS,) * 2,
        any_grid=False,
    ),
    # A register, no class token.
    "timm-rope": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("vit_medium_patch16_rope_reg1_gap_256", grid, 4),
        _timm_inputs,
        (CLASS,) * 2,
        any_grid=False,
    ),
    # Rotations that each head learns.
    "timm-rope-mixed": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("vit_small_patch16_rope_mixed_224", grid, 4),
        _timm_inputs,
        (CLASS,) * 2,
        any_grid=False,
    ),
    "timm-naflex": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("naflexvit_base_patch16_gap", grid, 4),
        _timm_inputs,
        ("4 + 8x10",) * 2,
    ),
    # The same model with patches: their places are an input, and there is always a mask.
    "timm-naflex-patches": Recipe(
        "timm",
        IMAGE,
        lambda grid: _timm("naflexvit_base_patch16_gap", grid, 4),
        _naflex_patches,
        ("4 + 8x10",) * 2,
    ),
}
