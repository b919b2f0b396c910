"""The UNet's data: composites drawn, encoded and kept as latents, in files of a few of each concept."""

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save

from ether_diffusion.durable_files import write_files
from ether_diffusion.tiny_world.concepts import Concept
from ether_diffusion.tiny_world.world import Scene
from recipes.tiny_world.drawing import draw_many
from recipes.tiny_world.scenes import sample_scene, training_caption

logger = logging.getLogger(__name__)

FILE_COMPOSITES = 64
"""Composites of each concept in one file."""


@dataclass(frozen=True)
class Latents:
    """Unscaled mean latents (n, 4, h, w) of composites in float16, their class indices (n) and captions."""

    latents: torch.Tensor
    labels: torch.Tensor
    captions: list[str]


def captioned_scene(concept: Concept, number: int, seed: int) -> tuple[Scene, str]:
    """Draw the scene of a concept's composite of this number, and its training caption."""
    rng = random.Random(f"{seed}/{concept.name}/{number}")
    scene = sample_scene(concept, rng)
    return scene, training_caption(scene, rng)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents: torch.Tensor = vae.encode(pictures.to(vae.device)).latent_dist.mean
    return latents.half().cpu()


def _name_of(vae: AutoencoderKL, concepts: Sequence[Concept], seed: int) -> str:
    """Name what decides latents: the encoder's weights, the concepts and the seed."""
    digest = hashlib.sha256(repr([concept.name for concept in concepts]).encode())
    for name, tensor in vae.state_dict().items():
        if not name.startswith(("decoder", "post_quant")):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return f"latents-{vae.config.sample_size}-{digest.hexdigest()[:8]}-{seed}"


def prepare_latents(
    run_folder: Path,
    concepts: Sequence[Concept],
    vae: AutoencoderKL,
    *,
    per_concept: int,
    renders_folder: Path,
    seed: int = 0,
    num_processes: int = 1,
) -> Latents:
    """Draw, encode and keep the first composites of each concept at the autoencoder's size, or read them."""
    folder = run_folder / _name_of(vae, concepts, seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, per_concept, FILE_COMPOSITES):
        numbers = range(start, min(start + FILE_COMPOSITES, per_concept))
        path = folder / f"{numbers.start:05d}-{numbers.stop:05d}.safetensors"
        paths.append(path)
        if path.is_file():
            continue
        scenes, captions = zip(
            *(captioned_scene(concept, number, seed) for concept in concepts for number in numbers),
            strict=True,
        )
        drawn = draw_many(
            scenes,
            size=vae.config.sample_size,
            renders_folder=renders_folder,
            num_processes=num_processes,
        )
        tensors = {
            "latents": torch.cat([_encode(vae, pictures) for pictures in drawn]).contiguous(),
            "labels": torch.arange(len(concepts)).repeat_interleave(len(numbers)),
        }
        write_files(folder, {path.name: save(tensors, {"captions": json.dumps(captions)})})
        logger.info("cached the latents of %d composites in %s", len(captions), path)
    return _read(paths)


def _read(paths: Sequence[Path]) -> Latents:
    latents, labels = [], []
    captions: list[str] = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            latents.append(file.get_tensor("latents"))
            labels.append(file.get_tensor("labels"))
            captions += json.loads(file.metadata()["captions"])
    return Latents(torch.cat(latents), torch.cat(labels), captions)
