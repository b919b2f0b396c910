"""Palettes: which colours of a segmentation map stand for which classes, and what is none of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field

from ether_diffusion.strict_json import Json, read_json, validate
from ether_diffusion.wording import printable

_Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[_Channel, _Channel, _Channel]

TOLERANCE = 8
"""How far, of 255 in each channel, a colour may be from its class's, as lossy files leave it."""
MAX_CLASSES = 1024
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Palette:
    """The colours of classes, each of one class, from 1 to MAX_CLASSES of them."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.colours) <= MAX_CLASSES:
            raise ValueError(f"{self.name} has {len(self.colours)} colours; use from 1 to {MAX_CLASSES}")
        owners: dict[Colour, str] = {}
        for name, colour in zip(self.classes, self.colours, strict=True):
            other = owners.setdefault(colour, name)
            if other != name:
                both = f"{printable(other)} and {printable(name)}"
                raise ValueError(f"{self.name} gives {both} the same colour {_hex(colour)}; give each one")

    def snap(self, picture: Image.Image) -> Image.Image:
        """Return an RGB map in exactly the palette's colours: each pixel's nearest within `TOLERANCE`.

        Other colours in it are a ValueError, whose message follows the file's name.
        """
        pixels = np.asarray(picture).reshape(-1, 3).astype(np.int32)
        packed = (pixels[:, 0] << 16) | (pixels[:, 1] << 8) | pixels[:, 2]
        found, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
        unpacked, table = np.stack([found >> 16, found >> 8 & 255, found & 255], -1), np.array(self.colours)
        nearest, is_off = np.empty(len(found), dtype=np.int64), np.empty(len(found), dtype=bool)
        for start in range(0, len(found), 4096):  # a photo in place of a map has a million colours
            part = slice(start, start + 4096)
            distance = np.abs(unpacked[part, None] - table).max(-1)
            nearest[part], is_off[part] = distance.argmin(-1), distance.min(-1) > TOLERANCE
        if is_off.any():
            colours, times = unpacked[is_off], counts[is_off]
            most = [f"{_hex(colours[i])} ({times[i]} px)" for i in np.argsort(-times, kind="stable")[:3]]
            shown = ", ".join(most) + (f" and {len(times) - 3} more" if len(times) > 3 else "")
            raise ValueError(
                f"has {len(times)} colours off {self.name}, in {times.sum()} of {len(pixels)} px: "
                f"{shown}; paint in its colours, to within {TOLERANCE} of 255, without smooth edges"
            )
        snapped = table[nearest][places].astype(np.uint8)
        return Image.fromarray(snapped.reshape(picture.height, picture.width, 3))


def read_palette(path: str | Path) -> Palette:
    """Read a JSON file of class names and their colours, [red, green, blue] or "#rrggbb"."""
    path, where = Path(path), f"the palette {printable(path)}"
    if not path.exists():
        raise FileNotFoundError(f"{where} does not exist; give a JSON file of class names and colours")
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{where} is no file of at most {MAX_BYTES} bytes; give a JSON file of colours")
    return palette_of(read_json(path.read_bytes(), dict[str, Any], where), where)


def palette_of(values: Mapping[str, Json], name: str) -> Palette:
    """Return the palette of class names and colours."""
    colours = validate(dict(values), dict[str, Annotated[Colour, BeforeValidator(_channels)]], name)
    return Palette(name, tuple(colours), tuple(colours.values()))


def _channels(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError(f'is {printable(value)}; write [red, green, blue] from 0 to 255 or "#rrggbb"')
        return tuple(bytes.fromhex(value[1:]))
    return tuple(value) if isinstance(value, list) else value


def _hex(colour: "Colour | np.ndarray") -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in colour)
