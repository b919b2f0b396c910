"""The data stage: composites of the trained concepts with captions, and the cached latents."""

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from ether_diffusion.durable_files import write_files
from ether_diffusion.tiny_world.concepts import Split, load_concepts
from ether_diffusion.tiny_world.world import NATIVE_SIZE, draw
from recipes.tiny_world.renders import fetch_renders
from recipes.tiny_world.scenes import sample_scene, training_caption

logger = logging.getLogger(__name__)

COMPOSITES_PER_CONCEPT = 1_024


@dataclass(frozen=True)
class Composites:
    """Training pictures (n, 3, size, size) in uint8, their class indices (n) and their captions."""

    pixels: torch.Tensor
    labels: torch.Tensor
    captions: list[str]

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """Return pictures as floats (b, 3, size, size) in [-1, 1]."""
        return self.pixels[indices].float() / 127.5 - 1


def _draw_composites(
    renders: Path, split: Split, per_concept: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    concepts = load_concepts(split)
    pixels = np.empty((len(concepts) * per_concept, NATIVE_SIZE, NATIVE_SIZE, 3), dtype=np.uint8)
    labels: list[int] = []
    captions: list[str] = []
    for label, concept in enumerate(concepts):
        for number in range(per_concept):
            rng = random.Random(f"{seed}/{concept.name}/{number}")
            scene = sample_scene(concept, rng)
            pixels[len(captions)] = np.asarray(draw(scene, renders_folder=renders))
            captions.append(training_caption(scene, rng))
            labels.append(label)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), captions


def join_composites(first: Composites, second: Composites) -> Composites:
    """Put two sets of composites together; the second's classes are numbered after the first's."""
    labels = torch.cat((first.labels, second.labels + int(first.labels.max()) + 1))
    return Composites(torch.cat((first.pixels, second.pixels)), labels, first.captions + second.captions)


def prepare_composites(
    run_folder: Path, split: Split = "trained", *, per_concept: int = COMPOSITES_PER_CONCEPT, seed: int = 0
) -> Composites:
    """Draw or read the composites of a split; the model sees those of "trained" only."""
    name = "composites" if split == "trained" else "composites-held-out"
    folder = run_folder / f"{name}-{NATIVE_SIZE}-{len(load_concepts(split))}-{per_concept}-{seed}"
    if not (folder / "composites.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pixels, labels, captions = _draw_composites(fetch_renders(run_folder), split, per_concept, seed)
        (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
        write_files(folder, {"composites.safetensors": save({"pixels": pixels, "labels": labels})})
        logger.info("drew %d composites into %s", len(captions), folder)
    tensors = load_file(folder / "composites.safetensors")
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return Composites(tensors["pixels"], tensors["labels"], captions)
