"""Pictures of the second world and of other emoji, drawn while a stage trains or beforehand."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from ether_diffusion.durable_files import write_files
from ether_diffusion.tiny_world.concepts import Concept, subject_concepts, trained_concepts
from ether_diffusion.tiny_world.world import Scene
from recipes.tiny_world.drawing import draw_many
from recipes.tiny_world.renders import read_emoji_table
from recipes.tiny_world.scenes import sample_scene

OTHERS_PER_CENT = 40
PICTURED_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")


def other_concepts(run_folder: Path) -> tuple[Concept, ...]:
    """All other emoji of things: no model draws them, but parts of it may learn to see from them.

    Those that share a word with a concept that is kept out of training are kept out too.
    """
    kept_out = subject_concepts()
    words = {word for concept in kept_out for word in concept.name.split()}
    names = {concept.emoji_name for concept in kept_out}
    known = {concept.render for concept in trained_concepts(2)}
    return tuple(
        Concept(name, "object", name, render)
        for name, render, group in read_emoji_table(run_folder)
        if group in PICTURED_GROUPS
        and render not in known
        and name not in names
        and words.isdisjoint(name.lower().split())
    )


class FreshPictures:
    """Draws scenes of known and of other concepts; every draw comes from the generator that is given."""

    def __init__(self, known: Sequence[Concept], others: Sequence[Concept], renders_folder: Path) -> None:
        self.known, self.others, self.renders_folder = known, others, renders_folder
        self.labels = {concept.render: label for label, concept in enumerate((*known, *others))}

    def scenes(self, count: int, generator: torch.Generator) -> tuple[list[Scene], torch.Tensor]:
        """Draw scenes, turned and flipped as the photos of subjects, and their class indices (count)."""
        scenes = []
        for seed in torch.randint(2**40, (count,), generator=generator).tolist():
            rng = random.Random(seed)
            concept = rng.choice(self.others if rng.random() * 100 < OTHERS_PER_CENT else self.known)
            scenes.append(_turned(sample_scene(concept, rng), rng))
        return scenes, torch.tensor([self.labels[scene.concept.render] for scene in scenes])

    def draw(
        self, batch_size: int, size: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pictures (b, 3, size, size) in [-1, 1] and class indices (b)."""
        scenes, labels = self.scenes(batch_size, generator)
        pictures = draw_many(scenes, size=size, renders_folder=self.renders_folder)
        return torch.cat(list(pictures)), labels


class StoredPictures(FreshPictures):
    """Draws from pictures that were drawn beforehand, all of one size."""

    def __init__(self, fresh: FreshPictures, path: Path) -> None:
        super().__init__(fresh.known, fresh.others, fresh.renders_folder)
        stored = load_file(path)
        self.pixels, self.stored_labels = stored["pixels"], stored["labels"]

    def draw(
        self, batch_size: int, size: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pictures (b, 3, size, size) in [-1, 1] and class indices (b)."""
        assert self.pixels.shape[-1] == size, "the pictures stage draws the size of the stages that train"
        indices = torch.randint(len(self.pixels), (batch_size,), generator=generator)
        return self.pixels[indices].float() / 127.5 - 1, self.stored_labels[indices]


def store_pictures(path: Path, fresh: FreshPictures, count: int, size: int, num_processes: int) -> None:
    """Draw pictures and keep them as bytes, with their classes."""
    scenes, labels = fresh.scenes(count, torch.Generator().manual_seed(0))
    drawn = draw_many(scenes, size=size, renders_folder=fresh.renders_folder, num_processes=num_processes)
    pixels = torch.cat([((pictures + 1) * 127.5).round().byte() for pictures in drawn]).contiguous()
    write_files(path.parent, {path.name: save({"pixels": pixels, "labels": labels})})


def _turned(scene: Scene, rng: random.Random) -> Scene:
    if rng.random() < 0.5:
        return scene
    return replace(scene, rotation=rng.uniform(-15, 15), flipped=rng.random() < 0.5)
