"""Pictures as tensors: from PIL, from scenes, and from a Tiny World pipeline."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER
from ether_diffusion.tiny_world.world import NATIVE_SIZE, Scene, draw


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Turn RGB pictures of one size into a tensor (b, 3, height, width) in [-1, 1]."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def at_native_size(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Turn pictures of any sizes into a tensor (b, 3, NATIVE_SIZE, NATIVE_SIZE) in [-1, 1]."""
    native = (NATIVE_SIZE, NATIVE_SIZE)
    return to_tensor(
        [
            each if each.size == native else each.convert("RGB").resize(native, Image.Resampling.LANCZOS)
            for each in pictures
        ]
    )


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Turn pictures (b, 3, h, w) in [-1, 1] into RGB images."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(each.numpy()) for each in pixels]


def draw_scenes(scenes: Sequence[Scene], *, renders_folder: Path = RENDERS_FOLDER) -> torch.Tensor:
    """Draw scenes as they really are: (b, 3, NATIVE_SIZE, NATIVE_SIZE) in [-1, 1]."""
    return to_tensor([draw(scene, size=NATIVE_SIZE, renders_folder=renders_folder) for scene in scenes])


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[torch.Tensor, float]:
    """Generate one picture for each prompt, picture k from seed + k.

    Returns images (b, 3, height, width) in [-1, 1] and seconds per picture.
    """
    pipeline.set_progress_bar_config(disable=True)
    pieces, started = [], time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        output = pipeline(
            part,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        )
        pieces.append(torch.from_numpy(output.images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(pieces), (time.perf_counter() - started) / len(prompts)
