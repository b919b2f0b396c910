"""Where images that say where come from: a drawing in exact colours, an upload, or a detector."""

from pathlib import Path

from markupsafe import Markup
from PIL import Image

from ether_diffusion.control import Detector
from ether_diffusion.control.palette import Colour, Palette
from ether_diffusion.pipelines.sampling import Start
from ether_diffusion.tiny_world.world import BACKGROUND_CLASSES, OBJECT_CLASSES, PALETTE
from ether_diffusion.training import decode_photo
from ether_diffusion.training.decoding import decode_base64
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.ui.uploads import MAX_PIXELS
from ether_diffusion.ui.words import picture_address

DETECTORS = {
    "": "A control image, taken as it is",
    "canny": "A photo: its edges (canny)",
    "silhouette": "A cut-out: its shape (silhouette)",
    "palette": "A map of classes (palette)",
}
"""What an upload can be, by the name of the detector."""
MAX_DRAWING = 8 * 2**20  # characters of a drawing as it comes from a page
MAX_SIDE_PX = 1024  # of the canvas; a larger picture's drawing is enlarged
MASK = "mask of a start picture"
"""What is drawn on a picture rather than on paper: white where it changes."""
_HINTS = {
    "palette": "Draw here what should be where.",
    MASK: "Paint here what should be drawn anew; nothing painted is all of it.",
}
_PREFIX = "data:image/png;base64,"
_SHAPES = ("silhouette", "edges", "canny")  # types whose images are of dark and light
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_CANVAS = Markup(
    '<div class="sketch" data-paper="{kind}" data-ground="{ground}"{drawn}><p class="quiet">{what}</p>'
    '<div class="paper"{under}><canvas width="{width}" height="{height}" role="img" '
    'aria-label="Your drawing"></canvas></div>'
    '<div class="sketch-tools"><label>Brush <input type="range" min="1" max="60" value="24"></label>'
    '<button type="button" data-do="undo">Undo</button>'
    '<button type="button" data-do="fill">Fill all</button>'
    '<button type="button" data-do="clear">Clear</button></div>{groups}</div>'
)
_CLASS = Markup(
    '<label class="swatch"><input type="radio" name="sketch-class" value="{shade}"{chosen}>'
    '<span style="background:{shade}"></span>{name}</label>'
)


def _classes_of(control_type: str | None) -> dict[str, dict[str, Colour]]:
    """Return what is drawn with for images of a type: classes with their colours, in groups by title."""
    if control_type == "palette":
        groups = {"Things": OBJECT_CLASSES, "Places": BACKGROUND_CLASSES}
        return {title: {name: PALETTE[name] for name in names} for title, names in groups.items()}
    if control_type == MASK:
        return {"Paint": {"drawn anew": _WHITE, "kept": _BLACK}}
    thing = {"silhouette": "subject", "edges": "line", "canny": "line"}.get(control_type or "", "white")
    return {"Draw with": {thing: _WHITE, "nothing": _BLACK}}


def canvas_html(
    control_type: str | None, *, width: int, height: int, under: Image.Image | None = None, drawn: str = ""
) -> str:
    """Return the canvas for pictures of a size (px), its tools and classes; ui/sketch.js gives them life.

    The first class draws at first; what is not drawn is beach, or nothing. A picture may lie `under` it, on
    which only what was `drawn` before stands at first.
    """
    shrink, groups, chosen = min(1.0, MAX_SIDE_PX / max(width, height)), Markup(""), Markup(" checked")
    for title, classes in _classes_of(control_type).items():
        swatches = Markup("")
        for name, colour in classes.items():
            swatches += _CLASS.format(shade=_hex(colour), chosen=chosen, name=name)
            chosen = Markup("")
        groups += Markup("<fieldset><legend>{}</legend>{}</fieldset>").format(title, swatches)
    size, paper = (round(width * shrink), round(height * shrink)), Markup("")
    if under is not None:
        address = picture_address(under.resize(size), "WEBP", quality=90)
        paper = Markup(' style="background-image: url({})"').format(address)
    return _CANVAS.format(
        what=_HINTS.get(control_type or "", "Draw here the shape that shall be followed."),
        kind="palette" if control_type == "palette" else "mask",
        ground=_hex(PALETTE["beach"] if control_type == "palette" else _BLACK),
        drawn=Markup("") if under is None else Markup(' data-drawn="{}"').format(drawn),
        under=paper, groups=groups, width=size[0], height=size[1],
    )  # fmt: skip


def read_mask(text: str) -> Image.Image | None:
    """Return what was painted over a start picture (mode L); None where that is nothing."""
    painted = _read_canvas(text, MASK).convert("L") if text else None
    return None if painted is None or painted.getbbox() is None else painted


def read_drawing(text: str, control_type: str | None) -> Image.Image:
    """Return a drawing that a page sent, in exactly the colours of its classes (mode RGB)."""
    drawn = _read_canvas(text, control_type)
    if drawn.getbbox() is None:
        raise ValueError("the canvas is empty, and no drawing is followed; draw the shape, or upload one")
    return drawn


def _read_canvas(text: str, control_type: str | None) -> Image.Image:
    if not text.startswith(_PREFIX):
        raise ValueError("there is no drawing yet; draw something, or upload a control image")
    if len(text) > MAX_DRAWING:
        raise ValueError(f"the drawing is larger than {MAX_DRAWING >> 20} MiB; draw it smaller")
    try:
        drawn = decode_base64(text, _BLACK, max_pixels=MAX_SIDE_PX**2)
    except UnusableFileError:
        raise ValueError("the drawing came damaged from the page; draw again") from None
    classes = {name: colour for group in _classes_of(control_type).values() for name, colour in group.items()}
    return _snapped(drawn, classes, "what can be drawn with here", "drawing")


def read_start(path: Path, strength: float = 1.0) -> Start:
    """Return an upload to begin with, decoded under our limits."""
    image, _ = decode_photo(path, min_side=1, max_pixels=MAX_PIXELS)
    return Start(image, strength=strength, name=path.name)


def _is_photo(picture: Image.Image) -> bool:
    """Say whether a picture is of many tones and a third neither dark nor light, as no drawn shape is."""
    tones = picture.convert("L").histogram()
    return sum(count > 0 for count in tones) > 64 and 3 * sum(tones[32:224]) > sum(tones)


def read_control_upload(
    path: Path, detector: str, *, width: int, height: int, control_type: str | None = None
) -> Image.Image:
    """Return the control image of an upload for pictures of a size (px), decoded under our limits.

    Its middle is taken where the proportions are others; a photo is no image of a type that shows shapes.
    """
    if detector not in DETECTORS:
        raise ValueError("there is no such detector; choose one of those offered")
    background = _WHITE if detector else _BLACK
    photo, alpha = decode_photo(path, background=background, min_side=1, max_pixels=MAX_PIXELS)
    share = min(photo.width / width, photo.height / height)
    inner = max(1, round(width * share)), max(1, round(height * share))
    left, top = (photo.width - inner[0]) // 2, (photo.height - inner[1]) // 2
    box = (left, top, left + inner[0], top + inner[1])
    photo, alpha = photo.crop(box), None if alpha is None else alpha.crop(box)
    if not detector:
        if control_type in _SHAPES and _is_photo(photo.reduce(max(1, min(inner) // 64))):
            shown = f"the upload is a photo, and what is followed here shows {control_type}"
            raise ValueError(f"{shown}; say below what the upload is, and it is drawn from that")
        return photo
    try:
        found = Detector(detector).draw_at(photo, alpha, width=width, height=height)
    except ValueError as error:
        said = str(error)
        is_whole = said.startswith("a control")
        raise ValueError(said if is_whole else f"the upload {said.removeprefix('it ')}") from None
    is_map = detector == "palette"
    return _snapped(found, PALETTE, "the palette of Tiny World", "upload") if is_map else found


def _snapped(image: Image.Image, classes: dict[str, Colour], called: str, what: str) -> Image.Image:
    try:
        return Palette(called, tuple(classes), tuple(classes.values())).snap(image)
    except ValueError as error:
        raise ValueError(f"the {what} {error}") from None


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
