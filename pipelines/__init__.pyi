from .control import EtherControlPipeline, EtherControlXLPipeline
from .loading import EtherLoaderMixin
from .metadata import (
    AdapterUse,
    ImageMetadata,
    attach_metadata,
    parameters_text,
    parse_metadata,
    png_bytes,
    read_image_metadata,
)
from .stable_diffusion import EtherStableDiffusionPipeline
from .stable_diffusion_xl import EtherStableDiffusionXLPipeline

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
