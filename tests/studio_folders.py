"""Studios on Tiny World with adapters as training leaves them, and what their jobs tell."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from ether_diffusion.pipelines import EtherControlPipeline, ImageMetadata
from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.jobs import Job, SavedPicture, Working
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.ui.studio import Studio

Told = Working | SavedPicture | Job
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


def draw(studio: Studio, request: GenerateRequest) -> Job:
    """Run a job to its end."""
    return last(begin(studio.engine, request))


def begin(
    engine: Engine, request: GenerateRequest | GridRequest, stop: threading.Event | None = None
) -> Iterator[Told]:
    """Start a job and return what it is seen to tell, itself at the end; closing the iterator stops it."""
    job = engine.start(request, stop=stop)

    def seen() -> Iterator[Told]:
        told, state, is_done = 0, None, False
        try:
            while not is_done:
                is_done, new, now = job.is_done, job.drawn[told:], job.state
                yield from new
                told += len(new)
                if now is not None and now is not state:
                    yield (state := now)
                time.sleep(0.001)
        finally:
            job.stop.set()
        job.ended.result()
        yield job

    return seen()


def last(events: Iterator[Told]) -> Job:
    *_, end = events
    assert isinstance(end, Job)
    return end


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def control_image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


@dataclass(frozen=True)
class DrawingStudio:
    """A studio that many tests draw with: adapters by name in `made`, and in its library by their `ids`."""

    studio: Studio
    made: Path
    ids: dict[str, str]
    plain: EtherControlPipeline
    """A pipeline on the same base, that the studio knows nothing of."""


def open_drawing_studio(folder: Path) -> DrawingStudio:
    """Open one whose library has fox, cat, follow, trace, odd, alien, and lines: an encoder by itself."""
    make_adapters(folder / "made")
    base = open_base("tiny_world")
    factor = base.vae_scale_factor
    encoder = random_encoder(base.load_denoiser(), factor=factor, seed=7, control_type="palette")
    save_control(folder / "made" / "lines", encoder)
    studio = Studio(folder / "studio", base="tiny_world")
    plain = EtherControlPipeline.from_pretrained("tiny_world")
    plain.set_progress_bar_config(disable=True)
    ids = add(studio, folder / "made", "fox", "cat", "follow", "trace", "odd", "alien", "lines")
    return DrawingStudio(studio, folder / "made", ids, plain)


def said(picture: SavedPicture) -> ImageMetadata:
    """Return what a picture says of itself."""
    assert picture.metadata is not None
    return picture.metadata
