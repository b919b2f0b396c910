"""Bases of every family that can be trained on: tiny, random, saved; and what their pipelines draw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import Tensor

SIDE = 8
"""Side (px) of what the tiny bases draw."""


def velocity_sd() -> StableDiffusionPipeline:
    """A pipeline as SD 2.1: velocity, down to a signal of zero, linear projections, attention masks."""
    pipe = tiny_sd()
    pipe.text_encoder.config.use_attention_mask = True
    torch.manual_seed(3)
    form = {"use_linear_projection": True, "attention_head_dim": [4, 8]}
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, **form).eval()
    pipe.scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    return pipe


def inpainting_sd() -> StableDiffusionInpaintPipeline:
    """A pipeline as SD 1.5's for inpainting: its UNet also sees the hole and what is around it."""
    pipe = tiny_sd()
    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9).eval()
    parts = {**pipe.components, "unet": unet}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def half_sd() -> StableDiffusionPipeline:
    """A pipeline whose weights are float16."""
    return tiny_sd().to(torch.float16)


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_sd,
    "velocity": velocity_sd,
    "inpainting": inpainting_sd,
    "sdxl": tiny_sdxl,
    "float16": half_sd,
}


def draw(pipe: Any, prompt: str = "a sks cat") -> Tensor:
    """Draw a picture (1, 3, 8, 8) as floats, so that no rounding hides a difference."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {}
    if "Inpaint" in type(pipe).__name__:
        options = {"image": torch.rand(1, 3, SIDE, SIDE, generator=generator), "mask_image": _hole()}
    images: Tensor = pipe(
        prompt,
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=generator,
        output_type="pt",
        **options,
    ).images
    return images


def _hole() -> Tensor:
    hole = torch.zeros(1, 1, SIDE, SIDE)
    hole[..., 2:, :] = 1
    return hole


def open_pipeline(folder: Path) -> Any:
    """Load a base as diffusers does, in float32."""
    return DiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32)
