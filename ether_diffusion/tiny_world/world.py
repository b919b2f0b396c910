"""Scenes of Tiny World: what is drawn, the picture of it, and the caption that tells the truth about it."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageEnhance, ImageFilter

from ether_diffusion.tiny_world.backgrounds import COLOURS, SCENE_PHRASES, Background, BackgroundKind, paint
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, read_render, with_article

NATIVE_SIZE = 64
SUPERSAMPLING = 2
HELD_OUT_PAIRS_PER_CENT = 5
HYPERNYM_PER_CENT = 4

Size = Literal["small", "medium", "big"]
Place = Literal["center", "left", "right", "top", "bottom"]

# Longest side of the object as a fraction of the picture's.
SCALES: dict[Size, tuple[float, float]] = {"small": (0.44, 0.5), "medium": (0.66, 0.74), "big": (0.86, 0.94)}
PLACES: dict[Place, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
PLACE_PHRASES: dict[Place, str] = {
    "center": "",
    "left": ", on the left",
    "right": ", on the right",
    "top": ", at the top",
    "bottom": ", at the bottom",
}


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture, apart from the background's small details.

    scale is the object's longest side and shift_x, shift_y its centre's offset, all as fractions of the
    picture's side; rotation is in degrees; light multiplies the object's brightness.
    """

    concept: Concept
    background: Background
    size: Size = "medium"
    place: Place = "center"
    scale: float = 0.7
    shift_x: float = 0.0
    shift_y: float = 0.0
    rotation: float = 0.0
    light: float = 1.0
    flipped: bool = False
    detail_seed: int = 0

    def caption(self, noun: str | None = None) -> str:
        """Describe the scene; noun ("sks animal") replaces the concept's name."""
        name = noun or self.concept.name
        sized = name if self.size == "medium" else f"{self.size} {name}"
        return f"{with_article(sized)} {self.background.phrase}{PLACE_PHRASES[self.place]}"


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


def draw_object(scene: Scene, side: int, *, renders_folder: Path = RENDERS_FOLDER) -> Image.Image:
    """Draw the object alone as an RGBA layer of side x side px."""
    render = read_render(scene.concept.render, renders_folder)
    factor = scene.scale * side / max(render.size)
    width, height = (max(1, round(length * factor)) for length in render.size)
    render = render.resize((width, height), Image.Resampling.LANCZOS)
    if scene.flipped:
        render = render.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if scene.rotation:
        render = render.rotate(scene.rotation, Image.Resampling.BICUBIC, expand=True)
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    left = round(side * (0.5 + scene.shift_x) - render.width / 2)
    top = round(side * (0.5 + scene.shift_y) - render.height / 2)
    layer.paste(render, (left, top))
    if scene.light != 1.0:
        alpha = layer.getchannel("A")
        layer = ImageEnhance.Brightness(layer).enhance(scene.light)
        layer.putalpha(alpha)
    return layer


def draw(scene: Scene, *, size: int = NATIVE_SIZE, renders_folder: Path = RENDERS_FOLDER) -> Image.Image:
    """Draw a scene as an RGB picture of size x size px: background, soft shadow, object."""
    side = size * SUPERSAMPLING
    picture = paint(scene.background, side, random.Random(scene.detail_seed))
    layer = draw_object(scene, side, renders_folder=renders_folder)
    blurred = layer.getchannel("A").filter(ImageFilter.GaussianBlur(side / 40))
    shadow = Image.new("L", (side, side), 0)
    shadow.paste(blurred.point(lambda alpha: alpha * 0.35), (0, round(side * 0.025)))
    picture.paste((20, 20, 40), (0, 0), shadow)
    picture.paste(layer, (0, 0), layer)
    return picture.resize((size, size), Image.Resampling.BOX)


def object_box(
    scene: Scene, size: int = NATIVE_SIZE, *, renders_folder: Path = RENDERS_FOLDER
) -> tuple[int, int, int, int]:
    """Return the object's box (left, top, right, bottom) in px of a picture of size x size px."""
    box = draw_object(scene, size, renders_folder=renders_folder).getbbox()
    assert box is not None, "an object is never wholly transparent"
    return box
