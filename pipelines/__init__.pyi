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
from .transformers import (
    EtherChromaPipeline,
    EtherFlux2KleinPipeline,
    EtherFlux2Pipeline,
    EtherFluxPipeline,
    EtherQwenImagePipeline,
    EtherSanaPipeline,
    EtherStableDiffusion3Pipeline,
    EtherZImagePipeline,
)

__all__ = [
    "AdapterUse",
    "EtherChromaPipeline",
    "EtherControlPipeline",
    "EtherControlXLPipeline",
    "EtherFlux2KleinPipeline",
    "EtherFlux2Pipeline",
    "EtherFluxPipeline",
    "EtherLoaderMixin",
    "EtherQwenImagePipeline",
    "EtherSanaPipeline",
    "EtherStableDiffusion3Pipeline",
    "EtherStableDiffusionPipeline",
    "EtherStableDiffusionXLPipeline",
    "EtherZImagePipeline",
    "ImageMetadata",
    "attach_metadata",
    "parameters_text",
    "parse_metadata",
    "png_bytes",
    "read_image_metadata",
]
