"""The backgrounds of Tiny World, drawn by code: plain, gradient, patterned, and twelve sceneries."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
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


def vertical_gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    """Draw a gradient of size x size px."""
    mask = Image.linear_gradient("L").resize((size, size))
    return Image.composite(Image.new("RGB", (size, size), bottom), Image.new("RGB", (size, size), top), mask)


def fill_ellipse(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
    """Draw an ellipse with centre (x, y) and radii (rx, ry), all in px."""
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def _beach(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (120, 205, 250), (200, 238, 255))
    draw = ImageDraw.Draw(picture)
    sea, sand = size * rng.uniform(0.40, 0.46), size * rng.uniform(0.58, 0.66)
    draw.rectangle((0, sea, size, size), fill=(40, 150, 215))
    draw.rectangle((0, sand - size * 0.03, size, size), fill=(215, 240, 250))
    draw.rectangle((0, sand, size, size), fill=(245, 220, 160))
    return picture


def _snow(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (150, 180, 220), (205, 222, 242))
    draw = ImageDraw.Draw(picture)
    fill_ellipse(draw, size * rng.uniform(0.1, 0.9), size * 1.25, size * 0.9, size * 0.65, (250, 252, 255))
    for _ in range(26):
        fill_ellipse(
            draw, rng.uniform(0, size), rng.uniform(0, size), size * 0.014, size * 0.014, (255, 255, 255)
        )
    return picture


def _space(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (16, 12, 48), (48, 26, 92))
    draw = ImageDraw.Draw(picture)
    for _ in range(34):
        radius = size * rng.uniform(0.005, 0.014)
        fill_ellipse(draw, rng.uniform(0, size), rng.uniform(0, size), radius, radius, (235, 235, 255))
    return picture


def _meadow(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (130, 205, 250), (210, 240, 255))
    draw = ImageDraw.Draw(picture)
    fill_ellipse(draw, size * rng.uniform(0, 1), size * 1.15, size * 1.0, size * 0.62, (120, 200, 90))
    draw.rectangle((0, size * 0.72, size, size), fill=(95, 180, 75))
    for _ in range(12):
        petal = rng.choice(((255, 255, 255), (255, 225, 90), (250, 150, 190)))
        fill_ellipse(
            draw, rng.uniform(0, size), rng.uniform(0.76, 1) * size, size * 0.018, size * 0.018, petal
        )
    return picture


def _forest(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (150, 205, 165), (95, 160, 110))
    draw = ImageDraw.Draw(picture)
    for index in range(6):
        x = size * (index + rng.uniform(0.1, 0.9)) / 6
        half, top = size * 0.11, size * rng.uniform(0.02, 0.25)
        draw.polygon(
            ((x, top), (x - half, size * 0.8), (x + half, size * 0.8)), fill=(40, rng.randint(98, 122), 62)
        )
    draw.rectangle((0, size * 0.78, size, size), fill=(78, 112, 58))
    return picture


def _city(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (175, 205, 235), (230, 236, 245))
    draw = ImageDraw.Draw(picture)
    for index in range(6):
        left, top = size * index / 6, size * rng.uniform(0.15, 0.5)
        shade = rng.randint(120, 165)
        draw.rectangle((left, top, left + size * 0.155, size), fill=(shade, shade + 4, shade + 22))
        for row in range(int(top + size * 0.05), int(size * 0.78), max(4, size // 11)):
            draw.rectangle(
                (left + size * 0.035, row, left + size * 0.065, row + size * 0.03), fill=(250, 232, 160)
            )
            draw.rectangle(
                (left + size * 0.09, row, left + size * 0.12, row + size * 0.03), fill=(250, 232, 160)
            )
    draw.rectangle((0, size * 0.8, size, size), fill=(92, 94, 104))
    return picture


def _desert(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (250, 205, 140), (255, 236, 200))
    draw = ImageDraw.Draw(picture)
    fill_ellipse(draw, size * rng.uniform(0, 0.4), size * 1.2, size * 0.9, size * 0.6, (228, 160, 92))
    fill_ellipse(draw, size * rng.uniform(0.6, 1), size * 1.3, size * 0.9, size * 0.6, (212, 140, 78))
    return picture


def _sea(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (70, 185, 225), (18, 70, 140))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        radius = size * rng.uniform(0.012, 0.03)
        fill_ellipse(draw, rng.uniform(0, size), rng.uniform(0, size), radius, radius, (150, 220, 240))
    return picture


def _sunset(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (120, 70, 150), (255, 165, 90))
    draw = ImageDraw.Draw(picture)
    fill_ellipse(draw, size * rng.uniform(0.15, 0.85), size * 0.66, size * 0.15, size * 0.15, (255, 228, 130))
    draw.rectangle((0, size * 0.72, size, size), fill=(92, 52, 98))
    return picture


def _sky(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (70, 155, 240), (175, 220, 255))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = rng.uniform(0, size), rng.uniform(0.1, 0.95) * size
        for shift, radius in ((-0.09, 0.06), (0.0, 0.085), (0.09, 0.06)):
            fill_ellipse(draw, x + shift * size, y, radius * size, radius * size * 0.75, (250, 252, 255))
    return picture


def _mountains(size: int, rng: random.Random) -> Image.Image:
    picture = vertical_gradient(size, (150, 195, 240), (225, 238, 250))
    draw = ImageDraw.Draw(picture)
    for x in (rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.9)):
        top, middle = size * rng.uniform(0.12, 0.25), x * size
        draw.polygon(
            ((middle, top), (middle - size * 0.5, size), (middle + size * 0.5, size)), fill=(108, 116, 145)
        )
        cap = size * 0.15
        draw.polygon(
            ((middle, top), (middle - cap * 0.6, top + cap), (middle + cap * 0.6, top + cap)),
            fill=(248, 250, 255),
        )
    draw.rectangle((0, size * 0.8, size, size), fill=(110, 160, 100))
    return picture


def _room(size: int, rng: random.Random) -> Image.Image:
    picture = Image.new("RGB", (size, size), (240, 222, 196))
    draw = ImageDraw.Draw(picture)
    left = size * rng.choice((0.08, 0.62))
    draw.rectangle((left, size * 0.1, left + size * 0.3, size * 0.42), fill=(255, 255, 255))
    draw.rectangle((left + size * 0.03, size * 0.13, left + size * 0.27, size * 0.39), fill=(150, 210, 245))
    draw.rectangle((0, size * 0.7, size, size), fill=(176, 118, 76))
    draw.rectangle((0, size * 0.7, size, size * 0.73), fill=(250, 246, 238))
    return picture


SCENE_PHRASES = {
    "beach": "on a beach",
    "snow": "in the snow",
    "space": "in space",
    "meadow": "in a meadow",
    "forest": "in a forest",
    "city": "in a city",
    "desert": "in a desert",
    "sea": "under water",
    "sunset": "at sunset",
    "sky": "in the sky",
    "mountains": "in the mountains",
    "room": "in a room",
}
SCENE_PAINTERS: dict[str, Callable[[int, random.Random], Image.Image]] = {
    "beach": _beach,
    "snow": _snow,
    "space": _space,
    "meadow": _meadow,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "sea": _sea,
    "sunset": _sunset,
    "sky": _sky,
    "mountains": _mountains,
    "room": _room,
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
