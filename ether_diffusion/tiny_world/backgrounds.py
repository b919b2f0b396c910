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


class _Canvas:
    """A picture of size × size px that is drawn on in fractions of its side."""

    def __init__(self, size: int, top: Colour, bottom: Colour | None = None) -> None:
        self.size, self.picture = size, Image.new("RGB", (size, size), top)
        if bottom is not None:
            mask = Image.linear_gradient("L").resize((size, size))
            self.picture = Image.composite(Image.new("RGB", (size, size), bottom), self.picture, mask)
        self.pen = ImageDraw.Draw(self.picture)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """Draw an ellipse with centre (x, y) and radii (rx, ry)."""
        x, y, rx, ry = (self.size * each for each in (x, y, rx, ry))
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def ground(self, top: float, fill: Colour, bottom: float = 1) -> None:
        """Fill from one height to another, over the whole width."""
        self.pen.rectangle((0, self.size * top, self.size, self.size * bottom), fill=fill)

    def dots(self, count: int, rng: random.Random, radii: tuple[float, float], fill: Colour) -> None:
        """Scatter discs; of equal radii none is drawn from the generator."""
        for _ in range(count):
            radius = radii[0] if radii[0] == radii[1] else rng.uniform(*radii)
            self.ellipse(rng.uniform(0, 1), rng.uniform(0, 1), radius, radius, fill)


def _beach(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (120, 205, 250), (200, 238, 255))
    sea, sand = rng.uniform(0.40, 0.46), size * rng.uniform(0.58, 0.66)
    canvas.ground(sea, (40, 150, 215))
    canvas.pen.rectangle((0, sand - size * 0.03, size, size), fill=(215, 240, 250))
    canvas.pen.rectangle((0, sand, size, size), fill=(245, 220, 160))
    return canvas.picture


def _snow(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (150, 180, 220), (205, 222, 242))
    canvas.ellipse(rng.uniform(0.1, 0.9), 1.25, 0.9, 0.65, (250, 252, 255))
    canvas.dots(26, rng, (0.014, 0.014), (255, 255, 255))
    return canvas.picture


def _space(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (16, 12, 48), (48, 26, 92))
    canvas.dots(34, rng, (0.005, 0.014), (235, 235, 255))
    return canvas.picture


def _meadow(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (130, 205, 250), (210, 240, 255))
    canvas.ellipse(rng.uniform(0, 1), 1.15, 1.0, 0.62, (120, 200, 90))
    canvas.ground(0.72, (95, 180, 75))
    for _ in range(12):
        petal = rng.choice(((255, 255, 255), (255, 225, 90), (250, 150, 190)))
        canvas.ellipse(rng.uniform(0, 1), rng.uniform(0.76, 1), 0.018, 0.018, petal)
    return canvas.picture


def _forest(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (150, 205, 165), (95, 160, 110))
    for index in range(6):
        x = size * (index + rng.uniform(0.1, 0.9)) / 6
        half, top = size * 0.11, size * rng.uniform(0.02, 0.25)
        tree = ((x, top), (x - half, size * 0.8), (x + half, size * 0.8))
        canvas.pen.polygon(tree, fill=(40, rng.randint(98, 122), 62))
    canvas.ground(0.78, (78, 112, 58))
    return canvas.picture


def _city(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (175, 205, 235), (230, 236, 245))
    for index in range(6):
        left, top = size * index / 6, size * rng.uniform(0.15, 0.5)
        shade = rng.randint(120, 165)
        canvas.pen.rectangle((left, top, left + size * 0.155, size), fill=(shade, shade + 4, shade + 22))
        for row in range(int(top + size * 0.05), int(size * 0.78), max(4, size // 11)):
            for start, end in ((0.035, 0.065), (0.09, 0.12)):
                window = (left + size * start, row, left + size * end, row + size * 0.03)
                canvas.pen.rectangle(window, fill=(250, 232, 160))
    canvas.ground(0.8, (92, 94, 104))
    return canvas.picture


def _desert(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (250, 205, 140), (255, 236, 200))
    canvas.ellipse(rng.uniform(0, 0.4), 1.2, 0.9, 0.6, (228, 160, 92))
    canvas.ellipse(rng.uniform(0.6, 1), 1.3, 0.9, 0.6, (212, 140, 78))
    return canvas.picture


def _sea(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (70, 185, 225), (18, 70, 140))
    canvas.dots(12, rng, (0.012, 0.03), (150, 220, 240))
    return canvas.picture


def _sunset(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (120, 70, 150), (255, 165, 90))
    canvas.ellipse(rng.uniform(0.15, 0.85), 0.66, 0.15, 0.15, (255, 228, 130))
    canvas.ground(0.72, (92, 52, 98))
    return canvas.picture


def _sky(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (70, 155, 240), (175, 220, 255))
    for _ in range(4):
        x, y = rng.uniform(0, 1), rng.uniform(0.1, 0.95)
        for shift, radius in ((-0.09, 0.06), (0.0, 0.085), (0.09, 0.06)):
            canvas.ellipse(x + shift, y, radius, radius * 0.75, (250, 252, 255))
    return canvas.picture


def _mountains(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (150, 195, 240), (225, 238, 250))
    for x in (rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.9)):
        top, middle, cap = size * rng.uniform(0.12, 0.25), x * size, size * 0.15
        for width, bottom, fill in (
            (size * 0.5, size, (108, 116, 145)),
            (cap * 0.6, top + cap, (248, 250, 255)),
        ):
            canvas.pen.polygon(((middle, top), (middle - width, bottom), (middle + width, bottom)), fill=fill)
    canvas.ground(0.8, (110, 160, 100))
    return canvas.picture


def _room(size: int, rng: random.Random) -> Image.Image:
    canvas = _Canvas(size, (240, 222, 196))
    left = size * rng.choice((0.08, 0.62))
    canvas.pen.rectangle((left, size * 0.1, left + size * 0.3, size * 0.42), fill=(255, 255, 255))
    pane = (left + size * 0.03, size * 0.13, left + size * 0.27, size * 0.39)
    canvas.pen.rectangle(pane, fill=(150, 210, 245))
    canvas.ground(0.7, (176, 118, 76))
    canvas.ground(0.7, (250, 246, 238), 0.73)
    return canvas.picture


_SCENES: dict[str, tuple[str, Callable[[int, random.Random], Image.Image]]] = {
    "beach": ("on a beach", _beach),
    "snow": ("in the snow", _snow),
    "space": ("in space", _space),
    "meadow": ("in a meadow", _meadow),
    "forest": ("in a forest", _forest),
    "city": ("in a city", _city),
    "desert": ("in a desert", _desert),
    "sea": ("under water", _sea),
    "sunset": ("at sunset", _sunset),
    "sky": ("in the sky", _sky),
    "mountains": ("in the mountains", _mountains),
    "room": ("in a room", _room),
}
SCENE_PHRASES = {name: phrase for name, (phrase, _) in _SCENES.items()}


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
    phase, radius = rng.randrange(period), period * 0.42
    for row in range(-2, 10):
        for column in range(-2, 10):
            x, y = column * period + phase, row * period + phase
            if background.kind == "checks" and (row + column) % 2:
                draw.rectangle((x, y, x + period - 1, y + period - 1), fill=other)
            elif background.kind == "dots" and not (row + column) % 2:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=other)
        if background.kind == "stripes" and row % 2:
            draw.rectangle((row * period + phase, 0, (row + 1) * period + phase - 1, size), fill=other)
    return picture


def paint(background: Background, size: int, rng: random.Random) -> Image.Image:
    """Draw a background as an RGB picture of size x size px; details vary with the generator."""
    if background.kind == "scene":
        return _SCENES[background.name][1](size, rng).filter(ImageFilter.GaussianBlur(size / 128))
    if background.kind == "plain":
        return Image.new("RGB", (size, size), _shade(COLOURS[background.name], rng.uniform(0.94, 1.06)))
    if background.kind == "gradient":
        return _Canvas(size, COLOURS[background.name], COLOURS[background.second]).picture
    return _pattern(background, size, rng)
