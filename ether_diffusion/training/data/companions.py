"""Files that belong to photos by their names: masks, control images."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from ether_diffusion.adapter_file.wording import listed, printable
from ether_diffusion.training.data.sources import FileSource, Source, read_again
from ether_diffusion.training.decoding import MAX_PIXELS, decode_bytes
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, list_files

BLACK = (0, 0, 0)


@dataclass(frozen=True)
class CompanionKind:
    """What such files are called in messages, "mask", and what they are decoded to.

    `finish` takes the picture in its mode, and returns what is used of it; it raises UnusableFileError for
    one that cannot be used.
    """

    word: str
    mode: Literal["L", "RGB"]
    finish: Callable[[Image.Image], Image.Image]

    def decode(self, data: bytes, name: str) -> Image.Image:
        """Return the picture of a file, what is transparent over black.

        Raises:
            UnusableFileError: it is none, or one that cannot be used.
        """
        decoded = decode_bytes(
            data, Path(name).suffix, background=BLACK, max_pixels=MAX_PIXELS, min_side=1, target_side=None
        )
        return self.finish(decoded.rgb.convert(self.mode))

    def read(self, source: Source, name: str, photo: Photo) -> "Companion":
        """Return a photo's file, checked.

        Raises:
            UnusableFileError: it cannot be used, or has other proportions than its photo.
        """
        data = source.read()
        _check_proportions(self.decode(data, name).size, photo)
        return Companion(self, source, name, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Companion:
    """A picture that lies over its photo; `name` is its file's."""

    kind: CompanionKind
    source: Source
    name: str
    sha256: str

    def decode(self) -> Image.Image:
        """Return the picture.

        Raises:
            ValueError: the file is gone, or another than was checked.
        """
        return self.kind.decode(read_again(self.source, self.name, self.sha256), self.name)


def _not_black(mask: Image.Image) -> Image.Image:
    if mask.getextrema()[1] == 0:
        raise UnusableFileError("is black everywhere, so that nothing is learned; paint the subject white")
    return mask


MASK = CompanionKind("mask", "L", _not_black)
"""White where the loss sees the photo, and black or transparent where it does not."""


@dataclass(frozen=True)
class FoundCompanions:
    """A photo's file or None for each, what is wrong with them, and a sentence on those of no photo."""

    companions: tuple[Companion | None, ...]
    problems: tuple[str, ...]
    orphans: tuple[str, ...] = ()


def find_companions(
    folder: str | Path, photos: Sequence[Photo], kind: CompanionKind, *, follow_symlinks: bool = False
) -> FoundCompanions:
    """Return each photo's file of the same stem, and a sentence for each photo without a usable one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in list_files(folder, f"the {kind.word}s"):
        by_stem.setdefault(path.stem, []).append(path)
    inside = None if follow_symlinks else Path(folder)
    companions: list[Companion | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for photo in photos:
        paths = by_stem.get(photo.path.stem, [])
        found = None
        if not paths:
            missing.append(photo.path.name)
        elif len(paths) > 1:
            names = listed(path.name for path in paths)
            problems.append(f"{_shown(photo.path)} has several {kind.word}s, {names}; keep one")
        else:
            try:
                found = kind.read(FileSource(paths[0], inside), paths[0].name, photo)
            except UnusableFileError as reason:
                problems.append(f"the {kind.word} {_shown(paths[0])} {reason}")
        companions.append(found)
    if missing:
        problems.append(
            f"{len(missing)} photos have no {kind.word} in {_shown(folder)}: "
            f"{listed(missing, len(missing))}; add files of the same names, such as dog.png for dog.jpg"
        )
    stems = {photo.path.stem for photo in photos}
    orphans = [path.name for stem, paths in by_stem.items() if stem not in stems for path in paths]
    return FoundCompanions(tuple(companions), tuple(problems), tuple(_sentence_on(orphans, kind, folder)))


def _sentence_on(orphans: list[str], kind: CompanionKind, folder: str | Path) -> Iterator[str]:
    if orphans:
        yield (
            f"{len(orphans)} {kind.word}s in {_shown(folder)} belong to no usable photo and are not used: "
            f"{listed(orphans)}"
        )


def _check_proportions(size: tuple[int, int], photo: Photo) -> None:
    width, height = size
    if abs(width * photo.height - height * photo.width) > max(width, height, photo.width, photo.height):
        raise UnusableFileError(
            f"has {width} × {height} px, and its photo {photo.width} × {photo.height} px; "
            "save it at the photo's size"
        )


def _shown(path: str | Path) -> str:
    return printable(path.name if isinstance(path, Path) else path, NAME_LIMIT)
