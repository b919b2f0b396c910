"""From whatever a decoder gives to 8-bit sRGB and an alpha channel: scaled, never clipped or guessed."""

import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

from ether_diffusion.training.plain_files import UnusableFileError

CONVERTED = "converted to sRGB from its colour profile"
SCALED = "scaled to 8 bits"
BAD_PROFILE = "has a colour profile that cannot be used; its colours are taken as sRGB"
NO_ADOBE_MARK = "is a CMYK JPEG without Adobe's mark; its inks are taken as not inverted"

_SPACES = {"L": {"GRAY", "RGB "}, "RGB": {"RGB "}, "CMYK": {"CMYK"}}
"""Which profiles fit which decoded pixels; gray pixels with an RGB profile are equal R, G and B."""

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
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
    if image.mode == "CMYK":
        return _upright_inks(image)
    raise UnusableFileError(
        f"holds pixels of a kind that is not read (mode {image.mode}); save it as 8- or 16-bit RGB"
    )


def to_srgb(colour: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Return RGB in sRGB, and notes; `colour` is of mode L, RGB or CMYK, described by an ICC profile or none.

    A profile that is broken, or of another colour space than the pixels, is noted and not used.
    """
    if not profile:
        return colour.convert("RGB"), ()
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space not in _SPACES[colour.mode]:
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


def _upright_inks(image: Image.Image) -> tuple[Image.Image, None, tuple[str, ...]]:
    """Undo Pillow's inversion where no Adobe mark in the JPEG asks for it."""
    if image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return ImageChops.invert(image), None, (NO_ADOBE_MARK,)
    return image, None, ()
