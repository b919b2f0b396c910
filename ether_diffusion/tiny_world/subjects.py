"""Subjects for personalization: six "photos" of each held-out concept, and prompts that they never showed."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.tiny_world.concepts import Concept
from ether_diffusion.tiny_world.world import COLOURS, NATIVE_SIZE, SCALES, Background, Scene, Size, draw

NUM_PHOTOS = 6
IDENTIFIER = "sks"
PHOTO_SIZES: tuple[Size, ...] = ("medium", "big", "medium", "small", "medium", "big")


def _backgrounds(*names: str) -> tuple[Background, ...]:
    return tuple(Background("plain" if name in COLOURS else "scene", name) for name in names)


# Photos and prompts take their backgrounds from disjoint lists.
PHOTO_BACKGROUNDS = _backgrounds(
    *("white", "meadow", "gray", "city", "teal", "desert", "purple", "room", "pink", "mountains")
)
PROMPT_BACKGROUNDS = _backgrounds("red", "beach", "blue", "snow", "yellow", "space", "green", "forest")


@dataclass(frozen=True)
class Photo:
    """One picture of a subject: its scene, and a caption with the identifier in place of the name."""

    scene: Scene
    caption: str


def subject_noun(concept: Concept) -> str:
    """What captions call a subject: the identifier and its kind, "sks animal"."""
    return f"{IDENTIFIER} {concept.kind}"


def photos_of(concept: Concept) -> tuple[Photo, ...]:
    """Compose the photos of a subject: background, size, rotation, light and flip differ."""
    rng = random.Random(f"subject/{concept.name}")
    photos = []
    for background, size in zip(rng.sample(PHOTO_BACKGROUNDS, NUM_PHOTOS), PHOTO_SIZES, strict=True):
        scene = Scene(
            concept,
            background,
            size,
            scale=rng.uniform(*SCALES[size]) * (0.92 if size == "big" else 1.0),
            shift_x=rng.uniform(-0.03, 0.03),
            shift_y=rng.uniform(-0.03, 0.03),
            rotation=rng.uniform(-12, 12),
            light=rng.uniform(0.86, 1.1),
            flipped=rng.random() < 0.3,
            detail_seed=rng.getrandbits(32),
        )
        photos.append(Photo(scene, scene.caption(subject_noun(concept))))
    return tuple(photos)


def unseen_scenes(concept: Concept) -> tuple[Scene, ...]:
    """Scenes of a subject on backgrounds that none of its photos has: what an ideal adapter would draw."""
    return tuple(Scene(concept, background) for background in PROMPT_BACKGROUNDS)


def unseen_prompts(concept: Concept) -> tuple[str, ...]:
    """The prompts that ask for unseen_scenes, in the same order."""
    return tuple(scene.caption(subject_noun(concept)) for scene in unseen_scenes(concept))


def validation_prompts(concept: Concept) -> tuple[str, ...]:
    """Prompts to validate a training on: their four backgrounds are in no photo and in no unseen prompt."""
    shown = {photo.scene.background for photo in photos_of(concept)}
    others = [background for background in PHOTO_BACKGROUNDS if background not in shown]
    return tuple(Scene(concept, background).caption(subject_noun(concept)) for background in others)


def write_photos(
    concept: Concept, folder: Path, *, count: int = NUM_PHOTOS, size: int = NATIVE_SIZE
) -> list[Path]:
    """Write a subject's first photos as PNG files of size x size px, and metadata.jsonl with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    photos, stem = photos_of(concept)[:count], concept.name.replace(" ", "_")
    paths = [folder / f"{stem}_{number}.png" for number in range(len(photos))]
    rows = []
    for path, photo in zip(paths, photos, strict=True):
        draw(photo.scene, size=size).save(path)
        rows.append(json.dumps({"file_name": path.name, "text": photo.caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return paths
