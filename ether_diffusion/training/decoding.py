"""From a photo's bytes to upright 8-bit sRGB pixels and its alpha, or to one sentence on why not."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, read_plain_file
from ether_diffusion.wording import printable

MAX_PIXELS = 120_000_000
"""Above the largest phone cameras' usual 108 million; three bytes each when decoded."""
MIN_SIDE = 64
"""Shorter side in px: the resolution of the smallest base model here."""
MAX_BYTES = 256 * 2**20
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
KINDS = "jpg, png, webp, avif, tiff, gif, bmp"

FIRST_FRAME = "is animated; only its first frame is used"
FIRST_PAGE = "has several pages; only the first is used"
BAD_EXIF = "has EXIF data that cannot be read; it is taken as upright"
BAD_PROFILE = "has a colour profile that cannot be used; its colours are taken as sRGB"
NO_ADOBE_MARK = "is a CMYK JPEG without Adobe's mark; its inks are taken as not inverted"
CONVERTED = "converted to sRGB from its colour profile"
SCALED = "scaled to 8 bits"
LOSSES = (FIRST_FRAME, FIRST_PAGE, BAD_EXIF, BAD_PROFILE, NO_ADOBE_MARK)
"""Notes that cost something, so that a warning names the photos."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")  # "JPEG" also opens MPO
_ORIENTATION, _TIFF_BITS, _TIFF_PHOTOMETRIC = 274, 258, 262
_PROFILE_SPACES = {"L": {"GRAY", "RGB "}, "RGB": {"RGB "}, "CMYK": {"CMYK"}}
"""Which profiles fit which decoded pixels; gray pixels with an RGB profile are equal R, G and B."""

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_AVIF_BRANDS = {b"avif", b"avis"}
_RAW_SUFFIXES = re.compile(r"\.(arw|cr2|cr3|crw|dng|nef|nrw|orf|pef|raf|rw2|srw)", re.IGNORECASE)
_EXPORT = "export it as JPEG or PNG"
_OPENINGS = {
    b"%PDF": f"is a PDF document; {_EXPORT}",
    b"8BPS": f"is a Photoshop document; {_EXPORT}",
    b"PK\x03\x04": "is a zip archive; unpack it and give the folder",
    b"\x1f\x8b": "is a gzip archive; unpack it and give the folder",
    b"\x1aE\xdf\xa3": "is a video; save frames of it as PNG",
    b"\x00\x00\x00\x0cjP  ": f"is a JPEG 2000 image, which is not read; {_EXPORT}",
    b"\x00\x00\x00\x0cJXL ": f"is a JPEG XL image, which is not read; {_EXPORT}",
    b"\xff\x0a": f"is a JPEG XL image, which is not read; {_EXPORT}",
}


@dataclass(frozen=True)
class Decoded:
    """A decoded photo; `size` (width, height) in px is the upright photo's, before any reduction.

    `mask` is its alpha (mode L), None where all of it is opaque.
    """

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
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    target_side: int | Callable[[int, int], int] | None = None,
) -> Decoded:
    """Decode what a file holds, whole: nothing less finds a truncated photo.

    `target_side` (px), as in `decode_photo`, may depend on the upright photo's width and height.

    Raises:
        UnusableFileError: it is not a photo that can be used.
    """
    if not data:
        raise UnusableFileError("is empty (0 bytes); fetch it again or delete it")
    if _RAW_SUFFIXES.fullmatch(suffix):  # many are TIFF files that open as their own thumbnail
        raise UnusableFileError(f"is a camera raw file, which is not read; {_EXPORT}")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:g} million pixels"
        raise UnusableFileError(f"has {width} × {height} px, over {limit}; save it smaller")
    if min(image.size) < min_side:
        needed = f"the shorter side must have at least {min_side} px"
        raise UnusableFileError(f"has {width} × {height} px; {needed}")
    notes: tuple[str, ...] = ()
    with _pillow_reading():
        is_animated = getattr(image, "is_animated", False)  # GIF looks into its second frame for that
        if is_animated and image.format != "MPO":  # a phone's photo with a preview or a depth map behind it
            notes = (FIRST_PAGE if image.format == "TIFF" else FIRST_FRAME,)
        if target_side is not None and image.format in ("JPEG", "MPO"):
            is_turned = (_orientation(image) or 1) >= 5
            upright = (height, width) if is_turned else (width, height)
            side = target_side if isinstance(target_side, int) else target_side(*upright)
            image.draft(image.mode, (side, side))
        image.load()
    # after loading: PNG may hold EXIF behind the pixels, and Pillow turns TIFF upright by itself
    orientation = _orientation(image)
    if orientation is None:
        notes += (BAD_EXIF,)
    bit_depth = data[24] if image.format == "PNG" else 8  # PNG 1.2, 11.2.2: IHDR is always first
    if bit_depth == 16 and image.mode == "RGB" and "transparency" in image.info:
        # Pillow cuts 16-bit colours to 8 bits, but not the one that stands for transparent: they never meet
        raise UnusableFileError("is a 16-bit PNG with one transparent colour; save it with an alpha channel")
    colour, alpha, colour_notes = _split_alpha(image)
    rgb, profile_notes = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None and alpha.getextrema() == (0, 0):
        raise UnusableFileError("is wholly transparent; there is nothing in it to learn")
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    if alpha is not None:  # where it is 0, nothing of the hidden colour is left
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    if orientation is not None and 2 <= orientation <= 8:
        rgb = _turned(rgb, orientation)
        alpha = None if alpha is None else _turned(alpha, orientation)
        width, height = (height, width) if orientation >= 5 else (width, height)
    return Decoded(rgb, alpha, (width, height), notes + colour_notes + profile_notes)


def _open(data: bytes) -> Image.Image:
    formats: tuple[str, ...] = _FORMATS
    if _brands(data) & _HEIC_BRANDS and not _brands(data) & _AVIF_BRANDS:
        if find_spec("pillow_heif") is None:
            raise UnusableFileError("is a HEIC photo; install pillow-heif or convert it to JPEG")
        import_module("pillow_heif").register_heif_opener()
        formats = ("HEIF",)
    try:
        with _pillow_reading():
            return Image.open(io.BytesIO(data), formats=formats)
    except UnusableFileError as reason:
        raise UnusableFileError(_foreign_kind(data) or str(reason)) from None


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
        except Image.DecompressionBombError:  # Pillow's own limit was met before ours could be
            limit = f"{MAX_PIXELS / 1e6:g} million pixels"
            raise UnusableFileError(f"has over {limit}; save it smaller") from None
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


def _orientation(image: Image.Image) -> int | None:
    """Return EXIF's orientation, 1 where there is none, None where EXIF is broken."""
    try:
        with _pillow_reading():
            return int(image.getexif().get(_ORIENTATION, 1))
    except UnusableFileError:
        return None


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    picture.info = {}
    picture.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(picture)


# colours: scaled, never clipped or guessed


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    """Return 8-bit colour (modes L, RGB or CMYK), alpha (mode L) or None, and notes on what was done.

    Raises:
        UnusableFileError: the pixels have no stated white, or a mode that has no sRGB meaning here.
    """
    if image.mode.startswith("I;16"):
        return *_scale_16_bits(image), (SCALED,)
    if image.mode == "F":
        return _scale_floats(image), None, (SCALED,)
    if image.mode in ("LA", "La"):
        gray, alpha = image.convert("LA").split()
        return gray, alpha, ()
    if image.mode == "1" and "transparency" in image.info:
        image = image.convert("L")
    if image.mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        *colours, alpha = image.convert("RGBA").split()
        return Image.merge("RGB", colours), alpha, ()
    if image.mode in ("1", "L"):
        return image.convert("L"), None, ()
    if image.mode in ("P", "RGB", "RGBX", "YCbCr"):
        return image.convert("RGB"), None, ()
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return ImageChops.invert(image), None, (NO_ADOBE_MARK,)  # Pillow inverts them all
    if image.mode == "CMYK":
        return image, None, ()
    raise UnusableFileError(
        f"holds pixels of a kind that is not read (mode {image.mode}); save it as 8- or 16-bit RGB"
    )


def _to_srgb(colour: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Return RGB in sRGB, and notes; `colour` is of mode L, RGB or CMYK, described by an ICC profile or none.

    A profile that is broken, or of another colour space than the pixels, is noted and not used.
    """
    if not profile:
        return colour.convert("RGB"), ()
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space not in _PROFILE_SPACES[colour.mode]:
            return colour.convert("RGB"), (BAD_PROFILE,)
        converted = ImageCms.profileToProfile(
            colour.convert("RGB") if space == "RGB " else colour,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return colour.convert("RGB"), (BAD_PROFILE,)
    assert converted is not None  # only in-place conversion returns None
    return converted, (CONVERTED,)


def _scale_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Scale [0, white] to [0, 255] by a table; white is 65535, or less where a TIFF says fewer bits."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** min(16, *tags.get(_TIFF_BITS, (16,))) - 1
    table = ((np.minimum(np.arange(65536), white) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # zero is white, which Pillow passes over at this depth
        table = 255 - table
    values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(table[values]), alpha


def _scale_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also where either is NaN
        raise UnusableFileError(
            f"holds floating-point pixels from {low:g} to {high:g}, whose white is not known; "
            "scale them to [0, 1] or save it as 16-bit"
        )
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


# what is no photo: named, so that its owner knows what to do about it


def _brands(data: bytes) -> set[bytes]:
    """Return the brands an ISO media file (HEIC, AVIF, MP4) declares; none for other files."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return {box[start : start + 4] for start in (0, *range(8, len(box), 4))}


def _foreign_kind(data: bytes) -> str | None:
    """Say what a file is that no image decoder knows, None where it opens like a photo that may be broken."""
    for opening, kind in _OPENINGS.items():
        if data.startswith(opening):
            return kind
    if _brands(data) and not _brands(data) & (_AVIF_BRANDS | _HEIC_BRANDS):
        return "is a video or an image of a kind that is not read; save frames of it as PNG"
    text = data[:4096].decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    if "<svg" in text and text.startswith(("<svg", "<?xml", "<!--", "<!doctype svg")):
        return "is a vector file (SVG), which is not supported; export it as PNG"
    if text.startswith(("<!doctype html", "<html")):
        return "is not an image but an HTML page, as a failed download leaves; fetch the photo again"
    if text and all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return "is not an image but text; delete it or move it away"
    return None
