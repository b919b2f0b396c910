"""From a photo's bytes to upright 8-bit sRGB pixels and a mask, or to one sentence on why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ether_diffusion.training.foreign_files import AVIF_BRANDS, HEIC_BRANDS, brands, foreign_kind, refuse_raw
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, read_plain_file
from ether_diffusion.training.srgb import split_alpha, to_srgb
from ether_diffusion.wording import printable

MAX_PIXELS = 120_000_000
"""Above the largest phone cameras' usual 108 million; three bytes each when decoded."""
MIN_SIDE = 64
"""Shorter side in px: the resolution of the smallest base model here."""
MAX_BYTES = 256 * 2**20
WHITE = (255, 255, 255)
KINDS = "jpg, png, webp, avif, tiff, gif, bmp"

FIRST_FRAME = "is animated; only its first frame is used"
FIRST_PAGE = "has several pages; only the first is used"
BAD_EXIF = "has EXIF data that cannot be read; it is taken as upright"

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")  # "JPEG" also opens MPO
_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.32, tag 274: what turns stored pixels into what the camera saw."""


@dataclass(frozen=True)
class Decoded:
    """A decoded photo; `size` (width, height) in px is the upright photo's, before any reduction."""

    rgb: Image.Image
    mask: Image.Image | None
    size: tuple[int, int]
    notes: tuple[str, ...]


def decode_photo(
    path: str | Path,
    *,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    target_side: int | None = None,
) -> tuple[Image.Image, Image.Image | None]:
    """Return a photo's upright sRGB pixels (mode RGB), and its alpha (mode L) where any of it is not opaque.

    Transparent parts are laid over `background`. Given a `target_side` (px), a JPEG is decoded at the
    smallest of 1/1, 1/2, 1/4 and 1/8 of its size whose shorter side is no less.

    Raises:
        ValueError: it is not a photo that can be used; the message says why and what to do.
    """
    path = Path(path)
    try:
        data = read_plain_file(path, inside=None, max_bytes=MAX_BYTES)
        decoded = decode_bytes(
            data,
            path.suffix,
            background=background,
            max_pixels=max_pixels,
            min_side=min_side,
            target_side=target_side,
        )
    except UnusableFileError as reason:
        raise ValueError(f"{printable(path, NAME_LIMIT)} {reason}") from None
    return decoded.rgb, decoded.mask


def decode_bytes(
    data: bytes,
    suffix: str,
    *,
    background: tuple[int, int, int],
    max_pixels: int,
    min_side: int,
    target_side: int | None,
) -> Decoded:
    """Decode what a file holds, whole: nothing less finds a truncated photo.

    Raises:
        UnusableFileError: it is not a photo that can be used.
    """
    if not data:
        raise UnusableFileError("is empty (0 bytes); fetch it again or delete it")
    refuse_raw(suffix)
    image = _open(data, max_pixels)
    _check_size(image.size, max_pixels, min_side)
    width, height = image.size
    notes = _notes_on_frames(image)
    with _pillow_reading():
        if target_side is not None:
            image.draft(image.mode, (target_side, target_side))
        image.load()
    orientation = _orientation(image)
    if orientation is None:
        notes += (BAD_EXIF,)
    _refuse_wide_key(data, image)
    colour, alpha, colour_notes = split_alpha(image)
    rgb, profile_notes = to_srgb(colour, image.info.get("icc_profile"))
    rgb, mask = _composite(rgb, alpha, background)
    if orientation in _TO_UPRIGHT:
        rgb = rgb.transpose(_TO_UPRIGHT[orientation])
        mask = None if mask is None else mask.transpose(_TO_UPRIGHT[orientation])
        width, height = (height, width) if orientation >= 5 else (width, height)
    return Decoded(rgb, mask, (width, height), notes + colour_notes + profile_notes)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    formats: tuple[str, ...] = _FORMATS
    if brands(data) & HEIC_BRANDS and not brands(data) & AVIF_BRANDS:
        formats = _heic_formats()
    try:
        with _pillow_reading():
            return Image.open(io.BytesIO(data), formats=formats)
    except _TooManyPixelsError:
        raise UnusableFileError(f"has over {max_pixels / 1e6:g} million pixels; save it smaller") from None
    except UnusableFileError:
        kind = foreign_kind(data)
        if kind is None:
            raise
        raise UnusableFileError(kind) from None


def _heic_formats() -> tuple[str, ...]:
    if find_spec("pillow_heif") is None:
        raise UnusableFileError("is a HEIC photo; install pillow-heif or convert it to JPEG")
    import_module("pillow_heif").register_heif_opener()
    return ("HEIF",)


class _TooManyPixelsError(UnusableFileError):
    """Pillow's own limit was met before ours could be."""


@contextmanager
def _pillow_reading() -> Iterator[None]:
    """Turn what Pillow raises on a strange file into a refusal.

    Its decoders raise anything at all there (OSError, SyntaxError, struct.error, KeyError …), hence the
    breadth; nothing but Pillow runs inside. Its warnings say less than the checks here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError:
            raise _TooManyPixelsError("has too many pixels; save it smaller") from None
        except Exception as error:
            raise UnusableFileError(_why_not_read(error)) from None


def _why_not_read(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image that can be read ({KINDS}), or its header is broken; fetch or save it again"
    if "Decompressed data too large" in str(error):
        return "holds more compressed metadata than any photo needs; save it again without metadata"
    if "truncated" in str(error).lower():
        return "is cut short or damaged inside; fetch it again"
    return f"is broken ({printable(str(error) or type(error).__name__)}); fetch or save it again"


def _check_size(size: tuple[int, int], max_pixels: int, min_side: int) -> None:
    shown = f"{size[0]} × {size[1]} px"
    if size[0] * size[1] > max_pixels:
        raise UnusableFileError(f"has {shown}, over {max_pixels / 1e6:g} million pixels; save it smaller")
    if min(size) < min_side:
        raise UnusableFileError(f"has {shown}; the shorter side must have at least {min_side} px")


def _refuse_wide_key(data: bytes, image: Image.Image) -> None:
    """Pillow cuts 16-bit colours to 8 bits, but not the one that stands for transparent: they never meet."""
    bit_depth = data[24] if image.format == "PNG" else 8  # PNG 1.2, 11.2.2: IHDR is always first
    if bit_depth == 16 and image.mode == "RGB" and "transparency" in image.info:
        raise UnusableFileError("is a 16-bit PNG with one transparent colour; save it with an alpha channel")


def _notes_on_frames(image: Image.Image) -> tuple[str, ...]:
    with _pillow_reading():
        is_animated = bool(getattr(image, "is_animated", False))  # GIF looks into its second frame for that
    if not is_animated or image.format == "MPO":  # a phone's photo with a preview or a depth map behind it
        return ()
    return (FIRST_PAGE if image.format == "TIFF" else FIRST_FRAME,)


def _orientation(image: Image.Image) -> int | None:
    """Return EXIF's orientation, 1 where there is none, None where EXIF is broken. Call it after `load`:

    PNG may hold EXIF behind the pixels, and Pillow turns TIFF upright by itself while loading."""
    try:
        with _pillow_reading():
            return int(image.getexif().get(_ORIENTATION, 1))
    except UnusableFileError:
        return None


def _composite(
    rgb: Image.Image, alpha: Image.Image | None, background: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image | None]:
    """Lay the photo over the background; where alpha is 0, nothing of the hidden colour is left."""
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb, None
    if alpha.getextrema() == (0, 0):
        raise UnusableFileError("is wholly transparent; there is nothing in it to learn")
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha), alpha
