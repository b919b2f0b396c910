"""Scenes that the embedded base is trained on, and those that are kept from it."""

import hashlib
import random
from pathlib import Path

from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept
from ether_diffusion.tiny_world.world import (
    COLOURS,
    NATIVE_SIZE,
    PLACES,
    SCALES,
    SCENE_PHRASES,
    Background,
    BackgroundKind,
    Place,
    Scene,
    Size,
    draw_object,
)

HELD_OUT_PAIRS_PER_CENT = 5
HYPERNYM_PER_CENT = 4


def sample_background(rng: random.Random) -> Background:
    """Draw a background: half plain, a third scenes, the rest gradients and patterns."""
    kinds: tuple[BackgroundKind, ...] = ("plain", "scene", "gradient", "stripes", "dots", "checks")
    kind = rng.choices(kinds, (48, 34, 9, 3, 3, 3))[0]
    if kind == "scene":
        return Background("scene", rng.choice(tuple(SCENE_PHRASES)))
    first, second = rng.sample(tuple(COLOURS), 2)
    return Background(kind, first, second if kind == "gradient" else "")


def is_held_out_pair(concept: Concept, background: Background) -> bool:
    """Say whether training never shows this concept with this background's colour or scene."""
    return any(
        hashlib.sha256(f"{concept.name}|{name}".encode()).digest()[0] * 100 // 256 < HELD_OUT_PAIRS_PER_CENT
        for name in (background.name, background.second)
        if name
    )


def held_out_backgrounds(concept: Concept) -> list[Background]:
    """List the plain and scenic backgrounds that training never shows with this concept."""
    plain = [Background("plain", name) for name in COLOURS]
    scenic = [Background("scene", name) for name in SCENE_PHRASES]
    return [background for background in plain + scenic if is_held_out_pair(concept, background)]


def sample_scene(concept: Concept, rng: random.Random, *, held_out_pair: bool | None = False) -> Scene:
    """Draw a scene of a concept; held_out_pair chooses the side of the split, None takes either.

    Raises:
        ValueError: a held-out pair is asked for and this concept has none.
    """
    if held_out_pair and not held_out_backgrounds(concept):
        raise ValueError(
            f"{concept.name!r} has no held-out pair; ask for held_out_pair=False or another concept"
        )
    background = sample_background(rng)
    while held_out_pair is not None and is_held_out_pair(concept, background) != held_out_pair:
        background = sample_background(rng)
    size: Size = rng.choices(("small", "medium", "big"), (16, 64, 20))[0]
    places: tuple[Place, ...] = ("center", "left", "right", "top", "bottom")
    place: Place = "center" if size == "big" else rng.choices(places, (72, 7, 7, 7, 7))[0]
    scale = rng.uniform(*SCALES[size])
    # An object with a place word touches the border of the picture up to a small margin.
    reach = (1 - scale) / 2 - 0.03
    across, down = PLACES[place]
    return Scene(
        concept=concept,
        background=background,
        size=size,
        place=place,
        scale=scale,
        shift_x=across * reach + rng.uniform(-0.02, 0.02),
        shift_y=down * reach + rng.uniform(-0.02, 0.02),
        light=rng.uniform(0.92, 1.06),
        detail_seed=rng.getrandbits(32),
    )


def training_caption(scene: Scene, rng: random.Random) -> str:
    """Caption a scene for training: a few captions name only the kind ("an animal in the snow")."""
    return scene.caption(scene.concept.kind if rng.random() * 100 < HYPERNYM_PER_CENT else None)


def object_box(
    scene: Scene, size: int = NATIVE_SIZE, *, renders_folder: Path = RENDERS_FOLDER
) -> tuple[int, int, int, int]:
    """Return the object's box (left, top, right, bottom) in px of a picture of size x size px."""
    box = draw_object(scene, size, renders_folder=renders_folder).getbbox()
    assert box is not None, "an object is never wholly transparent"
    return box
