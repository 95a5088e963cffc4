"""Recipes of diffusers' models of videos. `models` has the whole list."""

from __future__ import annotations

from typing import Any

import torch
from models_base import (
    HIDDEN_TEXT,
    TEXT,
    TEXT_WIDTH,
    VIDEO,
    Grid,
    Inputs,
    Recipe,
    noise,
    steps,
    text_mask,
)
from torch import nn


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
        "hidden_states": noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "pooled_projections": noise(batch, 24),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def _wan(grid: Grid) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**WAN)


def _wan_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
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
        "hidden_states": noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
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
        "hidden_states": noise(batch, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch).long(),
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
        "hidden_states": noise(batch, frames * height * width, 8),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch).long(),
        "encoder_attention_mask": text_mask(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
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
        "hidden_states": noise(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch),
        "encoder_attention_mask": text_mask(batch),
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
        "hidden_states": noise(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch).long(),
        "encoder_attention_mask": text_mask(batch, torch.float32),
        "image_rotary_emb": (tables[:3], positions.reshape(-1, 3).t().reshape(3, 1, -1).unbind()),
        "return_dict": False,
    }


def _allegro_masked_inputs(grid: Grid, batch: int) -> Inputs:
    """As above, with the mask of valid latents that the model also takes: here all of them."""
    inputs = _allegro_inputs(grid, batch)
    latents = inputs["hidden_states"]
    return {**inputs, "attention_mask": torch.ones(batch, *latents.shape[2:])}


IMAGE_TO_VIDEO = {**WAN, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 48}
"""Its latents come with those of the first frame and a mask."""


def _wan_i2v(grid: Grid) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**IMAGE_TO_VIDEO)


def _image_to_video_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        **_wan_inputs(grid, batch),
        "hidden_states": noise(batch, 12, frames, 2 * height, 2 * width),
        # The last 512 tokens are taken for text, whatever stands before them for the image.
        "encoder_hidden_states": noise(batch, 512, TEXT_WIDTH),
        "encoder_hidden_states_image": noise(batch, 7, 16),
    }


def _wan_vace(grid: Grid) -> nn.Module:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=12)


def _wan_vace_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    control = noise(batch, 12, frames, 2 * height, 2 * width)
    return {**_wan_inputs(grid, batch), "control_hidden_states": control}


def _wan_animate(grid: Grid) -> nn.Module:
    from diffusers import WanAnimateTransformer3DModel

    return WanAnimateTransformer3DModel(
        **{**IMAGE_TO_VIDEO, "latent_channels": 4},
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _wan_animate_inputs(grid: Grid, batch: int) -> Inputs:
    """The first frame is that of the reference image, without a pose."""
    frames, height, width = grid
    return {
        **_image_to_video_inputs(grid, batch),
        "pose_hidden_states": noise(batch, 4, frames - 1, 2 * height, 2 * width),
        "face_pixel_values": noise(batch, 3, 4 * frames - 7, 8, 8),
    }


def _chrono_edit(grid: Grid) -> nn.Module:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**IMAGE_TO_VIDEO, rope_temporal_skip_len=8)


def _skyreels_v2(grid: Grid) -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**WAN)


def _skyreels_v2_causal(grid: Grid) -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=2)


def _skyreels_v2_causal_inputs(grid: Grid, batch: int) -> Inputs:
    """Diffusion forcing: each frame has a time of its own and sees no later pair of frames."""
    return {
        **_wan_inputs(grid, batch),
        "timestep": torch.linspace(700, 300, grid[0]).expand(batch, -1),
        "enable_diffusion_forcing": True,
    }


def _ltx2(grid: Grid) -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
        rope_type="split",
    )


AUDIO = 9
"""Tokens of the sound of a video."""


def _ltx2_inputs(grid: Grid, batch: int) -> Inputs:
    text = noise(batch, TEXT, TEXT_WIDTH)
    return {
        **_ltx_inputs(grid, batch),
        "encoder_hidden_states": text,
        "audio_hidden_states": noise(batch, AUDIO, 6),
        "audio_encoder_hidden_states": text,
        "audio_encoder_attention_mask": text_mask(batch),
        "timestep": steps(batch),
        "audio_num_frames": AUDIO,
        "fps": 24.0,
    }


def _ltx2_coordinates_inputs(grid: Grid, batch: int) -> Inputs:
    """As the pipeline calls it: with coordinates of the tokens that were made before."""
    inputs = _ltx2_inputs(grid, batch)
    model: Any = _ltx2(grid)
    device = torch.device("cpu")
    return {
        **inputs,
        "video_coords": model.rope.prepare_video_coords(batch, *grid, device, fps=24.0),
        "audio_coords": model.audio_rope.prepare_audio_coords(batch, AUDIO, device),
    }


def _kandinsky5(grid: Grid) -> nn.Module:
    from diffusers import Kandinsky5Transformer3DModel

    return Kandinsky5Transformer3DModel(
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=24,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )


def _kandinsky5_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames, 2 * height, 2 * width, 4),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch),
        "pooled_projections": noise(batch, 24),
        "visual_rope_pos": [torch.arange(length) for length in grid],
        "text_rope_pos": torch.arange(TEXT),
        "return_dict": False,
    }


def _easy_animate(grid: Grid) -> nn.Module:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
    )


def _latte(grid: Grid) -> nn.Module:
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_WIDTH,
        video_length=grid[0],
    )


def _motif_video(grid: Grid) -> nn.Module:
    from diffusers import MotifVideoTransformer3DModel

    return MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def _motif_video_inputs(grid: Grid, batch: int) -> Inputs:
    return {**_wan_inputs(grid, batch), "encoder_attention_mask": text_mask(batch)}


def _consis_id(grid: Grid) -> nn.Module:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=12,
        LFE_vit_dim=16,
        LFE_depth=1,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=1,
    )


def _consis_id_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        **_cogvideox_inputs(grid, batch),
        "id_cond": noise(batch, 12),
        "id_vit_hidden": [noise(batch, 6, 16)],
    }


GLYPHS, FRAME_TOKENS = 6, 7
"""Tokens of a second text encoder, and of an encoder of the first frame."""


def _hunyuan_video15(grid: Grid) -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=24,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan_video15_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 4, *grid),
        "timestep": steps(batch),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "encoder_hidden_states_2": noise(batch, GLYPHS, 24),
        "encoder_attention_mask_2": torch.arange(GLYPHS).expand(batch, -1) < 4,
        "image_embeds": noise(batch, FRAME_TOKENS, 16),
        "return_dict": False,
    }


def _kandinsky6(grid: Grid) -> nn.Module:
    from diffusers import Kandinsky6Transformer3DModel

    return Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=24,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=6,
        out_audio_dim=6,
    )


def _kandinsky6_inputs(grid: Grid, batch: int) -> Inputs:
    """Latents come with those of a first frame and a mask."""
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames, 2 * height, 2 * width, 9),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "pooled_projections": noise(batch, 24),
        "timestep": steps(batch),
        "audio_hidden_states": noise(batch, AUDIO, 6),
        "return_dict": False,
    }


def _any_flow(grid: Grid) -> nn.Module:
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(**WAN)


def _any_flow_inputs(grid: Grid, batch: int) -> Inputs:
    """Each frame has two times, from which and to which it goes."""
    frames, height, width = grid
    return {
        "hidden_states": noise(batch, frames, 4, 2 * height, 2 * width),
        "timestep": steps(batch)[:, None].expand(-1, frames),
        "r_timestep": steps(batch)[:, None].expand(-1, frames) - 100,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def _helios(grid: Grid) -> nn.Module:
    from diffusers import HeliosTransformer3DModel

    sizes = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    return HeliosTransformer3DModel(**sizes, rope_dim=(8, 8, 8))


def _history(grid: Grid, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Latents and positions in time of 16, 2 and 2 earlier frames: the last with the first one."""
    frames, height, width = grid
    first, *indices, new = torch.arange(20 + frames).split([1, 16, 2, 1, frames])
    long, middle, last = indices
    short = torch.cat([first, last])
    latents = [noise(batch, 4, len(part), 2 * height, 2 * width) for part in (long, middle, short)]
    return latents, [long, middle, short, new]


def _helios_inputs(grid: Grid, batch: int) -> Inputs:
    """What is further back has larger patches."""
    (long, middle, short), indices = _history(grid, batch)
    at_long, at_middle, at_short, at_new = (part.expand(batch, -1) for part in indices)
    return {
        **_wan_inputs(grid, batch),
        "indices_hidden_states": at_new,
        "indices_latents_history_short": at_short,
        "indices_latents_history_mid": at_middle,
        "indices_latents_history_long": at_long,
        "latents_history_short": short,
        "latents_history_mid": middle,
        "latents_history_long": long,
    }


def _framepack(grid: Grid) -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )


def _framepack_inputs(grid: Grid, batch: int) -> Inputs:
    (long, middle, short), indices = _history(grid, batch)
    at_long, at_middle, at_short, at_new = indices
    return {
        **_hunyuan_video_inputs(grid, batch),
        "image_embeds": noise(batch, FRAME_TOKENS, 16),
        "indices_latents": at_new,
        "latents_clean": short,
        "indices_latents_clean": at_short,
        "latents_history_2x": middle,
        "indices_latents_history_2x": at_middle,
        "latents_history_4x": long,
        "indices_latents_history_4x": at_long,
    }


def _minimax_h3(grid: Grid) -> nn.Module:
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=6,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=4,
    )


def _minimax_h3_inputs(grid: Grid, batch: int) -> Inputs:
    """Patches by the place of each in one sequence: text, sound of two channels, video."""
    frames, height, width = grid
    lengths = torch.tensor([TEXT, 2 * AUDIO, frames * height * width])
    text, sound, video = torch.arange(int(lengths.sum())).split(lengths.tolist())
    spans = torch.tensor([1.0, 4.0, 4.0, 4.0, 4.0]).repeat(2)[: frames - 1] * 5 / 3
    sides = torch.tensor([height, width]) / (height * width) ** 0.5
    down, across = (
        32 * ((1 - side) / 2 + side * torch.arange(length) / length)
        for side, length in zip(sides, (height, width), strict=True)
    )
    time = TEXT + torch.cat([torch.zeros(1), spans.cumsum(0)])
    ids = torch.zeros(len(text) + len(sound) + len(video), 3)
    ids[text, 0] = text.float()
    ids[sound, 0] = TEXT + torch.arange(AUDIO).repeat(2).float()
    ids[sound, 2] = across[[0, -1]].repeat_interleave(AUDIO)
    ids[video] = torch.cartesian_prod(time, down, across)
    return {
        "hidden_states": noise(batch, len(video), 16),
        "audio_hidden_states": noise(batch, len(sound), 6),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": torch.tensor([500.0]),
        "timestep_indices": torch.zeros(len(ids), dtype=torch.long),
        "token_tags": torch.tensor([1, 2, 0]).repeat_interleave(lengths),
        "position_ids": ids.double(),
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
        "return_dict": False,
    }


def _sana_video(grid: Grid) -> nn.Module:
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=TEXT_WIDTH,
        rope_max_seq_len=64,
    )


def _sana_video_inputs(grid: Grid, batch: int) -> Inputs:
    mask = text_mask(batch, torch.float32)
    return {**_wan_inputs(grid, batch), "encoder_attention_mask": mask}


def _spatio_temporal(grid: Grid) -> nn.Module:
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    return TransformerSpatioTemporalModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, cross_attention_dim=16
    )


def _spatio_temporal_inputs(grid: Grid, batch: int) -> Inputs:
    """As in the UNet of Stable Video Diffusion: the batch is all frames."""
    frames, height, width = grid
    return {
        "hidden_states": noise(batch * frames, 32, height, width),
        "encoder_hidden_states": noise(batch * frames, 1, 16),
        "image_only_indicator": torch.zeros(batch, frames),
        "return_dict": False,
    }


def _stable_audio(grid: Grid) -> nn.Module:
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=8,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=24,
        cross_attention_input_dim=TEXT_WIDTH,
    )


def _stable_audio_inputs(grid: Grid, batch: int) -> Inputs:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    (length,) = grid
    return {
        "hidden_states": noise(batch, 8, length),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "global_hidden_states": noise(batch, 1, 24),
        "rotary_embedding": get_1d_rotary_pos_embed(
            8, length + 1, use_real=True, repeat_interleave_real=False
        ),
        "return_dict": False,
    }


def _temporal(grid: Grid) -> nn.Module:
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    return TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, norm_num_groups=8
    )


def _temporal_inputs(grid: Grid, batch: int) -> Inputs:
    """As in the UNets of text to video: the batch is all frames, then all places."""
    frames, height, width = grid
    return {
        "hidden_states": noise(batch * frames, 32, height, width),
        "num_frames": frames,
        "return_dict": False,
    }


def _cosmos3(grid: Grid) -> nn.Module:
    from diffusers import Cosmos3OmniTransformer

    return Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        vocab_size=64,
        rope_axes_dim=(4, 2, 2),
    )


def _cosmos3_inputs(grid: Grid, batch: int) -> Inputs:
    """One sample, as it packs text and video to one sequence without a batch."""
    frames, height, width = grid
    tokens = frames * height * width
    at_video = torch.arange(TEXT, TEXT + tokens)
    time, down, across = (torch.arange(length).float() for length in grid)
    video = torch.cartesian_prod(time + TEXT + 15000, down, across)
    text = torch.arange(TEXT).float()[:, None].expand(-1, 3)
    return {
        "input_ids": torch.randint(64, (TEXT,)),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([text, video]).t().contiguous(),
        "und_len": TEXT,
        "sequence_length": TEXT + tokens,
        "vision_tokens": [noise(1, 4, frames, 2 * height, 2 * width)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": at_video,
        "vision_mse_loss_indexes": at_video,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
        "return_dict": False,
    }


def _sana_wm_refiner(grid: Grid) -> nn.Module:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    return SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
        rope_type="split",
    )


def _sana_wm_refiner_inputs(grid: Grid, batch: int) -> Inputs:
    frames, height, width = grid
    model: Any = _sana_wm_refiner(grid)
    return {
        "hidden_states": noise(batch, frames * height * width, 8),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "timestep": steps(batch)[:, None].expand(-1, frames * height * width),
        "video_rotary_emb": model.build_rotary_emb_for_absolute_positions(
            batch, list(range(frames)), height, width, torch.device("cpu"), 24.0
        ),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }


def _sana_wm(grid: Grid) -> nn.Module:
    from diffusers import SanaWMTransformer3DModel

    return SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        softmax_every_n=1,  # as every fourth layer is; the attention of the others is linear
        linear_head_dim=32,
        chunk_plucker_channels=6,
        caption_channels=TEXT_WIDTH,
    )


def _sana_wm_inputs(grid: Grid, batch: int) -> Inputs:
    """With the path of a camera: its pose and its lens for each frame."""
    frames, height, width = grid
    pose = torch.eye(4).repeat(batch, frames, 1, 1)
    pose[..., 2, 3] = torch.arange(frames) / 10
    lens = torch.tensor([width, width, width / 2, height / 2]).float().expand(batch, frames, -1)
    return {
        "hidden_states": noise(batch, 4, *grid),
        "timestep": steps(batch)[:, None, None].expand(-1, 1, frames),
        "encoder_hidden_states": noise(batch, 1, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=2),
        "chunk_plucker": noise(batch, 6, *grid),
        "return_dict": False,
    }


def _wan_animate2(grid: Grid) -> nn.Module:
    from diffusers import WanAnimate2Transformer3DModel

    return WanAnimate2Transformer3DModel(
        text_len=TEXT,
        in_dim=12,
        dim=48,
        ffn_dim=64,
        freq_dim=32,
        text_dim=TEXT_WIDTH,
        out_dim=4,
        num_heads=2,
        num_layers=2,
    )


def _wan_animate2_inputs(grid: Grid, batch: int) -> Inputs:
    """The pass that keeps the keys of the driving video for those that draw the new one."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames, height, width = grid
    latents = (frames, 2 * height, 2 * width)
    return {
        "hidden_states": [noise(4, *latents) for _ in range(batch)],
        "timestep": steps(batch),
        "encoder_hidden_states": [noise(TEXT - 2, TEXT_WIDTH) for _ in range(batch)],
        "encoder_hidden_states_image": noise(batch, 7, 1280),
        "condition_latents": [noise(8, *latents) for _ in range(batch)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": frames * height * width,
        "offset_grid_sizes": torch.tensor([grid]),
        "return_dict": False,
    }


def _stable_audio3(grid: Grid) -> nn.Module:
    from diffusers import StableAudio3DiTModel

    return StableAudio3DiTModel(
        io_channels=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=TEXT_WIDTH,
        global_cond_dim=24,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=4,
    )


def _stable_audio3_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 8, *grid),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "global_hidden_states": noise(batch, 24),
        "encoder_attention_mask": text_mask(batch),
        "local_add_cond": noise(batch, 5, *grid),
        "return_dict": False,
    }


def _ace_step(grid: Grid) -> nn.Module:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=20,
        encoder_hidden_size=TEXT_WIDTH,
    )


def _ace_step_inputs(grid: Grid, batch: int) -> Inputs:
    """Sound of two latents a token, with its context."""
    (length,) = grid
    return {
        "hidden_states": noise(batch, 2 * length, 8),
        "timestep": steps(batch) / 1000,
        "timestep_r": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "context_latents": noise(batch, 2 * length, 16),
        "return_dict": False,
    }


def _longcat_audio(grid: Grid) -> nn.Module:
    from diffusers import LongCatAudioDiTTransformer

    return LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=TEXT_WIDTH, latent_dim=8, ff_mult=2.0
    )


def _longcat_audio_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, *grid, 8),
        "encoder_hidden_states": noise(batch, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "timestep": steps(batch) / 1000,
        "attention_mask": torch.ones(batch, *grid, dtype=torch.bool),
        "latent_cond": noise(batch, *grid, 8),
        "return_dict": False,
    }


def _minimax_music3(grid: Grid) -> nn.Module:
    from diffusers import MiniMaxMusic3Transformer1DModel

    return MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=TEXT_WIDTH,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=64,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )


def _minimax_music3_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": noise(batch, 8, *grid),
        "timestep": steps(batch) / 1000,
        "encoder_hidden_states": noise(batch, *grid, TEXT_WIDTH),
        "return_dict": False,
    }


HISTORY = "4x2x2 + 3x4 + 2x6x8"
"""16 earlier frames, 2 and 2, in patches of 4x8x8, 2x4x4 and 1x2x2."""

ALL = "5x6x8"

RECIPES: dict[str, Recipe] = {
    # The first refines the text alone. Text comes last.
    "hunyuan-video": Recipe(
        "diffusers",
        VIDEO,
        _hunyuan_video,
        _hunyuan_video_inputs,
        ("", *(f"{ALL} + {TEXT}",) * 4),
    ),
    "wan": Recipe("diffusers", VIDEO, _wan, _wan_inputs, (ALL,) * 2),
    "wan-i2v": Recipe("diffusers", VIDEO, _wan_i2v, _image_to_video_inputs, (ALL,) * 2),
    # One for the control, in `vace_blocks`, before those of the video.
    "wan-vace": Recipe("diffusers", VIDEO, _wan_vace, _wan_vace_inputs, (ALL,) * 3),
    # After the first block each frame's tokens see that frame's face: cross-attention.
    "wan-animate": Recipe("diffusers", VIDEO, _wan_animate, _wan_animate_inputs, (ALL,) * 2),
    # Two frames, as it edits an image: their positions in time are the first and the eighth.
    "chrono-edit": Recipe(
        "diffusers", (2, 6, 8), _chrono_edit, _image_to_video_inputs, ("2x6x8",) * 2
    ),
    "skyreels-v2": Recipe("diffusers", VIDEO, _skyreels_v2, _wan_inputs, (ALL,) * 2),
    "skyreels-v2-causal": Recipe(
        "diffusers",
        (4, 6, 8),
        _skyreels_v2_causal,
        _skyreels_v2_causal_inputs,
        ("4x6x8",) * 2,
    ),
    "cosmos": Recipe("diffusers", VIDEO, _cosmos, _cosmos_inputs, (ALL,) * 2),
    "cogvideox": Recipe(
        "diffusers", VIDEO, _cogvideox, _cogvideox_inputs, (f"{TEXT} + {ALL}",) * 2
    ),
    # The face comes in through unfused cross-attention.
    "consis-id": Recipe(
        "diffusers", VIDEO, _consis_id, _consis_id_inputs, (f"{TEXT} + {ALL}",) * 2
    ),
    "ltx": Recipe("diffusers", VIDEO, _ltx, _ltx_inputs, (ALL,) * 2),
    # Video and sound by turns; a token of sound has one position, in time.
    "ltx2": Recipe("diffusers", VIDEO, _ltx2, _ltx2_inputs, (ALL, str(AUDIO)) * 2),
    "ltx2-coordinates": Recipe(
        "diffusers", VIDEO, _ltx2, _ltx2_coordinates_inputs, (ALL, str(AUDIO)) * 2
    ),
    # Only the text that is not padding, behind the video.
    "mochi": Recipe(
        "diffusers", VIDEO, _mochi, _mochi_inputs, (f"{ALL} + {TEXT - HIDDEN_TEXT}",) * 2
    ),
    "allegro": Recipe("diffusers", VIDEO, _allegro, _allegro_inputs, (ALL,) * 2),
    "allegro-masked": Recipe("diffusers", VIDEO, _allegro, _allegro_masked_inputs, (ALL,) * 2),
    # The first is the text's.
    "kandinsky5": Recipe("diffusers", VIDEO, _kandinsky5, _kandinsky5_inputs, ("", ALL, ALL)),
    "easy-animate": Recipe(
        "diffusers", VIDEO, _easy_animate, _wan_inputs, (f"{TEXT} + {ALL}",) * 2
    ),
    # Frame by frame, then place by place: the batch is all frames, then all places.
    "latte": Recipe("diffusers", VIDEO, _latte, _wan_inputs, ("6x8", "5") * 2, any_grid=False),
    # Text comes last, and in the decoder, instead of text, the video that the encoder made.
    "motif-video": Recipe(
        "diffusers",
        VIDEO,
        _motif_video,
        _motif_video_inputs,
        (f"{ALL} + {TEXT}",) * 2 + (f"{ALL} + 240",),
    ),
    # The first refines the text alone. Image, glyphs, text and their padding come last.
    "hunyuan-video15": Recipe(
        "diffusers",
        VIDEO,
        _hunyuan_video15,
        _hunyuan_video15_inputs,
        ("", *(f"{ALL} + {FRAME_TOKENS + GLYPHS + TEXT}",) * 2),
    ),
    # Text once for the video and once for the sound; then video and sound by turns.
    "kandinsky6": Recipe(
        "diffusers", VIDEO, _kandinsky6, _kandinsky6_inputs, ("", "", *(ALL, str(AUDIO)) * 2)
    ),
    "any-flow": Recipe("diffusers", VIDEO, _any_flow, _any_flow_inputs, (ALL,) * 2),
    "helios": Recipe("diffusers", VIDEO, _helios, _helios_inputs, (f"{HISTORY} + {ALL}",) * 2),
    # The first refines the text alone. What is not padding of image and text comes last.
    "framepack": Recipe(
        "diffusers",
        VIDEO,
        _framepack,
        _framepack_inputs,
        ("", *(f"{HISTORY} + {ALL} + {FRAME_TOKENS + TEXT - HIDDEN_TEXT}",) * 2),
    ),
    # The first refines the text alone.
    "minimax-h3": Recipe(
        "diffusers",
        VIDEO,
        _minimax_h3,
        _minimax_h3_inputs,
        ("", *(f"{TEXT + 2 * AUDIO} + {ALL}",) * 2),
    ),
    # Its self-attention is linear: there is no matrix of weights to thin out.
    "sana-video": Recipe("diffusers", VIDEO, _sana_video, _sana_video_inputs, ()),
    # Frame by frame, then place by place.
    "spatio-temporal": Recipe(
        "diffusers", (5, 8, 10), _spatio_temporal, _spatio_temporal_inputs, ("8x10", "5")
    ),
    # Sound has one axis. A token for all of it comes first.
    "stable-audio": Recipe("diffusers", (80,), _stable_audio, _stable_audio_inputs, ("", "")),
    # Place by place, twice in a block.
    "temporal": Recipe("diffusers", (5, 8, 10), _temporal, _temporal_inputs, ("5", "5")),
    # Text alone, causal; the video's queries see text and video.
    "cosmos3": Recipe("diffusers", VIDEO, _cosmos3, _cosmos3_inputs, ("", "")),
    "sana-wm-refiner": Recipe(
        "diffusers", VIDEO, _sana_wm_refiner, _sana_wm_refiner_inputs, (ALL,) * 2
    ),
    # The video's, and the same turned by the rays of the camera.
    "sana-wm": Recipe("diffusers", VIDEO, _sana_wm, _sana_wm_inputs, (ALL,) * 2),
    "wan-animate2": Recipe("diffusers", VIDEO, _wan_animate2, _wan_animate2_inputs, (ALL,) * 2),
    "stable-audio3": Recipe("diffusers", (80,), _stable_audio3, _stable_audio3_inputs, ("",) * 4),
    # The first has a window of its own.
    "ace-step": Recipe("diffusers", (80,), _ace_step, _ace_step_inputs, ("80", "80")),
    "longcat-audio": Recipe(
        "diffusers", (80,), _longcat_audio, _longcat_audio_inputs, ("80", "80")
    ),
    # A token for the time comes first.
    "minimax-music3": Recipe(
        "diffusers", (80,), _minimax_music3, _minimax_music3_inputs, ("",) * 2
    ),
}
