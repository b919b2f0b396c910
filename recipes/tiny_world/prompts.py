"""Captions for sample sheets and scores, drawn from the world with fixed seeds."""

import random
from collections.abc import Sequence

from ether_diffusion.tiny_world.concepts import Concept, trained_concepts
from ether_diffusion.tiny_world.world import Scene
from recipes.tiny_world.scenes import held_out_backgrounds, sample_scene


def draw_scenes(count: int, *, seed: int, held_out_pair: bool | None = None, world: int = 1) -> list[Scene]:
    """Draw scenes whose concepts, a world's, are spread evenly, each once before any comes twice.

    With held_out_pair only concepts that have held-out pairs come.
    """
    rng = random.Random(f"prompts/{seed}")
    concepts = [c for c in trained_concepts(world) if not held_out_pair or held_out_backgrounds(c)]
    chosen: list[Concept] = []
    while len(chosen) < count:
        chosen += rng.sample(concepts, len(concepts))
    return [sample_scene(concept, rng, held_out_pair=held_out_pair) for concept in chosen[:count]]


def sheet_captions(concepts: Sequence[Concept], count: int = 48) -> list[str]:
    """Captions of the UNet stage's sheets, for concepts from all over the list."""
    chosen = concepts[:: max(1, len(concepts) // count)]
    scenes = [sample_scene(concept, random.Random(f"sheet/{concept.name}")) for concept in chosen]
    return [scene.caption() for scene in scenes[:count]]
