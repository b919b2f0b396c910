"""Photos: where their bytes are, each decoded whole, and everything wrong with any of them said at once."""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from PIL import Image

from ether_diffusion.training.crops import Scaling, Size, covering_size
from ether_diffusion.training.decoding import (
    BLACK,
    KINDS,
    LOSSES,
    MAX_BYTES,
    MIN_SIDE,
    Decoded,
    decode_bytes,
)
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files, read_plain_file
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed, printable

Read = Callable[[], bytes]
"""Gives a file's bytes, or raises UnusableFileError."""
KEPT_BYTES = 512 * 2**20
"""Of photos' pixels at the size of training that stay in memory; others are decoded again when needed."""

_NOT_PHOTOS = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
_TEXT_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv", ".md"}
_CHECKED_SIDE = 2048
"""Larger JPEGs are checked at reduced scale (px, shorter side): as sure to find damage, in flat memory."""
_NAMED_REPEATS = re.compile(r"(\d{1,3})_(.+)")
"""A folder's name as kohya's trainers read it, 10_sks dog; of more digits it is a date."""
_ONE_TOO_MANY = "delete one, or the photo counts twice"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture's file that was checked; `read` gives its bytes again, in any process."""

    path: Path
    name: str
    sha256: str
    read: Read | None = field(default=None, repr=False, compare=False)

    @property
    def shown(self) -> str:
        """The name, escaped."""
        return printable(self.name, NAME_LIMIT)

    def read_again(self) -> bytes:
        """Return the same bytes that were checked before.

        Raises:
            ValueError: they are gone, or others now.
        """
        assert self.read is not None
        try:
            data = self.read()
        except UnusableFileError as reason:
            remedy = "put it back and resume, or train with cache_latents"
            raise ValueError(f"{self.shown} {reason}; {remedy}") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(
                f"{self.shown} is not the file any more that was checked; put it back and resume"
            )
        return data


@dataclass(frozen=True)
class OverlayKind:
    """What pictures that lie over photos are called, and decoded to.

    `finish` takes one in its mode and returns what is used of it, or raises UnusableFileError.
    """

    word: str
    mode: Literal["L", "RGB"]
    finish: Callable[[Image.Image], Image.Image]

    def decode(self, data: bytes, suffix: str) -> Image.Image:
        """Return the picture of a file, what is transparent over black."""
        return self.finish(decode_bytes(data, suffix, background=BLACK, min_side=1).rgb.convert(self.mode))


@dataclass(frozen=True, kw_only=True)
class Overlay(Picture):
    """A picture that lies over its photo: its mask, or its control image."""

    kind: OverlayKind

    def decode(self) -> Image.Image:
        """Return the picture.

        Raises:
            ValueError: the file is gone, or another than was checked.
        """
        return self.kind.decode(self.read_again(), self.path.suffix)


@dataclass(frozen=True, kw_only=True)
class Photo(Picture):
    """A photo that was decoded whole; width and height (px) are the upright photo's.

    `name` is its file's, with the subfolders that it lies in: images/00.png. `pixels_sha256` is over the
    upright sRGB pixels and the mask, for large JPEGs at reduced scale. `notes` say what decoding does to it.
    `kept` are its pixels at the size of training, if there was room, until its latents are remembered
    instead. It is trained with `prompt`; `mask` is a file's, None where it is the alpha.
    """

    width: int
    height: int
    pixels_sha256: str
    has_alpha: bool
    notes: tuple[str, ...]
    kept: list[Decoded] = field(default_factory=list, repr=False, compare=False)
    prompt: str = ""
    mask: Overlay | None = None
    control: Overlay | None = None

    @property
    def size(self) -> Size:
        """Height and width (px)."""
        return self.height, self.width

    @property
    def named_repeats(self) -> tuple[int, str, str] | None:
        """What the name of the photo's folder says, as 10_sks dog does, in kohya's trainers.

        That is how often an epoch has the photo, the caption of a photo without one, and the folder's name;
        None where it says nothing.
        """
        for folder in PurePosixPath(self.name).parents:
            match = _NAMED_REPEATS.fullmatch(folder.name)
            if match is not None:
                return int(match[1]), match[2], folder.as_posix()
        return None

    @property
    def repeats(self) -> int:
        """Times that the name of its folder asks for in an epoch, or 1."""
        return self.named_repeats[0] if self.named_repeats else 1

    def decode(self, target_side: int | None = None) -> Decoded:
        """Decode the photo again, as in `decode_photo`; whole without a target_side (px).

        Raises:
            ValueError: it is gone, or was changed.
        """
        return decode_bytes(self.read_again(), self.path.suffix, target_side=target_side)

    def covering(self, size: Size, resampling: Image.Resampling) -> Decoded:
        """Return the photo and its alpha, resized until they just cover a size; raises as `decode`."""
        resized = covering_size(self.size, size)
        if self.kept and self.kept[0].rgb.size == resized[::-1]:
            return self.kept[0]
        return _resized(self.decode(min(resized)), resized, resampling)


@dataclass
class Findings:
    """What is wrong, and what is to be known; errors raised inside `with` are problems, and go no further."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, (ValueError, FileNotFoundError)):
            self.problems.append(str(error))
            return True
        return False


@dataclass(frozen=True)
class Refusal:
    """A file that is not used, and why."""

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
        return {
            os.fsencode(photo.name).decode("utf-8", "backslashreplace"): photo.sha256 for photo in self.photos
        }


def compare_fingerprints(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the files that are new, gone or changed between two fingerprints, by these words."""
    found = {
        "new": sorted(now.keys() - before.keys()),
        "gone": sorted(before.keys() - now.keys()),
        "changed": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
    }
    return {word: names for word, names in found.items() if names}


def find_photos(
    folder: str | Path,
    *,
    follow_symlinks: bool = False,
    strict: bool = False,
    min_side: int = MIN_SIDE,
    limit: int | None = None,
    without: Collection[Path] | None = None,
    scaling: Scaling | None = None,
) -> PhotoFolder:
    """Find and check the photos of a folder; nothing is written.

    Its subfolders are only looked into where folders to leave out are given, `without`, be they none.
    Hidden files, captions, metadata and what operating systems leave behind are passed over; every other file
    becomes a photo or a refusal. Links out of the folder are refused unless `follow_symlinks`. Of more files
    than `limit` so many are looked at; `scaling` says what size of them is kept.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, no photo in it is usable, or `strict` and any file is refused.
    """
    inside = None if follow_symlinks else Path(folder)
    found = find_files(folder, "the photos", without=without, follow_symlinks=follow_symlinks)
    names = [name for name, path in found.files.items() if not _is_passed_over(path)]
    sources = [
        (found.files[names[index]], names[index], file_reader(found.files[names[index]], inside))
        for index in choose_samples(len(names), limit)
    ]
    photos, refused = check_photos(sources, min_side=min_side, scaling=scaling)
    shown = printable(folder, NAME_LIMIT)
    if refused and (strict or not photos):
        reasons = ";\n  ".join(refusal.sentence for refusal in refused)
        problem = f"{len(refused)} unusable files" if photos else "no usable photos"
        raise ValueError(f"{problem} in {shown}:\n  {reasons}")
    if not photos:
        rest = "; ".join((f"looked for {KINDS}", *found.remarks))
        raise ValueError(f"no usable photos in {shown} ({rest})")
    return PhotoFolder(tuple(photos), tuple(refused), (*found.remarks, *remarks_on(photos)))


def file_reader(path: Path, inside: Path | None) -> Read:
    """Return what reads a picture's file; links are followed as by `read_plain_file`."""
    return partial(read_plain_file, path, inside=inside, max_bytes=MAX_BYTES)


def choose_samples(number: int, limit: int | None) -> list[int]:
    """Return which of so many samples a run trains on, in their order: all, or as many as the limit."""
    if limit is None or limit >= number:
        return list(range(number))
    drawn = torch.randperm(number, generator=stream(0, "chosen samples", number))
    return sorted(drawn[:limit].tolist())


def _is_passed_over(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith(".") or name in _NOT_PHOTOS or path.suffix.lower() in _TEXT_SUFFIXES


def check_photos(
    sources: Iterable[tuple[Path, str, Read]], *, min_side: int = MIN_SIDE, scaling: Scaling | None = None
) -> tuple[list[Photo], list[Refusal]]:
    """Decode the photos of some sources, each with its path and name; return those of use, and the others."""
    photos: list[Photo] = []
    refused: list[Refusal] = []
    room = KEPT_BYTES
    for path, name, read in sources:
        try:
            photo = check_photo(path, read(), name=name, min_side=min_side, scaling=scaling)
        except UnusableFileError as reason:
            refused.append(Refusal(name, str(reason)))
            continue
        for kept in photo.kept:
            room -= 4 * kept.rgb.width * kept.rgb.height  # Pillow has RGB in four bytes
        photos.append(replace(photo, read=read, kept=photo.kept if room >= 0 else []))
    return photos, refused


def check_photo(
    path: Path,
    data: bytes,
    *,
    name: str | None = None,
    min_side: int = MIN_SIDE,
    scaling: Scaling | None = None,
) -> Photo:
    """Decode a photo's bytes whole; `path` names it, unless `name` does, and need not be there.

    Raises:
        UnusableFileError: it is not a photo that can be used.
    """
    side = _CHECKED_SIDE if scaling is None else lambda *size: min(scaling.covering(size[::-1]))
    decoded = decode_bytes(data, path.suffix, min_side=min_side, target_side=side)
    pixels = hashlib.sha256(repr(decoded.size).encode())
    pixels.update(decoded.rgb.tobytes())
    pixels.update(b"" if decoded.mask is None else decoded.mask.tobytes())
    width, height = decoded.size
    kept = []
    if scaling is not None:
        kept = [_resized(decoded, scaling.covering((height, width)), scaling.resampling)]
    return Photo(
        path=path,
        name=name or path.name,
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels.hexdigest(),
        has_alpha=decoded.mask is not None,
        notes=decoded.notes,
        kept=kept,
    )


def _resized(decoded: Decoded, size: Size, resampling: Image.Resampling) -> Decoded:
    alpha = decoded.mask
    return replace(
        decoded,
        rgb=decoded.rgb.resize(size[::-1], resampling),
        mask=None if alpha is None else alpha.resize(size[::-1], Image.Resampling.BILINEAR),
    )


def remarks_on(photos: Sequence[Photo]) -> Iterator[str]:
    """Give warnings on photos that are there twice, or lose something by being decoded."""
    first_by_bytes: dict[str, Photo] = {}
    first_by_pixels: dict[str, Photo] = {}
    for photo in photos:
        same_file = first_by_bytes.setdefault(photo.sha256, photo)
        same_pixels = first_by_pixels.setdefault(photo.pixels_sha256, photo)
        if same_file is not photo:
            yield f"{same_file.shown} and {photo.shown} are the same file; {_ONE_TOO_MANY}"
        elif same_pixels is not photo:
            yield f"{same_pixels.shown} and {photo.shown} have the same pixels; {_ONE_TOO_MANY}"
    for note in LOSSES:
        names = [photo.name for photo in photos if note in photo.notes]
        if names:
            yield f"{listed(names)}: {note}"
