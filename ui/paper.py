"""What control images are drawn with in a page: classes with exact colours, on a ground of one of them."""

import base64
import binascii
from dataclasses import dataclass
from html import escape

from PIL import Image

from ether_diffusion.control.palette import Colour, Palette
from ether_diffusion.tiny_world.world import BACKGROUND_CLASSES, OBJECT_CLASSES, PALETTE
from ether_diffusion.training.decoding import decode_bytes
from ether_diffusion.training.plain_files import UnusableFileError

MAX_DRAWING = 8 * 2**20
"""Characters of a drawing as it comes from a page."""
MAX_SIDE_PX = 1024
"""Of the canvas; a larger picture's drawing is enlarged."""
_PREFIX = "data:image/png;base64,"
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Paper:
    """Groups of classes with their colours; the first class draws at first, `ground` is what is not drawn."""

    name: str
    groups: tuple[tuple[str, dict[str, Colour]], ...]
    ground: str

    @property
    def palette(self) -> Palette:
        """All classes with their colours."""
        found = {name: colour for _, classes in self.groups for name, colour in classes.items()}
        return Palette("what can be drawn with here", tuple(found), tuple(found.values()))


def paper_of(control_type: str | None) -> Paper:
    """Return the paper for an adapter that follows images of a type."""
    if control_type == "palette":
        groups = (("Things", OBJECT_CLASSES), ("Places", BACKGROUND_CLASSES))
        coloured = tuple((title, {name: PALETTE[name] for name in names}) for title, names in groups)
        return Paper("palette", coloured, "beach")
    thing = {"silhouette": "subject", "edges": "line", "canny": "line"}.get(control_type or "", "white")
    return Paper("mask", (("Draw with", {thing: _WHITE, "nothing": _BLACK}),), "nothing")


def paper_html(paper: Paper, *, width: int, height: int) -> str:
    """Return the canvas for pictures of a size (px), its tools and classes; ui/sketch.js gives them life."""
    shrink = min(1.0, MAX_SIDE_PX / max(width, height))
    size = f'width="{round(width * shrink)}" height="{round(height * shrink)}"'
    ground = _hex(dict(zip(paper.palette.classes, paper.palette.colours, strict=True))[paper.ground])
    first = paper.palette.classes[0]
    groups = "".join(
        f"<fieldset><legend>{escape(title)}</legend>"
        + "".join(_swatch(name, colour, is_chosen=name == first) for name, colour in classes.items())
        + "</fieldset>"
        for title, classes in paper.groups
    )
    return (
        f'<div class="sketch" data-paper="{paper.name}" data-ground="{ground}">'
        f'<canvas {size} role="img" aria-label="Your drawing"></canvas>'
        '<div class="sketch-tools"><label>Brush <input type="range" min="1" max="60" value="24"></label>'
        '<button type="button" data-do="undo">Undo</button>'
        '<button type="button" data-do="fill">Fill all</button>'
        '<button type="button" data-do="clear">Clear</button></div>'
        f"{groups}</div>"
    )


def read_drawing(text: str, paper: Paper) -> Image.Image:
    """Return a drawing that a page sent, in exactly the paper's colours (mode RGB).

    Raises:
        ValueError: it is none, is too large, or other colours are in it.
    """
    if not text.startswith(_PREFIX):
        raise ValueError("there is no drawing yet; draw something, or upload a control image")
    if len(text) > MAX_DRAWING:
        raise ValueError(f"the drawing is larger than {MAX_DRAWING >> 20} MiB; draw it smaller")
    try:
        data = base64.b64decode(text[len(_PREFIX) :], validate=True)
        decoded = decode_bytes(data, ".png", background=_BLACK, max_pixels=MAX_SIDE_PX**2, min_side=1)
    except (UnusableFileError, binascii.Error):
        raise ValueError("the drawing came damaged from the page; draw again") from None
    try:
        return paper.palette.snap(decoded.rgb)
    except ValueError as error:
        raise ValueError(f"the drawing {error}") from None


def _swatch(name: str, colour: Colour, *, is_chosen: bool) -> str:
    chosen = " checked" if is_chosen else ""
    shade = _hex(colour)
    return (
        f'<label class="swatch"><input type="radio" name="sketch-class" value="{shade}"{chosen}>'
        f'<span style="background:{shade}"></span>{escape(name)}</label>'
    )


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
