"""Small pictures: as PNG beside photos and adapters, and inside the page, which cannot read those folders."""

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ether_diffusion.training.decoding import decode_bytes

SIDE = 256
"""Longer side of a thumbnail's file, in px."""


def thumbnail_png(data: bytes, suffix: str) -> bytes:
    """Return a small PNG of a picture that was uploaded or drawn, decoded under our limits.

    Raises:
        UnusableFileError: it is no picture that can be used.
    """
    decoded = decode_bytes(data, suffix, min_side=1, target_side=SIDE)
    small, buffer = decoded.rgb.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "PNG")
    return buffer.getvalue()


def data_address(path: Path, side: int) -> str | None:
    """Return a picture of ours, `side` px at most, as a data address; None if gone or half written."""
    try:
        status = path.stat()
        return _encoded(path, side, status.st_mtime_ns, status.st_size)
    except OSError:  # Pillow's errors on damaged files are among these
        return None


@lru_cache(maxsize=512)
def _encoded(path: Path, side: int, time: int, size: int) -> str:
    """Encode a file, once until it changes."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
