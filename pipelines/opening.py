"""The pipeline of ours that fits a base, loaded onto a device."""

import torch

from ether_diffusion.bases import Base
from ether_diffusion.pipelines.control import EtherControlPipeline, EtherControlXLPipeline
from ether_diffusion.pipelines.stable_diffusion import EtherStableDiffusionPipeline
from ether_diffusion.pipelines.stable_diffusion_xl import EtherStableDiffusionXLPipeline

EtherPipeline = EtherStableDiffusionPipeline | EtherStableDiffusionXLPipeline


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype to draw in: float32 on the CPU, where float16 is slow, else float16."""
    return torch.float32 if device.type == "cpu" else torch.float16


def open_pipeline(
    base: Base, *, device: torch.device, dtype: torch.dtype, with_control: bool = False
) -> EtherPipeline:
    """Load the pipeline of a base that `open_base` opened; with control, one that takes control images.

    Raises:
        ValueError: the base is for inpainting, which needs a picture and a mask.
    """
    if base.is_inpainting:
        raise ValueError(
            f"{base.name} is a base for inpainting; use diffusers' inpainting pipeline and load_ether"
        )
    kind: type[EtherPipeline]
    if with_control:
        kind = EtherControlXLPipeline if base.family == "sdxl" else EtherControlPipeline
    else:
        kind = EtherStableDiffusionXLPipeline if base.family == "sdxl" else EtherStableDiffusionPipeline
    pipeline: EtherPipeline = base.load_pipeline(kind, dtype=dtype)
    # a hub id is a better name for people than its folder in the cache
    pipeline.register_to_config(_name_or_path=base.name)
    pipeline.to(device)
    return pipeline
