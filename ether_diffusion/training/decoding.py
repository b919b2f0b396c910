"""From a photo's bytes to upright 8-bit sRGB pixels and its alpha, or to one sentence on why not."""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, read_plain_file
from ether_diffusion.wording import printable

MAX_PIXELS = 120_000_000  # above the largest phone cameras' usual 108 million; three bytes each when decoded
MIN_SIDE = 64  # shorter side in px: the resolution of the smallest base model here
MAX_BYTES = 256 * 2**20
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
KINDS = "jpg, png, webp, avif, tiff, gif, bmp"

FIRST_FRAME = "is animated or has several pages; only the first is used"
BAD_EXIF = "has EXIF data that cannot be read; it is taken as upright"
BAD_PROFILE = "has a colour profile that cannot be used; its colours are taken as sRGB"
NO_ADOBE_MARK = "is a CMYK JPEG without Adobe's mark; its inks are taken as not inverted"
CONVERTED, SCALED = "converted to sRGB from its colour profile", "scaled to 8 bits"
LOSSES = (FIRST_FRAME, BAD_EXIF, BAD_PROFILE, NO_ADOBE_MARK)
"""Notes that cost something, so that a warning names the photos."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")  # "JPEG" also opens MPO
_ORIENTATION, _TIFF_BITS, _TIFF_PHOTOMETRIC = 274, 258, 262
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))
"""What undoes each of EXIF's orientations: mirrored, upside down, …; from 5 on the sides change places."""
_PROFILE_SPACES = {"L": {"GRAY", "RGB "}, "RGB": {"RGB "}, "CMYK": {"CMYK"}}
"""Which profiles fit which decoded pixels; gray pixels with an RGB profile are equal R, G and B."""
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_RAW_SUFFIXES = re.compile(r"\.(arw|cr2|cr3|crw|dng|nef|nrw|orf|pef|raf|rw2|srw)", re.IGNORECASE)


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
    path, limits = Path(path), (background, max_pixels, min_side, target_side)
    try:
        decoded = decode_bytes(read_plain_file(path, inside=None, max_bytes=MAX_BYTES), path.suffix, *limits)
    except UnusableFileError as reason:
        raise ValueError(f"{printable(path, NAME_LIMIT)} {reason}") from None
    return decoded.rgb, decoded.mask


def decode_bytes(
    data: bytes,
    suffix: str,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    target_side: int | Callable[[int, int], int] | None = None,
) -> Decoded:
    """Decode what a file holds, whole: nothing less finds a truncated photo; or raise an UnusableFileError.

    `target_side` (px), as in `decode_photo`, may depend on the upright photo's width and height. A JPEG that
    is decoded smaller may have more than `max_pixels`.
    """
    if not data:
        raise UnusableFileError("is empty (0 bytes); fetch it again or delete it")
    if _RAW_SUFFIXES.fullmatch(suffix):  # many are TIFF files that open as their own thumbnail
        raise UnusableFileError("is a camera raw file, which is not read; export it as JPEG or PNG")
    image = _open(data)
    (width, height), found = image.size, f"has {image.width} × {image.height} px"
    is_reducible = target_side is not None and image.format in ("JPEG", "MPO")
    most = MAX_PIXELS if is_reducible else max_pixels
    if width * height > most:
        raise UnusableFileError(f"{found}, over {most / 1e6:g} million pixels; save it smaller")
    if min(image.size) < min_side:
        raise UnusableFileError(f"{found}; the shorter side must have at least {min_side} px")
    notes: tuple[str, ...] = ()
    with _pillow_reading():
        is_animated = getattr(image, "is_animated", False)  # GIF looks into its second frame for that
        if is_animated and image.format != "MPO":  # a phone's photo with a preview or a depth map behind it
            notes = (FIRST_FRAME,)
        if target_side is not None and is_reducible:
            upright = (height, width) if (_orientation(image) or 1) >= 5 else (width, height)
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
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
        alpha = None if alpha is None else alpha.transpose(_TURNS[orientation])
        width, height = (height, width) if orientation >= 5 else (width, height)
    return Decoded(rgb, alpha, (width, height), notes + colour_notes + profile_notes)


def decode_base64(text: str, background: tuple[int, int, int] = WHITE, *, max_pixels: int) -> Image.Image:
    """Decode a picture in base64, which may be a data address, or raise an UnusableFileError."""
    try:
        data = base64.b64decode(re.sub(r"^data:image/\w+;base64,", "", text), validate=True)
    except binascii.Error:
        raise UnusableFileError("is no base64; send a picture's bytes, not where it lies") from None
    return decode_bytes(data, ".png", background, min_side=1, max_pixels=max_pixels).rgb


def _open(data: bytes) -> Image.Image:
    box, formats = data[4 : min(int.from_bytes(data[:4], "big"), 256)], list(_FORMATS)
    # an ISO media file (HEIC, AVIF, MP4) says what it is compatible with
    brands = {box[start : start + 4] for start in range(4, len(box), 4)} if box[:4] == b"ftyp" else set()
    if brands & _HEIC_BRANDS and not brands & {b"avif", b"avis"}:
        if find_spec("pillow_heif") is None:
            raise UnusableFileError("is a HEIC photo; install pillow-heif or convert it to JPEG")
        import_module("pillow_heif").register_heif_opener()
        formats = ["HEIF"]
    with _pillow_reading(), suppress(UnidentifiedImageError):
        return Image.open(io.BytesIO(data), formats=formats)
    found = f"is no image that can be read ({KINDS}): it begins with {data[:20]!r}"
    raise UnusableFileError(f"{found}; fetch it again, save it as JPEG or PNG, or take it away")


@contextmanager
def _pillow_reading() -> Iterator[None]:
    """Turn what Pillow raises on a strange file into a refusal; its warnings say less than our checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError:  # Pillow's own limit was met before ours could be
            raise UnusableFileError(
                f"has over {MAX_PIXELS // 10**6} million pixels; save it smaller"
            ) from None
        except Exception as error:  # its decoders raise anything at all; nothing but Pillow runs inside
            said = printable(str(error) or type(error).__name__)
            raise UnusableFileError(f"is cut short or damaged ({said}); fetch or save it again") from None


def _orientation(image: Image.Image) -> int | None:
    """Return EXIF's orientation, 1 where there is none, None where EXIF is broken."""
    with suppress(UnusableFileError), _pillow_reading():
        return int(image.getexif().get(_ORIENTATION, 1))
    return None


# colours: scaled, never clipped or guessed


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    """Return 8-bit colour (modes L, RGB or CMYK), alpha (mode L) or None, and notes on what was done."""
    mode, has_key = image.mode, "transparency" in image.info
    if mode.startswith("I;16"):
        return *_scale_16_bits(image), (SCALED,)
    if mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also where either is NaN
            found = f"holds floating-point pixels from {low:g} to {high:g}, whose white is not known"
            raise UnusableFileError(f"{found}; scale them to [0, 1] or save it as 16-bit")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)), None, (SCALED,)
    if mode in ("LA", "La"):
        gray, alpha = image.convert("LA").split()
        return gray, alpha, ()
    if mode in ("RGBA", "RGBa", "PA") or has_key:
        layer = (image.convert("L") if mode == "1" else image).convert("RGBA")
        return layer.convert("RGB"), layer.getchannel("A"), ()
    if mode in ("1", "L", "P", "RGB", "RGBX", "YCbCr"):
        return image.convert("L" if mode in ("1", "L") else "RGB"), None, ()
    if mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return ImageChops.invert(image), None, (NO_ADOBE_MARK,)  # Pillow inverts them all
    if mode == "CMYK":
        return image, None, ()
    raise UnusableFileError(
        f"holds pixels of a kind that is not read (mode {mode}); save it as 8- or 16-bit RGB"
    )


def _scale_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Scale [0, white] to [0, 255] by a table; white is 65535, or less where a TIFF says fewer bits."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** min(16, *tags.get(_TIFF_BITS, (16,))) - 1
    table = ((np.minimum(np.arange(65536), white) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # zero is white, which Pillow passes over at this depth
        table = 255 - table
    values, key = np.asarray(image), image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(table[values]), alpha


def _to_srgb(colour: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Return RGB in sRGB, and notes; a profile that is broken or of another colour space is not used."""
    if not profile:
        return colour.convert("RGB"), ()
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space in _PROFILE_SPACES[colour.mode]:
            converted = ImageCms.profileToProfile(
                colour.convert("RGB") if space == "RGB " else colour,
                source,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            assert converted is not None  # only in-place conversion returns None
            return converted, (CONVERTED,)
    return colour.convert("RGB"), (BAD_PROFILE,)
