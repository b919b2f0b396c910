"""Stable Diffusion 1.x and 2.x with ETHER adapters; diffusers' `custom_pipeline` takes this file too."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ether_diffusion.pipelines.loading import EtherLoaderMixin, check_clip_skip


class EtherStableDiffusionPipeline(EtherLoaderMixin, StableDiffusionPipeline):
    """diffusers' StableDiffusionPipeline, with adapters to load, weigh, fuse and choose per call."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed prompts as diffusers does; `clip_skip` leaves the last layers out for the prompt alone."""
        further: dict[str, Any] = {"lora_scale": lora_scale}
        if clip_skip is not None and prompt_embeds is None:
            # diffusers looks for a text_model in the encoder, which transformers 5 no longer nests there
            encoder = self.text_encoder.encoder
            layers = encoder.layers
            check_clip_skip(clip_skip, len(layers))
            encoder.layers = layers[: len(layers) - clip_skip]
            try:
                prompt_embeds, _ = super().encode_prompt(prompt, device, 1, False, **further)
            finally:
                encoder.layers = layers
        encoded: tuple[Tensor, Tensor | None] = super().encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            **further,
        )
        return encoded
