"""Recipes of diffusers' models of images. `models` has the whole list."""

from __future__ import annotations

from typing import Any

import torch
from models_base import (
    HIDDEN_TEXT,
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


def _qwen_image_edit_inputs(grid: Grid, batch: int) -> Inputs:
    """The image that is edited comes behind the new one, here with other sides."""
    inputs = _qwen_image_inputs(grid, batch)
    latents = torch.cat([inputs["hidden_states"], noise(batch, 30, 16)], dim=1)
    return {**inputs, "hidden_states": latents, "img_shapes": [[(1, *grid), (1, 6, 5)]] * batch}


HUNYUAN_IMAGE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_WIDTH,
}


def _hunyuan_image(grid: Grid) -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        **HUNYUAN_IMAGE, text_embed_2_dim=24, rope_axes_dim=(8, 8)
    )


GLYPHS = 6
"""Tokens of a second text encoder, which reads what an image is to spell."""


def _hunyuan_image_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, *grid),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "encoder_hidden_states_2": noise(batch, GLYPHS, 24),
        "encoder_attention_mask_2": torch.arange(GLYPHS).expand(batch, -1) < 4,
        "return_dict": False,
    }


def _hunyuan_image_refiner(grid: Grid) -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    sizes = {**HUNYUAN_IMAGE, "in_channels": 8}
    return HunyuanImageTransformer2DModel(
        **sizes, patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6), guidance_embeds=True
    )


def _hunyuan_image_refiner_inputs(grid: Grid, batch: int) -> Inputs:
    """A video of one frame, with the image that is refined, and one text encoder."""
    return {
        "hidden_states": noise(batch, 8, *grid),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "guidance": torch.full((batch,), 3500.0),
        "return_dict": False,
    }


def _lumina2(grid: Grid) -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 64, 64),
        cap_feat_dim=TEXT_WIDTH,
    )


def _lumina2_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }


def _with_tables(model: nn.Module) -> nn.Module:
    """As after the first call, which makes the tables of positions."""
    rope: Any = model.rope_embedder
    rope(torch.zeros(1, 3, dtype=torch.long))
    return model


def _z_image(grid: Grid) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 8, 8],
    )
    return _with_tables(model)


def _z_image_inputs(grid: Grid, batch: int) -> Inputs:
    """A list of images and one of texts; both are padded to multiples of 32 tokens."""
    return {
        "x": [noise(4, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": steps(batch) / 1000,
        "cap_feats": [noise(TEXT, TEXT_WIDTH) for _ in range(batch)],
        "return_dict": False,
    }


def _hidream_image(grid: Grid) -> nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[24, TEXT_WIDTH],
        text_emb_dim=16,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(24, 20),
        llama_layers=[0, 1],
    )


def _hidream_image_inputs(grid: Grid, batch: int) -> Inputs:
    """Of a square image all tokens; another one is padded to the most tokens that there may be."""
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timesteps": steps(batch),
        "encoder_hidden_states_t5": noise(batch, TEXT, 24),
        "encoder_hidden_states_llama3": noise(2, batch, TEXT, TEXT_WIDTH),
        "pooled_embeds": noise(batch, 16),
        "return_dict": False,
    }


def _krea2(grid: Grid) -> nn.Module:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def _krea2_inputs(grid: Grid, batch: int) -> Inputs:
    """Three layers of the text model for each token of text."""
    return {
        "hidden_states": noise(batch, grid[0] * grid[1], 16),
        "encoder_hidden_states": noise(batch, TEXT, 3, TEXT_WIDTH),
        "timestep": steps(batch) / 1000,
        "position_ids": torch.cat([torch.zeros(TEXT, 3), flux_ids(grid)]),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }


def _ideogram4(grid: Grid) -> nn.Module:
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=TEXT_WIDTH,
        mrope_section=(2, 2, 2),
    )


def _ideogram4_inputs(grid: Grid, batch: int) -> Inputs:
    """One sequence of padding, text and image, with an id of role and segment for each token."""
    tokens = grid[0] * grid[1]
    image, text = flux_ids(grid).long() + 65536, torch.arange(TEXT - HIDDEN_TEXT)
    ids = torch.cat([torch.zeros(HIDDEN_TEXT, 3).long(), text[:, None].expand(-1, 3), image])
    lengths = torch.tensor([HIDDEN_TEXT, TEXT - HIDDEN_TEXT, tokens])
    roles = torch.tensor([0, 3, 2]).repeat_interleave(lengths)
    segments = torch.tensor([-1, 1, 1]).repeat_interleave(lengths)
    return {
        "hidden_states": torch.cat([torch.zeros(batch, TEXT, 16), noise(batch, tokens, 16)], dim=1),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": torch.cat(
            [noise(batch, TEXT, TEXT_WIDTH), torch.zeros(batch, tokens, TEXT_WIDTH)], dim=1
        ),
        "position_ids": ids.repeat(batch, 1, 1),
        "segment_ids": segments.repeat(batch, 1),
        "indicator": roles.repeat(batch, 1),
        "return_dict": False,
    }


def _prx(grid: Grid) -> nn.Module:
    from diffusers import PRXTransformer2DModel

    return PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=TEXT_WIDTH,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )


def _prx_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "attention_mask": text_mask(batch),
        "return_dict": False,
    }


def _ernie_image(grid: Grid) -> nn.Module:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=4,
        out_channels=4,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 8, 8),
    )


def _ernie_image_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, *grid),
        "timestep": steps(batch),
        "text_bth": noise(batch, TEXT, TEXT_WIDTH),
        "text_lens": TEXT - HIDDEN_TEXT - torch.arange(batch),
        "return_dict": False,
    }


def _sana(grid: Grid) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
    )


def _sana_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, *grid),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "return_dict": False,
    }


def _omnigen(grid: Grid) -> nn.Module:
    from diffusers import OmniGenTransformer2DModel

    return OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_layers=2,
        pad_token_id=0,
        vocab_size=64,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=24,
        time_step_dim=16,
    )


def _omnigen_inputs(grid: Grid, batch: int) -> Inputs:
    """Text and time are causal, the image sees all."""
    before, tokens = TEXT + 1, TEXT + 1 + grid[0] * grid[1]
    mask = torch.ones(batch, tokens, tokens)
    mask[:, :before] = torch.ones(before, tokens).tril()
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": steps(batch) / 1000,
        "input_ids": torch.randint(1, 64, (batch, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(tokens).repeat(batch, 1),
        "return_dict": False,
    }


def _bria_fibo2(grid: Grid) -> nn.Module:
    from diffusers import BriaFibo2Transformer2DModel

    model = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=16,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(8, 8, 8),
        axes_lens=(64, 64, 64),
    )
    return _with_tables(model)


def _bria_fibo2_inputs(grid: Grid, batch: int) -> Inputs:
    """Of the text's layers one makes the gist that comes before the image, one enters a block."""
    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, 2, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }


def _bria_fibo2_edit_inputs(grid: Grid, batch: int) -> Inputs:
    return {**_bria_fibo2_inputs(grid, batch), "context_latents": [noise(batch, 4, 12, 10)]}


def _nucleus_image(grid: Grid) -> nn.Module:
    from diffusers import NucleusMoEImageTransformer2DModel

    return NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=8.0,  # rounded down to a multiple of 128 channels
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
    )


def _nucleus_image_inputs(grid: Grid, batch: int) -> Inputs:
    return _qwen_image_inputs(grid, batch)


JOY = {
    "in_channels": 5,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": TEXT_WIDTH,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def _joy_image_edit(grid: Grid) -> nn.Module:
    from diffusers import JoyImageEditTransformer3DModel

    return JoyImageEditTransformer3DModel(**JOY)


def _joy_image_edit_inputs(grid: Grid, batch: int) -> Inputs:
    """The image that is edited and the new one, which the model puts first, as two frames."""
    images, height, width = grid
    return {
        "hidden_states": noise(batch, images, 5, 1, 2 * height, 2 * width),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def _joy_image_edit_plus(grid: Grid) -> nn.Module:
    from diffusers import JoyImageEditPlusTransformer3DModel

    return JoyImageEditPlusTransformer3DModel(**JOY)


def _joy_image_edit_plus_inputs(grid: Grid, batch: int) -> Inputs:
    """The patches of two images of different sides."""
    return {
        "hidden_states": noise(batch, grid[0] * grid[1] + 30, 5, 1, 2, 2),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_hidden_states_mask": text_mask(batch),
        "shape_list": [[(1, *grid), (1, 6, 5)]] * batch,
        "return_dict": False,
    }


def _dreamlite(grid: Grid) -> nn.Module:
    from diffusers import DreamLiteUNetModel

    return DreamLiteUNetModel(
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4),
        ff_mult=2,
    )


def _dreamlite_inputs(grid: Grid, batch: int) -> Inputs:
    return _sd_unet_inputs((2 * grid[0], 2 * grid[1]), batch)


def _lumina_next(grid: Grid) -> nn.Module:
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=TEXT_WIDTH,
    )


def _lumina_next_inputs(grid: Grid, batch: int) -> Inputs:
    """Of a table of positions for large images the model takes a corner."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": noise(batch, 4, 2 * grid[0], 2 * grid[1]),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_mask": text_mask(batch, torch.int64),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 48, 48),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


def _transformer_2d(grid: Grid) -> nn.Module:
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
    )


def _transformer_2d_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 32, *grid),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def _qwen_image21(grid: Grid) -> nn.Module:
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_image21_inputs(grid: Grid, batch: int) -> Inputs:
    """A place of the text's sequence stands for four tokens of the image."""
    tokens = grid[0] * grid[1]
    return {
        "hidden_states": noise(batch, tokens, 16),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch) / 1000,
        "img_shapes": [[(1, *grid)]] * batch,
        "img_mask": (torch.arange(TEXT + tokens // 4) >= TEXT).expand(batch, -1),
        "return_dict": False,
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
    # Two images, the second with its own rows and columns.
    "qwen-image-edit": Recipe(
        "diffusers", IMAGE, _qwen_image, _qwen_image_edit_inputs, (f"{JOINT} + 6x5",) * 2
    ),
    # The first refines the text alone. The text of both encoders comes last, padding behind it.
    "hunyuan-image": Recipe(
        "diffusers",
        IMAGE,
        _hunyuan_image,
        _hunyuan_image_inputs,
        ("", *(f"8x10 + {GLYPHS + TEXT}",) * 4),
    ),
    "hunyuan-image-refiner": Recipe(
        "diffusers",
        (1, 8, 10),
        _hunyuan_image_refiner,
        _hunyuan_image_refiner_inputs,
        ("", *(f"1x8x10 + {TEXT}",) * 4),
    ),
    # Text alone, then the image alone, then text without its padding and the image.
    "lumina2": Recipe(
        "diffusers",
        IMAGE,
        _lumina2,
        _lumina2_inputs,
        ("", "8x10", *(f"{TEXT - HIDDEN_TEXT} + 8x10",) * 2),
    ),
    # The image alone, text alone, then both, text last.
    "z-image": Recipe(
        "diffusers", (8, 12), _z_image, _z_image_inputs, ("8x12", "", *("8x12 + 32",) * 2)
    ),
    # 16 tokens of padding behind the image.
    "z-image-padded": Recipe(
        "diffusers", IMAGE, _z_image, _z_image_inputs, ("8x10 + 16", "", *("8x10 + 16 + 32",) * 2)
    ),
    # Text comes three times: of T5, of Llama's last layer, and of Llama's layer for this block.
    "hidream-image": Recipe(
        "diffusers", SQUARE, _hidream_image, _hidream_image_inputs, (f"10x10 + {3 * TEXT}",) * 2
    ),
    "hidream-image-padded": Recipe(
        "diffusers", IMAGE, _hidream_image, _hidream_image_inputs, (f"8x10 + 40 + {3 * TEXT}",) * 2
    ),
    # Layers of the text model, then text, then both text and image.
    "krea2": Recipe("diffusers", IMAGE, _krea2, _krea2_inputs, ("", "", JOINT, JOINT)),
    "ideogram4": Recipe("diffusers", IMAGE, _ideogram4, _ideogram4_inputs, (JOINT,) * 2),
    # The image's queries see text and image; no query is text.
    "prx": Recipe("diffusers", IMAGE, _prx, _prx_inputs, ()),
    # Tokens come before samples: [tokens, batch, width].
    "ernie-image": Recipe(
        "diffusers", IMAGE, _ernie_image, _ernie_image_inputs, (f"8x10 + {TEXT}",) * 2
    ),
    # Its self-attention is linear: there is no matrix of weights to thin out.
    "sana": Recipe("diffusers", IMAGE, _sana, _sana_inputs, ()),
    # Text, then one token for the time.
    "omnigen": Recipe("diffusers", IMAGE, _omnigen, _omnigen_inputs, (f"{TEXT} + 1 + 8x10",) * 2),
    # The image alone, the gist alone, then both.
    "bria-fibo2": Recipe(
        "diffusers", IMAGE, _bria_fibo2, _bria_fibo2_inputs, ("8x10", "", *("8 + 8x10",) * 2)
    ),
    "bria-fibo2-edit": Recipe(
        "diffusers",
        IMAGE,
        _bria_fibo2,
        _bria_fibo2_edit_inputs,
        ("8x10 + 6x5", "", *("8 + 8x10 + 6x5",) * 2),
    ),
    # The image's queries see text and image; no query is text.
    "nucleus-image": Recipe("diffusers", IMAGE, _nucleus_image, _nucleus_image_inputs, ()),
    "joy-image-edit": Recipe(
        "diffusers", (2, 8, 10), _joy_image_edit, _joy_image_edit_inputs, (f"2x8x10 + {TEXT}",) * 2
    ),
    "joy-image-edit-plus": Recipe(
        "diffusers",
        IMAGE,
        _joy_image_edit_plus,
        _joy_image_edit_plus_inputs,
        (f"8x10 + 6x5 + {TEXT}",) * 2,
    ),
    "dreamlite": Recipe("diffusers", IMAGE, _dreamlite, _dreamlite_inputs, ("8x10",) * 4),
    "lumina-next": Recipe("diffusers", IMAGE, _lumina_next, _lumina_next_inputs, ("8x10",) * 2),
    "transformer-2d": Recipe(
        "diffusers", IMAGE, _transformer_2d, _transformer_2d_inputs, ("8x10",) * 2
    ),
    # Text alone, causal; the image's queries see text and image.
    "qwen-image-21": Recipe("diffusers", IMAGE, _qwen_image21, _qwen_image21_inputs, ("",) * 2),
}
