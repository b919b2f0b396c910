"""Pipelines of diffusers with ETHER adapters, whose pictures say how they were made."""

from ether_diffusion.pipelines.control import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.pipelines.loading import EtherLoaderMixin
from ether_diffusion.pipelines.metadata import (
    AdapterUse,
    ImageMetadata,
    attach_metadata,
    parameters_text,
    parse_metadata,
    png_bytes,
    read_image_metadata,
)
from ether_diffusion.pipelines.stable_diffusion import EtherStableDiffusionPipeline
from ether_diffusion.pipelines.stable_diffusion_xl import EtherStableDiffusionXLPipeline

__all__ = [
    "AdapterUse",
    "EtherControlPipeline",
    "EtherControlXLPipeline",
    "EtherLoaderMixin",
    "EtherStableDiffusionPipeline",
    "EtherStableDiffusionXLPipeline",
    "ImageMetadata",
    "attach_metadata",
    "parameters_text",
    "parse_metadata",
    "png_bytes",
    "read_image_metadata",
]
