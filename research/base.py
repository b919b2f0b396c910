"""The base of the studies as a pipeline."""

import torch
from diffusers import StableDiffusionPipeline

from ether_diffusion.tiny_world import tiny_world_path
from research import BASE


def load_base() -> StableDiffusionPipeline:
    """Load it whole, in float32; it draws without a progress bar."""
    pipeline: StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_world_path(BASE), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def side_of(pipeline: StableDiffusionPipeline) -> int:
    """Return the side (px) of the pictures that a base was trained on."""
    side: int = pipeline.vae.config.sample_size
    return side
