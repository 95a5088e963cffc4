"""Recipes of diffusers' models of images. `models` has the whole list."""

from __future__ import annotations

import torch
from models_base import (
    IMAGE,
    SQUARE,
    TEXT,
    TEXT_WIDTH,
    Grid,
    Inputs,
    Recipe,
    noise,
    steps,
    text_mask,
)
from torch import Tensor, nn


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
        "hidden_states": noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "pooled_projections": noise(batch, 24),
        "timestep": steps(batch) / 1000,
        "img_ids": flux_ids(grid),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def _with_references(inputs: Inputs, *references: tuple[int, ...]) -> Inputs:
    """Reference images behind the image: the first id, height and width of each."""
    latents, ids = inputs["hidden_states"], inputs["img_ids"]
    for first, height, width in references:
        own = flux_ids((height, width), ids.shape[1])
        own[:, 0] = first
        latents = torch.cat([latents, noise(len(latents), height * width, latents.shape[2])], 1)
        ids = torch.cat([ids, own])
    return {**inputs, "hidden_states": latents, "img_ids": ids}


def _kontext_inputs(grid: Grid, batch: int) -> Inputs:
    """The image that is edited is as large as the new one, as Kontext's pipeline has it."""
    return _with_references(_flux_inputs(grid, batch), (1, *grid))


def _flux2_references_inputs(grid: Grid, batch: int) -> Inputs:
    return _with_references(_flux2_inputs(grid, batch), (10, *grid), (20, 6, 5))


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
        "hidden_states": noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch) / 1000,
        "img_ids": flux_ids(grid, columns=4),
        "txt_ids": text_ids,
        "guidance": torch.full((batch,), 3.5),
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
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "pooled_projections": noise(batch, 24),
        "timestep": steps(batch),
        "return_dict": False,
    }


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
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "timestep": steps(batch).long(),
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
        "hidden_states": noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_hidden_states_mask": text_mask(batch),
        "timestep": steps(batch) / 1000,
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
        "sample": noise(batch, 4, *grid),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def _cogview3_plus(grid: Grid) -> nn.Module:
    from diffusers import CogView3PlusTransformer2DModel

    return CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
    )


def _cogview4(grid: Grid) -> nn.Module:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        rope_axes_dim=(32, 32),
    )


def _cogview_inputs(grid: Grid, batch: int) -> Inputs:
    height, width = grid
    size = torch.tensor([[16.0 * height, 16.0 * width]] * batch)
    return {
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
        "return_dict": False,
    }


def _glm_image(grid: Grid) -> nn.Module:
    from diffusers import GlmImageTransformer2DModel

    return GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=64,
    )


def _glm_image_inputs(grid: Grid, batch: int) -> Inputs:
    inputs = _cogview_inputs(grid, batch)
    del inputs["original_size"]
    return {
        **inputs,
        "prior_token_id": torch.randint(64, (batch, grid[0] * grid[1])),
        "prior_token_drop": torch.zeros(batch, grid[0] * grid[1], dtype=torch.bool),
    }


def _aura_flow(grid: Grid) -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=32,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )


def _aura_flow_inputs(grid: Grid, batch: int) -> Inputs:
    height, width = grid
    return {
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch) / 1000,
        "return_dict": False,
    }


def _hunyuan_dit(grid: Grid) -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_layers=4,  # the fewest with a connection that skips some
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )


def _hunyuan_dit_inputs(grid: Grid, batch: int) -> Inputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    height, width = grid
    rotary = get_2d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width))
    return {
        "hidden_states": noise(batch, 4, 2 * height, 2 * width),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "text_embedding_mask": text_mask(batch),
        "encoder_hidden_states_t5": noise(batch, TEXT, 16),
        "text_embedding_mask_t5": text_mask(batch),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


def _dit(grid: Grid) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        sample_size=2 * grid[0],
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )


def _dit_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": steps(batch),
        "class_labels": torch.arange(batch),
        "return_dict": False,
    }


def _flux3(grid: Grid) -> nn.Module:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux3_inputs(grid: Grid, batch: int) -> Inputs:
    inputs = _flux2_inputs(grid, batch)
    del inputs["guidance"]
    return inputs


def _flux3_reference_inputs(grid: Grid, batch: int) -> Inputs:
    """As above, with a reference image of 6x5 tokens."""
    ids = flux_ids((6, 5), columns=4)
    ids[:, 0] = 10
    return {
        **_flux3_inputs(grid, batch),
        "image_cond_hidden_states": noise(batch, 30, 16),
        "image_cond_ids": ids,
    }


PACKED = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}
"""What models like FLUX, with packed latents, have in common."""


def _packed_inputs(grid: Grid, batch: int) -> Inputs:
    """Positions as FLUX and Chroma have them."""
    return {
        "hidden_states": noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch) / 1000,
        "img_ids": flux_ids(grid),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def _chroma(grid: Grid) -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        **PACKED, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1
    )


def _chroma_masked_inputs(grid: Grid, batch: int) -> Inputs:
    """With the mask that the pipeline gives: of its rows and columns the model makes a bias."""
    image = torch.ones(batch, grid[0] * grid[1])
    return {
        **_packed_inputs(grid, batch),
        "attention_mask": torch.cat([text_mask(batch, torch.float32), image], dim=1),
    }


def _longcat_image(grid: Grid) -> nn.Module:
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(**PACKED, pooled_projection_dim=24)


def _diagonal_text_ids() -> Tensor:
    ids = torch.zeros(TEXT, 3)
    ids[:, 1:] = torch.arange(TEXT)[:, None]
    return ids


def _longcat_image_inputs(grid: Grid, batch: int) -> Inputs:
    """The image's rows and columns start behind the text's; the first id tells the two apart."""
    ids = flux_ids(grid) + torch.tensor([1.0, TEXT, TEXT])
    return {**_packed_inputs(grid, batch), "img_ids": ids, "txt_ids": _diagonal_text_ids()}


def _ovis_image(grid: Grid) -> nn.Module:
    from diffusers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel(**PACKED, out_channels=16)


def _ovis_image_inputs(grid: Grid, batch: int) -> Inputs:
    return {**_packed_inputs(grid, batch), "txt_ids": _diagonal_text_ids()}


def _bria(grid: Grid) -> nn.Module:
    from diffusers import BriaTransformer2DModel

    return BriaTransformer2DModel(**PACKED)


def _bria_fibo(grid: Grid) -> nn.Module:
    from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel

    return BriaFiboTransformer2DModel(**PACKED, text_encoder_dim=24)


def _bria_fibo_inputs(grid: Grid, batch: int) -> Inputs:
    """With the mask of padded text that the pipeline gives, a layer of the text model per block."""
    image = torch.ones(batch, grid[0] * grid[1], dtype=torch.bool)
    mask = torch.cat([text_mask(batch), image], dim=1)
    return {
        **_packed_inputs(grid, batch),
        "text_encoder_layers": [noise(batch, TEXT, 24) for _ in range(4)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
    }


JOINT = f"{TEXT} + 8x10"

RECIPES: dict[str, Recipe] = {
    "flux": Recipe("diffusers", IMAGE, _flux, _flux_inputs, (JOINT,) * 4),
    "flux2": Recipe("diffusers", IMAGE, _flux2, _flux2_inputs, (JOINT,) * 4),
    # Images one after another, told apart by the first column of their ids.
    "flux-kontext": Recipe("diffusers", IMAGE, _flux, _kontext_inputs, (f"{JOINT} + 8x10",) * 4),
    "flux2-references": Recipe(
        "diffusers", IMAGE, _flux2, _flux2_references_inputs, (f"{JOINT} + 8x10 + 6x5",) * 4
    ),
    # Each mode by itself first: text, image, reference image. The last has a grid of its own.
    "flux3": Recipe(
        "diffusers",
        IMAGE,
        _flux3,
        _flux3_inputs,
        ("",) * 2 + ("8x10",) * 2 + (JOINT,) * 2,
    ),
    "flux3-reference": Recipe(
        "diffusers",
        IMAGE,
        _flux3,
        _flux3_reference_inputs,
        ("",) * 2 + ("8x10",) * 2 + ("6x5",) * 2 + (f"{JOINT} + 6x5",) * 2,
    ),
    # The second of the first block's two sees the image alone. Text comes last.
    "sd3": Recipe(
        "diffusers", IMAGE, _sd3, _sd3_inputs, (f"8x10 + {TEXT}", "8x10", f"8x10 + {TEXT}")
    ),
    "pixart": Recipe("diffusers", IMAGE, _pixart, _pixart_inputs, ("8x10",) * 2),
    "qwen-image": Recipe("diffusers", IMAGE, _qwen_image, _qwen_image_inputs, (JOINT,) * 2),
    "sd-unet": Recipe(
        "diffusers", IMAGE, _sd_unet, _sd_unet_inputs, ("8x10", "4x5", "8x10", "8x10")
    ),
    "cogview3-plus": Recipe("diffusers", IMAGE, _cogview3_plus, _cogview_inputs, (JOINT,) * 2),
    "cogview4": Recipe("diffusers", IMAGE, _cogview4, _cogview_inputs, (JOINT,) * 2),
    "glm-image": Recipe("diffusers", IMAGE, _glm_image, _glm_image_inputs, (JOINT,) * 2),
    # Eight registers come before the text.
    "aura-flow": Recipe(
        "diffusers", IMAGE, _aura_flow, _aura_flow_inputs, (f"{8 + TEXT} + 8x10",) * 4
    ),
    "hunyuan-dit": Recipe("diffusers", IMAGE, _hunyuan_dit, _hunyuan_dit_inputs, ("8x10",) * 4),
    # It takes the root of the number of tokens for both height and width.
    "dit": Recipe("diffusers", SQUARE, _dit, _dit_inputs, ("10x10",) * 2, any_grid=False),
    "chroma": Recipe("diffusers", IMAGE, _chroma, _packed_inputs, (JOINT,) * 4),
    "chroma-masked": Recipe("diffusers", IMAGE, _chroma, _chroma_masked_inputs, (JOINT,) * 4),
    "longcat-image": Recipe(
        "diffusers", IMAGE, _longcat_image, _longcat_image_inputs, (JOINT,) * 4
    ),
    "ovis-image": Recipe("diffusers", IMAGE, _ovis_image, _ovis_image_inputs, (JOINT,) * 4),
    "bria": Recipe("diffusers", IMAGE, _bria, _packed_inputs, (JOINT,) * 4),
    "bria-fibo": Recipe("diffusers", IMAGE, _bria_fibo, _bria_fibo_inputs, (JOINT,) * 4),
}
