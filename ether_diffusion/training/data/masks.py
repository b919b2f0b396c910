"""Masks: which part of a photo the loss sees, from its alpha or from a folder of masks of the same names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.training.data.companions import check_proportions, find_companions
from ether_diffusion.training.data.sources import FileSource, read_again
from ether_diffusion.training.decoding import MAX_PIXELS, decode_bytes
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import UnusableFileError

BLACK = (0, 0, 0)


@dataclass(frozen=True)
class MaskFile:
    """A picture that is white where the loss sees the photo, and black or transparent where it does not."""

    source: FileSource
    sha256: str

    def decode(self) -> Image.Image:
        """Return the mask (mode L).

        Raises:
            ValueError: the file is gone, or another than was checked.
        """
        path = self.source.path
        return _decode(read_again(self.source, path.name, self.sha256), path.suffix)


def find_masks(
    folder: str | Path, photos: Sequence[Photo], *, follow_symlinks: bool = False
) -> tuple[list[MaskFile | None], list[str]]:
    """Return each photo's mask, a file of the same stem, and a sentence for each photo without a usable one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    return find_companions(folder, photos, _check, word="mask", follow_symlinks=follow_symlinks)


def _check(source: FileSource, photo: Photo) -> MaskFile:
    data = source.read()
    mask = _decode(data, source.path.suffix)
    check_proportions(mask.size, photo)
    if mask.getextrema()[1] == 0:
        raise UnusableFileError("is black everywhere, so that nothing is learned; paint the subject white")
    return MaskFile(source, hashlib.sha256(data).hexdigest())


def _decode(data: bytes, suffix: str) -> Image.Image:
    decoded = decode_bytes(
        data, suffix, background=BLACK, max_pixels=MAX_PIXELS, min_side=1, target_side=None
    )
    return decoded.rgb.convert("L")
