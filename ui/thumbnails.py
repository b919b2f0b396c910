"""Small pictures inside the page itself, as the folders that they lie in cannot be read through a browser."""

import base64
import io
import threading
from collections import OrderedDict
from pathlib import Path

from PIL import Image

MAX_KEPT = 512
"""Encoded pictures that are remembered."""


class Thumbnails:
    """Encodes pictures of ours as data addresses, each once until its file changes."""

    def __init__(self, side: int) -> None:
        """Remember nothing yet; `side` is the longer side in px, and smaller pictures stay as they are."""
        self._side = side
        self._known: OrderedDict[tuple[Path, int, int], str] = OrderedDict()
        self._lock = threading.Lock()

    def address(self, path: Path) -> str | None:
        """Return a picture as a data address; None where it is gone or half written."""
        try:
            status = path.stat()
            key = (path, status.st_mtime_ns, status.st_size)
            with self._lock:
                if key in self._known:
                    self._known.move_to_end(key)
                    return self._known[key]
            address = self._encode(path)
        except OSError:  # Pillow's errors on damaged files are among these
            return None
        with self._lock:
            self._known[key] = address
            while len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        return address

    def _encode(self, path: Path) -> str:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        small.save(buffer, format="WEBP", quality=85)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
