"""Stable Diffusion pipelines of a few thousand weights, whole and loadable, built without a hub."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CONTEXT = 32
LATENT = 8
SMALL_UNET: dict[str, Any] = {
    "sample_size": LATENT, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CONTEXT, "attention_head_dim": 8, "norm_num_groups": 8,
}  # fmt: skip
"""A UNet with 32 attention projections over widths 32 and 64."""


def tiny_sd(seed: int = 1) -> StableDiffusionPipeline:
    """A pipeline of the class and the module names of SD 1.5, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_text_config()).eval(),
            tokenizer=tiny_tokenizer(),
            unet=UNet2DConditionModel(**SMALL_UNET).eval(),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(seed: int = 2) -> StableDiffusionXLPipeline:
    """A pipeline of the class and the module names of SDXL, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_text_config()).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(),
            tokenizer=tiny_tokenizer(),
            tokenizer_2=tiny_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=LATENT,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                cross_attention_dim=2 * CONTEXT,
                norm_num_groups=8,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + CONTEXT,
            ).eval(),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )


def motion_unet() -> UNetMotionModel:
    """The UNet of `tiny_sd` with motion modules, as AnimateDiff runs it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        motion = MotionAdapter(
            block_out_channels=(32, 64),
            motion_layers_per_block=1,
            motion_mid_block_layers_per_block=1,
            motion_num_attention_heads=4,
            motion_norm_num_groups=8,
        )
        return UNetMotionModel.from_unet2d(tiny_sd().unet, motion).eval()


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=CONTEXT,
        intermediate_size=2 * CONTEXT,
        projection_dim=CONTEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(_vocabulary()),
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=16)


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return {token: index for index, token in enumerate(tokens)}
