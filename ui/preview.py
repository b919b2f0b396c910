"""How a picture looks while it is drawn: its latents decoded now and then."""

import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.bases import decode_latents

MAX_SIDE_LATENTS = 32
"""Larger latents are shrunk first: 256 px for a VAE that divides sides by 8."""
REST = 4.0
"""After a look of t seconds the next comes REST · t later or more: a fifth of the time at most."""
MIN_REST_SECONDS = 0.2


class Previewer:
    """Looks at latents at the first step, and then as often as costs little."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._next = 0.0
        self.image: Image.Image | None = None
        """The last look."""

    def look(self, latents: Tensor) -> None:
        """Decode latents (b, c, h, w) of one picture, if it is time."""
        start = time.monotonic()
        if start < self._next:
            return
        self.image = _decode(self._pipeline, _denoised(self._pipeline, latents))
        end = time.monotonic()
        self._next = end + max(MIN_REST_SECONDS, REST * (end - start))


def _denoised(pipeline: Any, latents: Tensor) -> Tensor:
    """Return the picture that a step aimed at where the scheduler remembers it, else the noisy one."""
    scheduler = pipeline.scheduler
    if scheduler.config.get("algorithm_type") == "dpmsolver++":
        remembered = getattr(scheduler, "model_outputs", [None])[-1]
        if isinstance(remembered, Tensor) and remembered.shape == latents.shape:
            return remembered
    return latents


@torch.no_grad()
def _decode(pipeline: Any, latents: Tensor) -> Image.Image:
    vae, latents = pipeline.vae, latents[:1].detach().float()
    shrink = MAX_SIDE_LATENTS / max(latents.shape[-2:])
    if shrink < 1:
        sides = [max(1, int(side * shrink)) for side in latents.shape[-2:]]
        latents = torch.nn.functional.interpolate(latents, size=sides, mode="area")
    dtype = vae.dtype
    is_cast = dtype == torch.float16 and vae.config.force_upcast  # as the pipelines do for SDXL
    try:
        if is_cast:
            vae.to(torch.float32)
        return decode_latents(vae, latents)[0]
    finally:
        if is_cast:
            vae.to(dtype)
