"""Silhouettes drawn by hand: outlines that no concept of Tiny World has, for control to follow."""

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from ether_diffusion.tiny_world.world import NATIVE_SIZE

Point = tuple[float, float]
ShapeName = Literal["ellipse on the left", "wide ellipse", "triangle", "star", "disc at the right", "corner"]
_SHARPNESS = 8
"""The shape is drawn this many times larger, and then shrunk."""


@dataclass(frozen=True)
class Ellipse:
    """An ellipse in its box (left, top, right, bottom), in fractions of the picture's side."""

    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Polygon:
    """A polygon by its corners (x, y), in fractions of the picture's side."""

    corners: tuple[Point, ...]


def _star(centre: Point, outer: float, inner: float) -> Polygon:
    radii = [outer if number % 2 == 0 else inner for number in range(10)]
    angles = [math.pi * number / 5 for number in range(10)]
    x, y = centre
    return Polygon(
        tuple(
            (x + radius * math.sin(angle), y - radius * math.cos(angle))
            for radius, angle in zip(radii, angles, strict=True)
        )
    )


SHAPES: dict[ShapeName, Ellipse | Polygon] = {
    "ellipse on the left": Ellipse((0.06, 0.22, 0.53, 0.88)),
    "wide ellipse": Ellipse((0.09, 0.34, 0.91, 0.78)),
    "triangle": Polygon(((0.5, 0.09), (0.91, 0.88), (0.09, 0.88))),
    "star": _star((0.5, 0.52), 0.41, 0.19),
    "disc at the right": Ellipse((0.56, 0.5, 0.91, 0.85)),
    "corner": Polygon(((0.19, 0.12), (0.47, 0.12), (0.47, 0.59), (0.84, 0.59), (0.84, 0.88), (0.19, 0.88))),
}


def draw_shape(name: ShapeName, *, size: int = NATIVE_SIZE) -> Image.Image:
    """Draw a shape (mode L) of size x size px: white where it covers at least half of a pixel, else black."""
    shape, side = SHAPES[name], size * _SHARPNESS
    picture = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(picture)
    if isinstance(shape, Ellipse):
        left, top, right, bottom = (side * each for each in shape.box)
        pen.ellipse((left, top, right, bottom), fill=255)
    else:
        pen.polygon([(side * x, side * y) for x, y in shape.corners], fill=255)
    shares = picture.resize((size, size), Image.Resampling.BOX)
    return shares.point([255 if share >= 128 else 0 for share in range(256)])
