"""Control folders of every method that training saves, with values as after training."""

import warnings
from pathlib import Path
from typing import Any

import torch
from control_encoders import random_encoder
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tiny_pipelines import tiny_sd

from ether_diffusion.adapters import AdapterMetadata
from ether_diffusion.adapters.control_encoder import control_files
from ether_diffusion.bases import open_base
from ether_diffusion.bases.stable_diffusion import StableDiffusion
from ether_diffusion.control import ControlEncoder
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.methods import adapter_files, adapter_tensors, attach_new, peft_config

METHODS = ("lora", "oft", "hra", "delora", "boft", "ia3")


def adapt(unet: UNet2DConditionModel, method: str, *, seed: int = 0, **settings: Any) -> Any:
    """Give a UNet an adapter of a method that is far from the identity; return PEFT's configuration."""
    values: Any = {"adapter": method, "target_modules": "attention", **settings}
    config = peft_config(AdapterConfig(**values), "unet", StableDiffusion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what BOFT says of kernels that are not there
        parameters = attach_new(unet, config, seed=seed, part="unet")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return config


def save_for_tiny_world(
    folder: Path, method: str, encoder: ControlEncoder | None = None, base: str = "tiny_world"
) -> None:
    """Write an adapter for an embedded base's UNet, with a control encoder where one is given."""
    unet = open_base(base).load_denoiser()
    adapt(unet, method)
    files = adapter_files(unet, AdapterMetadata(base_model=base))
    if encoder is not None:
        files |= control_files(encoder, adapter_tensors(unet))
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def pixels_in(folder: Path) -> dict[str, bytes]:
    """Return the pixels of the pictures in a folder by name, without what else PNGs say."""
    return {path.name: Image.open(path).convert("RGB").tobytes() for path in folder.iterdir()}


def save_method(folder: Path, method: str, **settings: Any) -> tuple[DiffusionPipeline, ControlEncoder]:
    """Write a control folder as train-control does; return the pipeline in training and the encoder."""
    pipe = tiny_sd()
    encoder = random_encoder(pipe.unet, factor=1)
    folder.mkdir(parents=True, exist_ok=True)
    files = control_files(encoder, None)
    if method != "none":
        adapt(pipe.unet, method, **settings)
        files = adapter_files(pipe.unet, AdapterMetadata(base_model="base", trigger="a photo of sks"))
        files |= control_files(encoder, adapter_tensors(pipe.unet))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return pipe, encoder
