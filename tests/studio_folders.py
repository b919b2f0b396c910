"""Studios on Tiny World with adapters as training leaves them, and what their jobs tell."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from control_encoders import random_encoder
from PIL import Image
from tiny_pipelines import tiny_sd
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion.adapters import AdapterMetadata, detach_adapter, save_ether
from ether_diffusion.bases import open_base
from ether_diffusion.control import save_control
from ether_diffusion.ui.events import Event, Finished, StopToken
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio

QUICK = GenerateRequest("a red fox on a beach", steps=2, compare_with_base=False)


def make_adapters(folder: Path) -> None:
    """Save fox and cat, follow and trace with control, odd for other weights, alien for another base."""
    unet = open_base("tiny_world").load_denoiser()
    torch.manual_seed(0)
    for name, kind in (("fox", "ether_plus"), ("cat", "ether"), ("follow", "ether_plus"), ("trace", "ether")):
        unet.add_adapter(replace(CONFIGS[kind]), "default")
        metadata = AdapterMetadata(base_model="tiny_world")
        if name in ("follow", "trace"):
            adapter = detach_adapter(unet, "default", metadata=metadata)
            factor, seed = open_base("tiny_world").vae_scale_factor, 5 if name == "follow" else 6
            save_control(folder / name, random_encoder(unet, factor=factor, seed=seed), adapter=adapter)
        else:
            save_ether(unet, folder / name, base_model="tiny_world", trigger="a photo of sks fox")
        unet.delete_adapters("default")
    unet.add_adapter(replace(CONFIGS["ether"]), "default")
    with torch.no_grad():
        for module in unet.modules():
            if hasattr(module, "base_linear"):
                module.base_linear.weight.mul_(1.1)
    save_ether(unet, folder / "odd", base_model="tiny_world_2")
    save_adapter(tiny_sd(), CONFIGS["ether"], folder / "alien")


def add(studio: Studio, made: Path, *names: str) -> dict[str, str]:
    """Take adapters into the library and return their ids by name."""
    return {name: studio.library.add_run_result(made / name, name).id for name in names}


def draw(studio: Studio, request: GenerateRequest) -> Finished:
    """Run a job to its end."""
    return last(studio.engine.draw(request, StopToken()))


def last(events: Iterator[Event]) -> Finished:
    *_, end = events
    assert isinstance(end, Finished)
    return end


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def control_image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)
