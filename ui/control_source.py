"""Where a control image of the page comes from: a drawing, an uploaded one, or a photo with a detector."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.adapters import read_adapter
from ether_diffusion.control import Detector
from ether_diffusion.control.palette import Palette
from ether_diffusion.tiny_world.world import PALETTE
from ether_diffusion.training import decode_photo

DETECTORS = {
    "": "A control image, taken as it is",
    "canny": "A photo: its edges (canny)",
    "silhouette": "A cut-out: its shape (silhouette)",
    "palette": "A map of classes (palette)",
}
"""What an upload can be, by the name of the detector."""
MAX_PIXELS = 50_000_000
"""Of an upload: a phone's photo, and three times the largest picture that is drawn."""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Follower:
    """What an adapter follows: the type of its control images, and whether it changes the UNet, too."""

    control_type: str | None
    has_adapter: bool


def follower_of(folder: Path) -> Follower:
    """Read what the adapter in a folder follows.

    Raises:
        FileNotFoundError, ValueError: it is damaged, or follows nothing.
    """
    adapter = read_adapter(folder)
    if adapter.encoder is None:
        raise ValueError("this adapter follows no control image; choose one that was trained with control")
    return Follower(adapter.encoder.config.control_type, bool(adapter.parts))


def read_control_upload(path: Path, detector: str, *, width: int, height: int) -> Image.Image:
    """Return the control image of an upload for pictures of a size (px), decoded under our limits.

    Raises:
        ValueError: it is no image, has other proportions, or the detector cannot use it.
    """
    if detector not in DETECTORS:
        raise ValueError("there is no such detector; choose one of those offered")
    if not detector:
        return decode_photo(path, background=_BLACK, min_side=1, max_pixels=MAX_PIXELS)[0]
    photo, alpha = decode_photo(path, background=_WHITE, min_side=1, max_pixels=MAX_PIXELS)
    try:
        found = Detector(detector).draw_at(photo, alpha, width=width, height=height)
        if detector == "palette":
            classes = Palette("the palette of Tiny World", tuple(PALETTE), tuple(PALETTE.values()))
            return classes.snap(found)
    except ValueError as error:
        words = str(error)
        raise ValueError(
            words if words.startswith("a control") else f"the upload {_without_it(words)}"
        ) from None
    return found


def _without_it(words: str) -> str:
    return words.removeprefix("it ")
