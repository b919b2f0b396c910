"""The transformer families with ETHER adapters: all that our other pipelines do, but for control images."""

from typing import Any

from diffusers import (
    ChromaPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)

from ether_diffusion.pipelines.loading import EtherLoaderMixin
from ether_diffusion.pipelines.metadata import num_prompts_of


class EtherStableDiffusion3Pipeline(EtherLoaderMixin, StableDiffusion3Pipeline):
    """diffusers' StableDiffusion3Pipeline, with adapters to load, weigh, fuse and choose per call."""


class EtherFluxPipeline(EtherLoaderMixin, FluxPipeline):
    """diffusers' FluxPipeline, with adapters to load, weigh, fuse and choose per call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make pictures as the others do; a negative prompt is for true_cfg_scale."""
        if kwargs.get("negative_prompt") is not None and kwargs.get("true_cfg_scale", 1.0) <= 1:
            raise ValueError("FLUX.1 takes no negative prompt but with true_cfg_scale above 1; leave it out")
        return super().__call__(*args, **kwargs)


class EtherFlux2KleinPipeline(EtherLoaderMixin, Flux2KleinPipeline):
    """diffusers' Flux2KleinPipeline, with adapters to load, weigh, fuse and choose per call."""


class EtherFlux2Pipeline(EtherLoaderMixin, Flux2Pipeline):
    """diffusers' Flux2Pipeline, with adapters to load, weigh, fuse and choose per call."""


class EtherZImagePipeline(EtherLoaderMixin, ZImagePipeline):
    """diffusers' ZImagePipeline, with adapters to load, weigh, fuse and choose per call."""


class EtherChromaPipeline(EtherLoaderMixin, ChromaPipeline):
    """diffusers' ChromaPipeline, with adapters to load, weigh, fuse and choose per call."""


class EtherSanaPipeline(EtherLoaderMixin, SanaPipeline):
    """diffusers' SanaPipeline, with adapters to load, weigh, fuse and choose per call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make pictures of the size that is asked for, not shrunk from another, unless that is asked for."""
        return super().__call__(*args, **{"use_resolution_binning": False, **kwargs})


class EtherQwenImagePipeline(EtherLoaderMixin, QwenImagePipeline):
    """diffusers' QwenImagePipeline, with adapters to load, weigh, fuse and choose per call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make pictures as the others do: guidance_scale is what diffusers calls true_cfg_scale here."""
        if kwargs.get("guidance_scale") is not None:
            kwargs["true_cfg_scale"] = kwargs.pop("guidance_scale")
        if kwargs.get("negative_prompt") is None and kwargs.get("prompt") is not None:
            kwargs["negative_prompt"] = [""] * num_prompts_of(kwargs)  # or there would be no guidance
        return super().__call__(*args, **kwargs)
