"""Control images: what says where in each photo, a file of the same stem in a folder of its own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.training.data.companions import check_proportions, find_companions
from ether_diffusion.training.data.sources import FileSource, read_again
from ether_diffusion.training.decoding import MAX_PIXELS, decode_bytes
from ether_diffusion.training.photos import Photo

BLACK = (0, 0, 0)


@dataclass(frozen=True)
class ControlFile:
    """A picture that says where things are in its photo."""

    source: FileSource
    sha256: str

    def decode(self) -> Image.Image:
        """Return the control image (mode RGB), what is transparent over black.

        Raises:
            ValueError: the file is gone, or another than was checked.
        """
        path = self.source.path
        return _decode(read_again(self.source, path.name, self.sha256), path.suffix)


def find_controls(
    folder: str | Path, photos: Sequence[Photo], *, follow_symlinks: bool = False
) -> tuple[list[ControlFile | None], list[str]]:
    """Return each photo's control image, and a sentence for each photo without a usable one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    return find_companions(folder, photos, _check, word="control image", follow_symlinks=follow_symlinks)


def _check(source: FileSource, photo: Photo) -> ControlFile:
    data = source.read()
    check_proportions(_decode(data, source.path.suffix).size, photo)
    return ControlFile(source, hashlib.sha256(data).hexdigest())


def _decode(data: bytes, suffix: str) -> Image.Image:
    decoded = decode_bytes(
        data, suffix, background=BLACK, max_pixels=MAX_PIXELS, min_side=1, target_side=None
    )
    return decoded.rgb
