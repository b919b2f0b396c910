"""Stable Diffusion XL with ETHER adapters; diffusers' `custom_pipeline` takes this file too."""

from typing import Any

from diffusers import StableDiffusionXLPipeline

from ether_diffusion.pipelines.loading import EtherLoaderMixin, check_clip_skip


class EtherStableDiffusionXLPipeline(EtherLoaderMixin, StableDiffusionXLPipeline):
    """diffusers' StableDiffusionXLPipeline, with adapters to load, weigh, fuse and choose per call."""

    def encode_prompt(self, *args: Any, clip_skip: int | None = None, **kwargs: Any) -> Any:
        """Embed prompts as diffusers does; `clip_skip` leaves out layers beside the last, which is unused."""
        encoders = (self.text_encoder, self.text_encoder_2)
        counts = [each.config.num_hidden_layers for each in encoders if each is not None]
        if clip_skip is not None and counts:
            check_clip_skip(clip_skip, min(counts) - 1)
        return super().encode_prompt(*args, clip_skip=clip_skip, **kwargs)
