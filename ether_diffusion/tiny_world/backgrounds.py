"""The backgrounds of Tiny World, drawn by code: plain, gradient, patterned and scenic."""

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFilter

from ether_diffusion.tiny_world.scenery import (
    SCENE_PAINTERS,
    SCENE_PHRASES,
    Colour,
    fill_ellipse,
    vertical_gradient,
)

BackgroundKind = Literal["plain", "gradient", "stripes", "dots", "checks", "scene"]

COLOURS: dict[str, Colour] = {
    "red": (220, 50, 60),
    "orange": (250, 145, 50),
    "yellow": (252, 215, 70),
    "green": (85, 180, 85),
    "teal": (40, 165, 165),
    "blue": (60, 115, 225),
    "purple": (140, 85, 205),
    "pink": (250, 160, 200),
    "brown": (140, 95, 65),
    "gray": (150, 150, 158),
    "white": (246, 246, 248),
    "black": (34, 34, 40),
}


@dataclass(frozen=True)
class Background:
    """A background to be drawn: its kind, and its colour or scene name (two colours for a gradient)."""

    kind: BackgroundKind
    name: str
    second: str = ""

    @property
    def phrase(self) -> str:
        """The words that end a caption: "on a red background", "in the snow"."""
        if self.kind == "scene":
            return SCENE_PHRASES[self.name]
        if self.kind == "gradient":
            return f"on a gradient from {self.name} to {self.second}"
        if self.kind == "plain":
            return f"on {'an' if self.name == 'orange' else 'a'} {self.name} background"
        return f"on {self.name} {self.kind}"


def _shade(colour: Colour, factor: float) -> Colour:
    """Scale a colour towards black (factor < 1) or white (factor > 1)."""
    if factor <= 1:
        return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))
    towards = factor - 1
    red, green, blue = (int(channel + (255 - channel) * towards) for channel in colour)
    return (red, green, blue)


def _pattern(background: Background, size: int, rng: random.Random) -> Image.Image:
    colour = COLOURS[background.name]
    other = _shade(colour, 1.55 if sum(colour) < 560 else 0.84)
    picture = Image.new("RGB", (size, size), colour)
    draw = ImageDraw.Draw(picture)
    period = size // 8
    phase = rng.randrange(period)
    for row in range(-2, 10):
        for column in range(-2, 10):
            x, y = column * period + phase, row * period + phase
            if background.kind == "checks" and (row + column) % 2:
                draw.rectangle((x, y, x + period - 1, y + period - 1), fill=other)
            elif background.kind == "dots" and not (row + column) % 2:
                fill_ellipse(draw, x, y, period * 0.42, period * 0.42, other)
        if background.kind == "stripes" and row % 2:
            draw.rectangle((row * period + phase, 0, (row + 1) * period + phase - 1, size), fill=other)
    return picture


def paint(background: Background, size: int, rng: random.Random) -> Image.Image:
    """Draw a background as an RGB picture of size x size px; details vary with the generator."""
    if background.kind == "scene":
        return SCENE_PAINTERS[background.name](size, rng).filter(ImageFilter.GaussianBlur(size / 128))
    if background.kind == "plain":
        return Image.new("RGB", (size, size), _shade(COLOURS[background.name], rng.uniform(0.94, 1.06)))
    if background.kind == "gradient":
        return vertical_gradient(size, COLOURS[background.name], COLOURS[background.second])
    return _pattern(background, size, rng)
