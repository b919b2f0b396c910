"""Scenes of Tiny World: what is drawn, the picture of it, its caption, and the classes of what is in it."""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageEnhance, ImageFilter

from ether_diffusion.tiny_world.backgrounds import SCENE_PHRASES, Background, Colour, paint
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, read_render, with_article

NATIVE_SIZE = 64
SUPERSAMPLING = 2

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

OBJECT_CLASSES = ("animal", "food", "vehicle", "object", "plant", "character")
"""The kinds of concepts."""
BACKGROUND_CLASSES = ("plain", "gradient", "pattern", *SCENE_PHRASES)
CLASSES = OBJECT_CLASSES + BACKGROUND_CLASSES
_LEVELS = (255, 128, 0)
PALETTE: dict[str, Colour] = dict(zip(CLASSES, itertools.product(_LEVELS, _LEVELS, _LEVELS), strict=False))
"""The colour of each class; any two differ by 127 or more in some channel, and black is none of them."""


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
