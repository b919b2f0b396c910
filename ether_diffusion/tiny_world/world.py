"""Scenes of Tiny World: what is drawn, the picture of it, its caption, and the classes of what is in it."""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, Concept, read_render, with_article

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
WHITE: Colour = (255, 255, 255)


class _Canvas:
    """A picture of size × size px that is drawn on in fractions of its side, and where chance comes from."""

    def __init__(self, size: int, rng: random.Random, top: Colour, bottom: Colour | None = None) -> None:
        self.size, self.uniform, self.rng = size, rng.uniform, rng
        self.picture = Image.new("RGB", (size, size), top)
        if bottom is not None:
            mask = Image.linear_gradient("L").resize((size, size))
            self.picture = Image.composite(Image.new("RGB", (size, size), bottom), self.picture, mask)
        self.pen = ImageDraw.Draw(self.picture)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """Draw an ellipse with centre (x, y) and radii (rx, ry)."""
        x, y, rx, ry = (self.size * each for each in (x, y, rx, ry))
        self.pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def polygon(self, *corners: tuple[float, float], fill: Colour) -> None:
        """Draw a polygon."""
        self.pen.polygon([(x * self.size, y * self.size) for x, y in corners], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """Fill a rectangle."""
        self.pen.rectangle([self.size * each for each in (left, top, right, bottom)], fill=fill)

    def ground(self, top: float, fill: Colour, bottom: float = 1) -> None:
        """Fill from one height to another, over the whole width."""
        self.box(0, top, 1, bottom, fill)

    def dots(self, count: int, radii: tuple[float, float], fill: Colour) -> None:
        """Scatter discs; of equal radii none is drawn from the generator."""
        for _ in range(count):
            radius = radii[0] if radii[0] == radii[1] else self.uniform(*radii)
            self.ellipse(self.uniform(0, 1), self.uniform(0, 1), radius, radius, fill)


_SCENES: dict[str, tuple[str, Colour, Colour | None]] = {
    "beach": ("on a beach", (120, 205, 250), (200, 238, 255)),
    "snow": ("in the snow", (150, 180, 220), (205, 222, 242)),
    "space": ("in space", (16, 12, 48), (48, 26, 92)),
    "meadow": ("in a meadow", (130, 205, 250), (210, 240, 255)),
    "forest": ("in a forest", (150, 205, 165), (95, 160, 110)),
    "city": ("in a city", (175, 205, 235), (230, 236, 245)),
    "desert": ("in a desert", (250, 205, 140), (255, 236, 200)),
    "sea": ("under water", (70, 185, 225), (18, 70, 140)),
    "sunset": ("at sunset", (120, 70, 150), (255, 165, 90)),
    "sky": ("in the sky", (70, 155, 240), (175, 220, 255)),
    "mountains": ("in the mountains", (150, 195, 240), (225, 238, 250)),
    "room": ("in a room", (240, 222, 196), None),
}
"""What captions call each scenery, and the colours at its top and its bottom."""
SCENE_PHRASES = {name: phrase for name, (phrase, _, _) in _SCENES.items()}


def _draw_scene(name: str, c: _Canvas) -> None:
    """Draw what is before the sky of a scenery."""
    uniform = c.uniform
    match name:
        case "beach":
            sea, sand = uniform(0.40, 0.46), uniform(0.58, 0.66)
            c.ground(sea, (40, 150, 215))
            c.ground(sand - 0.03, (215, 240, 250))
            c.ground(sand, (245, 220, 160))
        case "snow":
            c.ellipse(uniform(0.1, 0.9), 1.25, 0.9, 0.65, (250, 252, 255))
            c.dots(26, (0.014, 0.014), WHITE)
        case "space":
            c.dots(34, (0.005, 0.014), (235, 235, 255))
        case "meadow":
            c.ellipse(uniform(0, 1), 1.15, 1.0, 0.62, (120, 200, 90))
            c.ground(0.72, (95, 180, 75))
            for _ in range(12):
                petal = c.rng.choice((WHITE, (255, 225, 90), (250, 150, 190)))
                c.ellipse(uniform(0, 1), uniform(0.76, 1), 0.018, 0.018, petal)
        case "forest":
            for index in range(6):
                x, top = (index + uniform(0.1, 0.9)) / 6, uniform(0.02, 0.25)
                green = c.rng.randint(98, 122)
                c.polygon((x, top), (x - 0.11, 0.8), (x + 0.11, 0.8), fill=(40, green, 62))
            c.ground(0.78, (78, 112, 58))
        case "city":
            for index in range(6):
                left, top, shade = index / 6, uniform(0.15, 0.5), c.rng.randint(120, 165)
                c.box(left, top, left + 0.155, 1, (shade, shade + 4, shade + 22))
                for row in range(int((top + 0.05) * c.size), int(c.size * 0.78), max(4, c.size // 11)):
                    for start, end in ((0.035, 0.065), (0.09, 0.12)):
                        sides = (left + start) * c.size, (left + end) * c.size
                        c.pen.rectangle((sides[0], row, sides[1], row + c.size * 0.03), (250, 232, 160))
            c.ground(0.8, (92, 94, 104))
        case "desert":
            c.ellipse(uniform(0, 0.4), 1.2, 0.9, 0.6, (228, 160, 92))
            c.ellipse(uniform(0.6, 1), 1.3, 0.9, 0.6, (212, 140, 78))
        case "sea":
            c.dots(12, (0.012, 0.03), (150, 220, 240))
        case "sunset":
            c.ellipse(uniform(0.15, 0.85), 0.66, 0.15, 0.15, (255, 228, 130))
            c.ground(0.72, (92, 52, 98))
        case "sky":
            for _ in range(4):
                x, y = uniform(0, 1), uniform(0.1, 0.95)
                for shift, radius in ((-0.09, 0.06), (0.0, 0.085), (0.09, 0.06)):
                    c.ellipse(x + shift, y, radius, radius * 0.75, (250, 252, 255))
        case "mountains":
            for x in (uniform(0.1, 0.3), uniform(0.7, 0.9)):
                top = uniform(0.12, 0.25)
                c.polygon((x, top), (x - 0.5, 1), (x + 0.5, 1), fill=(108, 116, 145))
                c.polygon((x, top), (x - 0.09, top + 0.15), (x + 0.09, top + 0.15), fill=(248, 250, 255))
            c.ground(0.8, (110, 160, 100))
        case "room":
            left = c.rng.choice((0.08, 0.62))
            c.box(left, 0.1, left + 0.3, 0.42, WHITE)
            c.box(left + 0.03, 0.13, left + 0.27, 0.39, (150, 210, 245))
            c.ground(0.7, (176, 118, 76))
            c.ground(0.7, (250, 246, 238), 0.73)


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
    red, green, blue = (int(channel + (255 - channel) * (factor - 1)) for channel in colour)
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
        canvas = _Canvas(size, rng, *_SCENES[background.name][1:])
        _draw_scene(background.name, canvas)
        return canvas.picture.filter(ImageFilter.GaussianBlur(size / 128))
    if background.kind == "plain":
        return Image.new("RGB", (size, size), _shade(COLOURS[background.name], rng.uniform(0.94, 1.06)))
    if background.kind == "gradient":
        return _Canvas(size, rng, COLOURS[background.name], COLOURS[background.second]).picture
    return _pattern(background, size, rng)


NATIVE_SIZE = 64
SUPERSAMPLING = 2

Size = Literal["small", "medium", "big"]
Place = Literal["center", "left", "right", "top", "bottom"]

# Longest side of the object as a fraction of the picture's.
SCALES: dict[Size, tuple[float, float]] = {"small": (0.44, 0.5), "medium": (0.66, 0.74), "big": (0.86, 0.94)}
PLACES: dict[Place, tuple[int, int]]
PLACES = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_PHRASES = {"center": "", "left": ", on the left", "right": ", on the right", "top": ", at the top",
            "bottom": ", at the bottom"}  # fmt: skip

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
        return f"{with_article(sized)} {self.background.phrase}{_PHRASES[self.place]}"


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
