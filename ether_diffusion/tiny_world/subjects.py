"""Subjects for personalization: six "photos" of each held-out concept, and prompts that they never showed."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from ether_diffusion.tiny_world.backgrounds import Background
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, with_article
from ether_diffusion.tiny_world.world import NATIVE_SIZE, SCALES, Scene, Size, draw

NUM_PHOTOS = 6
IDENTIFIER = "sks"
PHOTO_SIZES: tuple[Size, ...] = ("medium", "big", "medium", "small", "medium", "big")

# Photos and prompts take their backgrounds from disjoint lists.
PHOTO_BACKGROUNDS = (
    Background("plain", "white"),
    Background("scene", "meadow"),
    Background("plain", "gray"),
    Background("scene", "city"),
    Background("plain", "teal"),
    Background("scene", "desert"),
    Background("plain", "purple"),
    Background("scene", "room"),
    Background("plain", "pink"),
    Background("scene", "mountains"),
)
PROMPT_BACKGROUNDS = (
    Background("plain", "red"),
    Background("scene", "beach"),
    Background("plain", "blue"),
    Background("scene", "snow"),
    Background("plain", "yellow"),
    Background("scene", "space"),
    Background("plain", "green"),
    Background("scene", "forest"),
)


@dataclass(frozen=True)
class Photo:
    """One picture of a subject: its scene, and a caption with the identifier in place of the name."""

    scene: Scene
    caption: str


def subject_noun(concept: Concept, identifier: str = IDENTIFIER) -> str:
    """What captions call a subject: the identifier and its kind, "sks animal"."""
    return f"{identifier} {concept.kind}"


def photos_of(concept: Concept, *, identifier: str = IDENTIFIER) -> tuple[Photo, ...]:
    """Compose the photos of a subject: background, size, rotation, light and flip differ."""
    rng = random.Random(f"subject/{concept.name}")
    backgrounds = rng.sample(PHOTO_BACKGROUNDS, NUM_PHOTOS)
    photos = []
    for background, size in zip(backgrounds, PHOTO_SIZES, strict=True):
        scene = Scene(
            concept=concept,
            background=background,
            size=size,
            scale=rng.uniform(*SCALES[size]) * (0.92 if size == "big" else 1.0),
            shift_x=rng.uniform(-0.03, 0.03),
            shift_y=rng.uniform(-0.03, 0.03),
            rotation=rng.uniform(-12, 12),
            light=rng.uniform(0.86, 1.1),
            flipped=rng.random() < 0.3,
            detail_seed=rng.getrandbits(32),
        )
        photos.append(Photo(scene, scene.caption(subject_noun(concept, identifier))))
    return tuple(photos)


def unseen_prompts(concept: Concept, *, identifier: str = IDENTIFIER) -> tuple[str, ...]:
    """Prompts for a subject on backgrounds that none of its photos has."""
    noun = subject_noun(concept, identifier)
    return tuple(f"{with_article(noun)} {background.phrase}" for background in PROMPT_BACKGROUNDS)


def unseen_scenes(concept: Concept) -> tuple[Scene, ...]:
    """The true scenes of unseen_prompts, in the same order: what an ideal adapter would draw."""
    plain = Scene(concept=concept, background=PROMPT_BACKGROUNDS[0])
    return tuple(replace(plain, background=background) for background in PROMPT_BACKGROUNDS)


def write_photos(
    concept: Concept,
    folder: Path,
    *,
    count: int = NUM_PHOTOS,
    size: int = NATIVE_SIZE,
    renders_folder: Path = RENDERS_FOLDER,
) -> list[Path]:
    """Write a subject's first photos as PNG files of size x size px, and metadata.jsonl with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, paths = [], []
    for number, photo in enumerate(photos_of(concept)[:count]):
        path = folder / f"{concept.name.replace(' ', '_')}_{number}.png"
        draw(photo.scene, size=size, renders_folder=renders_folder).save(path)
        rows.append(json.dumps({"file_name": path.name, "text": photo.caption}))
        paths.append(path)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return paths
