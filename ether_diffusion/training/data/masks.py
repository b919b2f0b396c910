"""Masks: which part of a photo the loss sees, from its alpha or from a folder of masks of the same names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.adapter_file.wording import listed, printable
from ether_diffusion.training.data.sources import FileSource, read_again
from ether_diffusion.training.decoding import MAX_PIXELS, decode_bytes
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, list_files

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
    by_stem: dict[str, list[Path]] = {}
    for path in list_files(folder, "the masks"):
        by_stem.setdefault(path.stem, []).append(path)
    inside = None if follow_symlinks else Path(folder)
    masks: list[MaskFile | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for photo in photos:
        paths = by_stem.get(photo.path.stem, [])
        mask = None
        if not paths:
            missing.append(photo.path.name)
        elif len(paths) > 1:
            names = listed(path.name for path in paths)
            problems.append(f"{_shown(photo.path)} has several masks, {names}; keep one")
        else:
            try:
                mask = _check(FileSource(paths[0], inside), photo)
            except UnusableFileError as reason:
                problems.append(f"the mask {_shown(paths[0])} {reason}")
        masks.append(mask)
    if missing:
        problems.append(
            f"{len(missing)} photos have no mask in {_shown(folder)}: {listed(missing, len(missing))}; "
            "add files of the same names, such as dog.png for dog.jpg"
        )
    return masks, problems


def _check(source: FileSource, photo: Photo) -> MaskFile:
    data = source.read()
    mask = _decode(data, source.path.suffix)
    width, height = mask.size
    if abs(width * photo.height - height * photo.width) > max(width, height, photo.width, photo.height):
        raise UnusableFileError(
            f"has {width} × {height} px, and its photo {photo.width} × {photo.height} px; "
            "save it at the photo's size"
        )
    if mask.getextrema()[1] == 0:
        raise UnusableFileError("is black everywhere, so that nothing is learned; paint the subject white")
    return MaskFile(source, hashlib.sha256(data).hexdigest())


def _decode(data: bytes, suffix: str) -> Image.Image:
    decoded = decode_bytes(
        data, suffix, background=BLACK, max_pixels=MAX_PIXELS, min_side=1, target_side=None
    )
    return decoded.rgb.convert("L")


def _shown(path: str | Path) -> str:
    return printable(path.name if isinstance(path, Path) else path, NAME_LIMIT)
