"""What a control map expects of each pixel: a class by its colour, or object and background."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.control.images import as_picture
from ether_diffusion.control.palette import Palette
from ether_diffusion.metrics.overlap import IGNORED
from ether_diffusion.tiny_world.control import PALETTE
from ether_diffusion.wording import listed

SILHOUETTE_CLASSES = ("background", "object")
_BLACK = (0, 0, 0)
_NOTHING_KNOWN = ""


def tiny_palette() -> Palette:
    """Return the colours of Tiny World's classes."""
    return Palette("the palette of Tiny World", tuple(PALETTE), tuple(PALETTE.values()))


def check_classes(palette: Palette, classes: Sequence[str]) -> None:
    """Refuse a palette of classes that a segmenter does not find.

    Raises:
        ValueError: it has some; they are named.
    """
    unknown = sorted(set(palette.classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{palette.name} has {listed(unknown)}, which the segmenter does not know; use its labels, as "
            f"{', '.join(list(classes)[:3])}"
        )


def classes_of(image: Image.Image, palette: Palette, classes: Sequence[str]) -> Tensor:
    """Return the index in `classes` of each pixel (height, width) of a map in a palette's colours.

    Black means that nothing is known, unless it is a class's colour: `IGNORED`.

    Raises:
        ValueError: the map has colours that are not the palette's; the message follows its name.
    """
    if _BLACK not in palette.colours:
        names, colours = (*palette.classes, _NOTHING_KNOWN), (*palette.colours, _BLACK)
        palette = replace(palette, classes=names, colours=colours)
    pixels = np.asarray(palette.snap(as_picture(image)), dtype=np.int64)
    codes = _codes(pixels)
    colours_found, places = np.unique(codes, return_inverse=True)
    numbers = {
        int(code): classes.index(name) if name else IGNORED
        for name, code in zip(palette.classes, _codes(np.array(palette.colours)), strict=True)
    }
    table = np.array([numbers[int(code)] for code in colours_found])
    return torch.from_numpy(table[places.reshape(codes.shape)])


def silhouette_of(image: Image.Image) -> Tensor:
    """Return the index in `SILHOUETTE_CLASSES` of each pixel (height, width): white is the object."""
    light = np.asarray(as_picture(image).convert("L"), dtype=np.int64)
    return torch.from_numpy((light >= 128).astype(np.int64))


def edges_of(image: Image.Image) -> Tensor:
    """Return the white lines of a map of edges: bool (height, width)."""
    return silhouette_of(image) == 1


def _codes(colours: np.ndarray) -> np.ndarray:
    """Return colours (…, 3) as one number each."""
    codes: np.ndarray = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    return codes
