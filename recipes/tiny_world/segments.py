"""The segmenter's data: scenes drawn, and passed through the autoencoder, with the class of each pixel."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save

from ether_diffusion.durable_files import write_files
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, all_concepts
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import NATIVE_SIZE, Scene
from recipes.tiny_world.control_pairs import class_map
from recipes.tiny_world.renders import fetch_renders
from recipes.tiny_world.scenes import held_out_backgrounds, sample_scene

logger = logging.getLogger(__name__)

SCENES_PER_CONCEPT = 192
MAX_LATENT_NOISE = 0.6
"""Of latents whose deviation is 1. Generated latents are off in ways that an autoencoder's own are not."""
BATCH = 96


@dataclass(frozen=True)
class Segments:
    """Pictures as drawn and as decoded (n, 3, size, size) in uint8, and the classes (n, size, size)."""

    drawn: torch.Tensor
    decoded: torch.Tensor
    classes: torch.Tensor


def segment_scenes(
    concepts: Sequence[Concept], per_concept: int, *, seed: int, held_out_pairs: bool
) -> Iterator[Scene]:
    """Draw scenes of concepts on backgrounds of one side of the split; concepts without one are left out."""
    for concept in concepts:
        if held_out_pairs and not held_out_backgrounds(concept):
            continue
        for number in range(per_concept):
            rng = random.Random(f"segments/{seed}/{concept.name}/{number}")
            yield sample_scene(concept, rng, held_out_pair=held_out_pairs)


@torch.no_grad()
def draw_segments(
    scenes: Sequence[Scene],
    vae: AutoencoderKL,
    *,
    latent_noise: float,
    seed: int = 0,
    renders_folder: Path = RENDERS_FOLDER,
) -> Segments:
    """Draw scenes and decode their latents with noise of a random strength up to latent_noise each."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(scenes), BATCH):
        some = scenes[start : start + BATCH]
        images = draw_scenes(some, renders_folder=renders_folder)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mode().float()
            strength = latent_noise * torch.rand((len(some), 1, 1, 1), generator=generator)
            noisy = latents + strength * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(noisy).sample.float().clamp(-1, 1)
        classes = np.stack([class_map(scene, renders_folder=renders_folder) for scene in some])
        parts.append((_bytes(images), _bytes(decoded), torch.from_numpy(classes).to(torch.uint8)))
    drawn, round_trips, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Segments(drawn, round_trips, labels)


def _bytes(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8).contiguous()


def prepare_segments(
    run_folder: Path, vae: AutoencoderKL, *, per_concept: int = SCENES_PER_CONCEPT, seed: int = 0
) -> Segments:
    """Draw or read the training scenes of all concepts: like the judge, the segmenter judges all of them."""
    concepts = all_concepts()
    folder = run_folder / f"segments-{NATIVE_SIZE}-{len(concepts)}-{per_concept}-{seed}"
    if not (folder / "segments.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scenes = list(segment_scenes(concepts, per_concept, seed=seed, held_out_pairs=False))
        renders = fetch_renders(run_folder)
        found = draw_segments(scenes, vae, latent_noise=MAX_LATENT_NOISE, seed=seed, renders_folder=renders)
        tensors = {"drawn": found.drawn, "decoded": found.decoded, "classes": found.classes}
        write_files(folder, {"segments.safetensors": save(tensors)})
        logger.info("drew %d scenes and their classes into %s", len(scenes), folder)
    return Segments(**load_file(folder / "segments.safetensors"))
