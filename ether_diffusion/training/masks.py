"""Pictures that lie over their photos, found by the photos' names: masks, and control images alike."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.decoding import BLACK, decode_bytes
from ether_diffusion.training.photos import FileSource, Photo, Source, read_again
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files
from ether_diffusion.wording import listed, printable


@dataclass(frozen=True)
class OverlayKind:
    """What such pictures are called in messages, "mask", and what they are decoded to.

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
        decoded = decode_bytes(data, Path(name).suffix, background=BLACK, min_side=1)
        return self.finish(decoded.rgb.convert(self.mode))

    def read(self, source: Source, name: str, photo: Photo) -> "Overlay":
        """Return a photo's picture, checked.

        Raises:
            UnusableFileError: it cannot be used, or has other proportions than its photo.
        """
        data = source.read()
        width, height = self.decode(data, name).size
        if abs(width * photo.height - height * photo.width) > max(width, height, photo.width, photo.height):
            raise UnusableFileError(
                f"has {width} × {height} px, and its photo {photo.width} × {photo.height} px; "
                "save it at the photo's size"
            )
        return Overlay(self, source, name, hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Overlay:
    """A picture that lies over its photo; `name` is its file's."""

    kind: OverlayKind
    source: Source
    name: str
    sha256: str

    def decode(self) -> Image.Image:
        """Return the picture.

        Raises:
            ValueError: the file is gone, or another than was checked.
        """
        return self.kind.decode(read_again(self.source, self.name, self.sha256), self.name)


@dataclass(frozen=True)
class FoundOverlays:
    """A picture or None for each photo, what is wrong with them, and what is to be warned of."""

    overlays: Sequence[Overlay | None]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _not_black(mask: Image.Image) -> Image.Image:
    if mask.getextrema()[1] == 0:
        raise UnusableFileError("is black everywhere, so that nothing is learned; paint the subject white")
    return mask


MASK = OverlayKind("mask", "L", _not_black)
"""White where the loss sees the photo, and black or transparent where it does not."""


def find_masks(photos: Sequence[Photo], data: DataConfig, *, without: Collection[Path]) -> FoundOverlays:
    """Return each photo's mask from their folder, None where there is none or it is the photo's alpha.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    if data.mask_data_dir is not None:
        return find_overlays(data.mask_data_dir, photos, MASK, data, without=without)
    nothing: list[Overlay | None] = [None] * len(photos)
    opaque = [photo.name for photo in photos if not photo.has_alpha]
    if not data.mask_from_alpha or not opaque:
        return FoundOverlays(nothing)
    problem = "mask_from_alpha: no photo has transparent parts; cut one out, or switch it off"
    share = f"{len(opaque)} of {len(photos)} photos"
    return FoundOverlays(
        nothing,
        (problem,) if len(opaque) == len(photos) else (),
        (f"{share} have no transparent parts and count whole: {listed(opaque)}",),
    )


def find_overlays(
    folder: Path, photos: Sequence[Photo], kind: OverlayKind, data: DataConfig, *, without: Collection[Path]
) -> FoundOverlays:
    """Return each photo's picture of the same stem, and a sentence for each photo without a usable one.

    A photo in a subfolder has it in one of the same name. Folders `without` are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    by_stem: dict[str, list[str]] = {}
    links = data.follow_symlinks
    files = find_files(folder, f"the {kind.word}s", without=without, follow_symlinks=links).files
    for name in files:
        by_stem.setdefault(_stem(name), []).append(name)
    inside = None if links else folder
    found: list[Overlay | None] = []
    problems: list[str] = []
    missing: list[str] = []
    for photo in photos:
        names = by_stem.get(_stem(photo.name), [])
        overlay = None
        if not names:
            missing.append(photo.name)
        elif len(names) > 1:
            problems.append(f"{photo.shown} has several {kind.word}s, {listed(names)}; keep one")
        else:
            try:
                overlay = kind.read(FileSource(files[names[0]], inside), names[0], photo)
            except UnusableFileError as reason:
                problems.append(f"the {kind.word} {printable(names[0], NAME_LIMIT)} {reason}")
        found.append(overlay)
    where = printable(folder.name, NAME_LIMIT)
    if missing:
        problems.append(
            f"{len(missing)} photos have no {kind.word} in {where}: "
            f"{listed(missing, len(missing))}; add files of the same names, such as dog.png for dog.jpg"
        )
    stems = {_stem(photo.name) for photo in photos}
    unused = [name for stem, names in by_stem.items() if stem not in stems for name in names]
    orphans: tuple[str, ...] = ()
    if unused and data.max_train_samples is None:
        no_photo = "belong to no usable photo and are not used"
        orphans = (f"{len(unused)} {kind.word}s in {where} {no_photo}: {listed(unused)}",)
    if data.strict:
        return FoundOverlays(found, (*problems, *orphans))
    return FoundOverlays(found, tuple(problems), orphans)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
