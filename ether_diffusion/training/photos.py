"""A folder of photos: found, each decoded whole, and everything wrong with any of them said at once."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ether_diffusion.training.decoding import (
    BAD_EXIF,
    FIRST_FRAME,
    FIRST_PAGE,
    KINDS,
    MAX_BYTES,
    MAX_PIXELS,
    MIN_SIDE,
    WHITE,
    Decoded,
    decode_bytes,
)
from ether_diffusion.training.plain_files import (
    NAME_LIMIT,
    FoundFiles,
    UnusableFileError,
    list_files,
    read_plain_file,
    walk_files,
)
from ether_diffusion.training.srgb import BAD_PROFILE, NO_ADOBE_MARK
from ether_diffusion.wording import listed, printable

_NOT_PHOTOS = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
_TEXT_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv", ".md"}
_CHECKED_SIDE = 2048
"""Larger JPEGs are checked at reduced scale (px, shorter side): as sure to find damage, in flat memory."""
_LOSSES = (FIRST_FRAME, FIRST_PAGE, BAD_EXIF, BAD_PROFILE, NO_ADOBE_MARK)
"""Notes that cost something, so that a warning names the photos."""
_NAMED_REPEATS = re.compile(r"(\d{1,3})_(.+)")
"""A folder's name as kohya's trainers read it, 10_sks dog; of more digits it is a date."""
_ONE_TOO_MANY = "delete one, or the photo counts twice"


@dataclass(frozen=True)
class Photo:
    """A photo that was decoded whole; width and height (px) are the upright photo's.

    `name` is its file's, with the subfolders that it lies in: images/00.png.
    `pixels_sha256` is over the upright sRGB pixels and the mask, for JPEGs of over 4096 px at reduced scale.
    `notes` say what decoding does to it.
    """

    path: Path
    name: str
    width: int
    height: int
    sha256: str
    pixels_sha256: str
    has_alpha: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """A file that is not used, and why."""

    path: Path
    name: str
    reason: str

    @property
    def sentence(self) -> str:
        """The name, escaped, the reason and the remedy."""
        return f"{printable(self.name, NAME_LIMIT)} {self.reason}"


@dataclass(frozen=True)
class PhotoFolder:
    """What a folder holds: photos in the order of their names, refused files, and warnings."""

    photos: tuple[Photo, ...]
    refused: tuple[Refusal, ...]
    warnings: tuple[str, ...]

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each photo's file by its name; plain text, fit for JSON."""
        return {_plain(photo.name): photo.sha256 for photo in self.photos}


@dataclass(frozen=True)
class PhotoChanges:
    """The names of what differs between two fingerprints; it is false where nothing does."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __bool__(self) -> bool:
        """Say whether anything differs."""
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        """One clause that names all files."""
        kinds = (("added", self.added), ("removed", self.removed), ("changed", self.changed))
        return "; ".join(f"{kind}: {listed(names, len(names))}" for kind, names in kinds if names)


def compare_fingerprints(before: Mapping[str, str], now: Mapping[str, str]) -> PhotoChanges:
    """Say which files came, went or changed between two fingerprints of a folder."""
    return PhotoChanges(
        added=tuple(sorted(now.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - now.keys())),
        changed=tuple(sorted(name for name in before.keys() & now.keys() if before[name] != now[name])),
    )


def find_photos(
    folder: str | Path,
    *,
    follow_symlinks: bool = False,
    strict: bool = False,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    choose: Callable[[int], Sequence[int]] | None = None,
    without: Collection[Path] | None = None,
) -> PhotoFolder:
    """Find and check the photos of a folder; nothing is written.

    Its subfolders are only looked into where folders to leave out are given, `without`, be they none.
    Hidden files, captions, metadata and what operating systems leave behind are passed over; every other file
    becomes a photo or a refusal. Links out of the folder are refused unless `follow_symlinks`. `choose` says
    which of so many files are looked at.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, no photo in it is usable, or `strict` and any file is refused.
    """
    inside = None if follow_symlinks else Path(folder)
    photos: list[Photo] = []
    refused: list[Refusal] = []
    found = FoundFiles({path.name: path for path in list_files(folder, "the photos")}, ())
    if without is not None:
        found = walk_files(folder, "the photos", without=without, follow_symlinks=follow_symlinks)
    names = [name for name, path in found.files.items() if not _is_passed_over(path)]
    for name in names if choose is None else [names[index] for index in choose(len(names))]:
        path = found.files[name]
        try:
            data = read_plain_file(path, inside=inside, max_bytes=MAX_BYTES)
            photos.append(check_photo(path, data, name=name, max_pixels=max_pixels, min_side=min_side))
        except UnusableFileError as reason:
            refused.append(Refusal(path, name, str(reason)))
    if refused and (strict or not photos):
        reasons = ";\n  ".join(refusal.sentence for refusal in refused)
        problem = f"{len(refused)} unusable files" if photos else "no usable photos"
        raise ValueError(f"{problem} in {printable(folder, NAME_LIMIT)}:\n  {reasons}")
    if not photos:
        rest = "; ".join((f"looked for {KINDS}", *found.remarks))
        raise ValueError(f"no usable photos in {printable(folder, NAME_LIMIT)} ({rest})")
    return PhotoFolder(tuple(photos), tuple(refused), (*found.remarks, *remarks_on(photos)))


def name_repeats(name: str) -> tuple[int, str, str] | None:
    """Return what the name of a photo's folder says, as 10_sks dog does, in kohya's trainers.

    That is how often an epoch has the photo, the caption of a photo without one, and the folder's name; None
    where it says nothing.
    """
    for folder in PurePosixPath(name).parents:
        match = _NAMED_REPEATS.fullmatch(folder.name)
        if match is not None:
            return int(match[1]), match[2], folder.as_posix()
    return None


def remarks_on(photos: Sequence[Photo]) -> tuple[str, ...]:
    """Return warnings on photos that are there twice, or lose something by being decoded."""
    return (*_doubles(photos), *_losses(photos))


def _is_passed_over(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(".") or name in _NOT_PHOTOS or path.suffix.lower() in _TEXT_SUFFIXES


def check_photo(
    path: Path,
    data: bytes,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
) -> Photo:
    """Decode a photo's bytes whole; `path` names it, unless `name` does, and need not be there.

    Raises:
        UnusableFileError: it is not a photo that can be used.
    """
    decoded = decode_bytes(
        data,
        path.suffix,
        background=WHITE,
        max_pixels=max_pixels,
        min_side=min_side,
        target_side=_CHECKED_SIDE,
    )
    return Photo(
        path=path,
        name=name or path.name,
        width=decoded.size[0],
        height=decoded.size[1],
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=_pixels_sha256(decoded),
        has_alpha=decoded.mask is not None,
        notes=decoded.notes,
    )


def _pixels_sha256(decoded: Decoded) -> str:
    digest = hashlib.sha256(repr(decoded.size).encode())
    digest.update(decoded.rgb.tobytes())
    digest.update(b"" if decoded.mask is None else decoded.mask.tobytes())
    return digest.hexdigest()


def _doubles(photos: Sequence[Photo]) -> Iterator[str]:
    first_by_bytes: dict[str, Photo] = {}
    first_by_pixels: dict[str, Photo] = {}
    for photo in photos:
        same_file = first_by_bytes.setdefault(photo.sha256, photo)
        same_pixels = first_by_pixels.setdefault(photo.pixels_sha256, photo)
        if same_file is not photo:
            yield f"{_shown(same_file)} and {_shown(photo)} are the same file; {_ONE_TOO_MANY}"
        elif same_pixels is not photo:
            yield f"{_shown(same_pixels)} and {_shown(photo)} have the same pixels; {_ONE_TOO_MANY}"


def _losses(photos: Sequence[Photo]) -> Iterator[str]:
    for note in _LOSSES:
        names = [photo.name for photo in photos if note in photo.notes]
        if names:
            yield f"{listed(names)}: {note}"


def _shown(photo: Photo) -> str:
    return printable(photo.name, NAME_LIMIT)


def _plain(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
