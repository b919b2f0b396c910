"""Stable Diffusion 1.x and 2.x with ETHER adapters; diffusers' `custom_pipeline` takes this file too."""

from diffusers import StableDiffusionPipeline

from ether_diffusion.pipelines.loading import EtherLoaderMixin


class EtherStableDiffusionPipeline(EtherLoaderMixin, StableDiffusionPipeline):
    """diffusers' StableDiffusionPipeline, with adapters to load, weigh, fuse and choose per call."""
