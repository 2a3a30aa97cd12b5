"""The zoo's diffusion models out of diffusers: U-Nets, diffusion transformers, a VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from member import Member


def _diffusers(name: str, config: Mapping[str, Any], small: Mapping[str, Any], **more: Any) -> Member:
    return Member(name, "diffusion", "diffusers", config=config, small=small, **more)


_DOWN = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
_UP = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]

DIFFUSERS: tuple[Member, ...] = (
    _diffusers(
        "sd15_unet_diffusers",
        {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": _DOWN,
            "up_block_types": _UP,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        {
            "sample_size": 16,
            "block_out_channels": [32, 64],
            "down_block_types": _DOWN[2:],
            "up_block_types": _UP[:2],
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
    ),
    _diffusers(
        "ddpm_unet",
        {"_class_name": "UNet2DModel", "sample_size": 64},
        {
            "sample_size": 16,
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 8,
        },
    ),
    _diffusers(
        "dit_xl2_diffusers",
        {
            "_class_name": "DiTTransformer2DModel",
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": 32,
            "num_embeds_ada_norm": 1000,
        },
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 4,
            "sample_size": 8,
            "dropout": 0.0,
            "num_embeds_ada_norm": 7,
        },
        small_seq=8,
        executed=False,
        why_not="drops class labels at random, at a rate that its code fixes",
    ),
    _diffusers(
        "pixart_alpha",
        {"_class_name": "PixArtTransformer2DModel", "sample_size": 64},
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 4,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "use_additional_conditions": False,
        },
        small_seq=8,
    ),
    _diffusers(
        "sd3_medium",
        {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 64,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {
            "sample_size": 8,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        small_seq=8,
    ),
    _diffusers(
        "flux",
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        {
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 6, 6],
        },
        seq=64,
        small_seq=8,
    ),
    _diffusers(
        "sd_vae",
        {
            "_class_name": "AutoencoderKL",
            "sample_size": 256,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
        },
        {
            "sample_size": 32,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "block_out_channels": [32, 64],
            "norm_num_groups": 8,
        },
        small_seq=32,
    ),
)
