"""Files that belong to photos by their names: masks, control images."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from ether_diffusion.training.data.sources import FileSource, Source, read_again
from ether_diffusion.training.decoding import MAX_PIXELS, decode_bytes
from ether_diffusion.training.photos import Photo
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, walk_files
from ether_diffusion.wording import listed, printable

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
    folder: str | Path,
    photos: Sequence[Photo],
    kind: CompanionKind,
    *,
    follow_symlinks: bool = False,
    without: Collection[Path] = (),
) -> FoundCompanions:
    """Return each photo's file of the same stem, and a sentence for each photo without a usable one.

    A photo in a subfolder has it in one of the same name. Folders `without` are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    by_stem: dict[str, list[str]] = {}
    files = walk_files(folder, f"the {kind.word}s", without=without, follow_symlinks=follow_symlinks).files
    for name in files:
        by_stem.setdefault(_stem(name), []).append(name)
    inside = None if follow_symlinks else Path(folder)
    companions: list[Companion | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for photo in photos:
        names = by_stem.get(_stem(photo.name), [])
        found = None
        if not names:
            missing.append(photo.name)
        elif len(names) > 1:
            problems.append(f"{_shown(photo.name)} has several {kind.word}s, {listed(names)}; keep one")
        else:
            try:
                found = kind.read(FileSource(files[names[0]], inside), names[0], photo)
            except UnusableFileError as reason:
                problems.append(f"the {kind.word} {_shown(names[0])} {reason}")
        companions.append(found)
    if missing:
        problems.append(
            f"{len(missing)} photos have no {kind.word} in {_shown(folder)}: "
            f"{listed(missing, len(missing))}; add files of the same names, such as dog.png for dog.jpg"
        )
    stems = {_stem(photo.name) for photo in photos}
    orphans = [name for stem, names in by_stem.items() if stem not in stems for name in names]
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


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _shown(name: str | Path) -> str:
    return printable(name.name if isinstance(name, Path) else name, NAME_LIMIT)
