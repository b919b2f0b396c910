"""Stable Diffusion XL with ETHER adapters; diffusers' `custom_pipeline` takes this file too."""

from diffusers import StableDiffusionXLPipeline

from ether_diffusion.pipelines.loading import EtherLoaderMixin


class EtherStableDiffusionXLPipeline(EtherLoaderMixin, StableDiffusionXLPipeline):
    """diffusers' StableDiffusionXLPipeline, with adapters to load, weigh, fuse and choose per call."""
