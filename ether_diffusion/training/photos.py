"""Photos: where their bytes are, each decoded whole, at what size they are trained, and what is wrong."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.decoding import (
    KINDS,
    LOSSES,
    MAX_BYTES,
    MAX_PIXELS,
    MIN_SIDE,
    Decoded,
    decode_bytes,
)
from ether_diffusion.training.plain_files import NAME_LIMIT, UnusableFileError, find_files, read_plain_file
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed, printable

if TYPE_CHECKING:
    from ether_diffusion.bases import Base

Size = tuple[int, int]
"""(height, width) in px."""
Read = Callable[[], bytes]
"""Gives a file's bytes, or raises UnusableFileError."""
KEPT_BYTES = 512 * 2**20  # of photos' pixels at the size of training; others are decoded again when needed
LARGE = 256  # from this resolution (px) on, buckets' sides are multiples of 64, as in other trainers
MAX_STRETCH = 2  # buckets' sides are between the resolution divided and multiplied by this: from 1:4 to 4:1
PLAIN = "is black, or of one colour alone: nothing can be learned of it"
LONG = "is more than three times as long as wide, or as wide as long: what lies at its ends is cut off"
BLURRED = "looks blurred, and so will what is learned of it"
_LOOK, _GREY_LEVELS = 16, 4  # px of a photo's look, and the spread of grey levels that is one colour
_BLUR, _BLUR_SIDE = 0.65, 256
# of sharp photos and drawings 0.2 to 0.46 is left, of those blurred by 1/128 of a side 0.67 and more
_ALIKE = 0.2  # of the spread: 0.06 at most lies between a photo and a copy of it, 0.4 at least between others
_NOT_PHOTOS = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
_TEXT_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".csv", ".md"}
_CHECKED_SIDE = 2048  # px: larger JPEGs are checked at reduced scale, as sure to find damage, in flat memory
_NAMED_REPEATS = re.compile(r"(\d{1,3})_(.+)")  # as kohya's trainers read it; of more digits it is a date


@dataclass(frozen=True)
class Scaling:
    """The sizes that photos are trained at, one square or buckets of aspect ratios, and the filter."""

    sizes: tuple[Size, ...]
    resampling: Image.Resampling

    @classmethod
    def of(cls, data: DataConfig, base: "Base") -> "Scaling":
        """Return what a configuration asks for, at the base's own size if at none; see `check_sizes`."""
        resolution = data.resolution or base.native_size
        sizes = data.bucket_sizes or ((resolution, resolution),)
        if data.use_aspect_ratio_buckets and not data.bucket_sizes:
            sizes = automatic_buckets(resolution, base.size_multiple)
        name = data.image_interpolation_mode.removesuffix("_exact")  # Pillow's nearest is the exact one
        return cls(sizes, Image.Resampling[name.upper()])

    def size(self, photo: Size) -> Size:
        """Return the size that a photo is trained at: of the nearest aspect ratio, of several the largest."""
        aspect = {each: abs(math.log(photo[1] * each[0] / (photo[0] * each[1]))) for each in self.sizes}
        return min(self.sizes, key=lambda size: (aspect[size], -size[0] * size[1]))

    def covering(self, photo: Size) -> Size:
        """Return a photo's size after resizing."""
        return covering_size(photo, self.size(photo))


def check_sizes(data: DataConfig, base: "Base") -> None:
    """Refuse, by a ValueError, a resolution or buckets with sides that the base cannot halve often enough."""
    resolution, multiple = data.resolution or base.native_size, base.size_multiple
    for size in data.bucket_sizes or ((resolution, resolution),):
        for side in (side for side in size if side % multiple):
            found = f"the bucket {size[0]},{size[1]}" if data.bucket_sizes else f"resolution={resolution}"
            below = max(side // multiple, 1) * multiple
            raise ValueError(
                f"{found} is no multiple of {multiple} px, which the VAE and the UNet of this base need "
                f"together; use {below}, {below + multiple}, …"
            )


def automatic_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Return sizes of at most the square's area, so that none needs more memory, and about that.

    Sides are multiples of 64 px from a resolution of 256 on, below of `multiple`; and always of `multiple`.
    """
    step = math.lcm(64, multiple) if resolution >= LARGE else multiple
    shortest, longest = resolution // MAX_STRETCH, resolution * MAX_STRETCH
    sizes = {(resolution, resolution)}
    for side in range(-(-shortest // step) * step, longest + 1, step):
        other = min(resolution**2 // side, longest) // step * step
        if other >= shortest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def covering_size(photo: Size, size: Size) -> Size:
    """Return a photo's size after resizing: one side is that of `size`, the other no less; rounded down."""
    (photo_height, photo_width), (height, width) = photo, size
    if photo_width * height >= photo_height * width:
        return height, photo_width * height // photo_height
    return photo_height * width // photo_width, width


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture's file that was checked; `read` gives its bytes again, in any process."""

    path: Path
    name: str
    sha256: str
    read: Read | None = None

    @property
    def shown(self) -> str:
        """The name, escaped."""
        return printable(self.name, NAME_LIMIT)

    def read_again(self) -> bytes:
        """Return the bytes that were checked before; a ValueError says that they are gone, or others now."""
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


@dataclass(frozen=True, kw_only=True)
class Overlay(Picture):
    """A picture over its photo, its mask or its control image; `open` makes it of bytes and a suffix."""

    open: Callable[[bytes, str], Image.Image]

    def decode(self) -> Image.Image:
        """Return the picture; raises as `read_again`."""
        return self.open(self.read_again(), self.path.suffix)


@dataclass(frozen=True, kw_only=True)
class Photo(Picture):
    """A photo that was decoded whole; width and height (px) are the upright photo's.

    `name` is its file's, with the subfolders that it lies in: images/00.png. `pixels_sha256` is over the
    upright sRGB pixels and the mask, for large JPEGs at reduced scale. `notes` say what decoding does to it,
    and what is doubtful; `look` are the grey levels of its thumbnail, none where it is of one colour.
    `kept` are its pixels at the size of training, if there was room, until its latents are remembered
    instead. It is trained with `prompt`; `mask` is a file's, None where it is the alpha.
    """

    width: int
    height: int
    pixels_sha256: str
    has_alpha: bool
    notes: tuple[str, ...]
    look: bytes = field(default=b"", repr=False)
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
        """What the folder's name says in kohya's trainers, as 10_sks dog does.

        That is how often an epoch has the photo, the caption of a photo without one, and the name.
        """
        matches = [(_NAMED_REPEATS.fullmatch(each.name), each) for each in PurePosixPath(self.name).parents]
        return next((((int(match[1]), match[2], each.as_posix())) for match, each in matches if match), None)

    def decode(self, target_side: int | None = None) -> Decoded:
        """Decode the photo again, as in `decode_photo`; raises as `read_again`."""
        return decode_bytes(self.read_again(), self.path.suffix, target_side=target_side)

    def covering(self, size: Size, resampling: Image.Resampling) -> Decoded:
        """Return the photo and its alpha, resized until they just cover a size; raises as `read_again`."""
        resized = covering_size(self.size, size)
        if self.kept and self.kept[0].rgb.size == resized[::-1]:
            return self.kept[0]
        return _resized(self.decode(min(resized)), resized, resampling)


def _resized(decoded: Decoded, size: Size, resampling: Image.Resampling) -> Decoded:
    alpha = decoded.mask and decoded.mask.resize(size[::-1], Image.Resampling.BILINEAR)
    return replace(decoded, rgb=decoded.rgb.resize(size[::-1], resampling), mask=alpha)


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
    """Photos of a folder or a data set in a fixed order, refused files, and warnings."""

    photos: tuple[Photo, ...] = ()
    refused: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of everything that was read, by name; plain text, fit for JSON."""
        hashes: dict[str, str] = {}
        for photo in self.photos:
            hashes[os.fsencode(photo.name).decode("utf-8", "backslashreplace")] = photo.sha256
            if photo.prompt:
                prompt = photo.prompt.encode("utf-8", "surrogatepass")
                hashes[f"prompt of {photo.shown}"] = hashlib.sha256(prompt).hexdigest()
            hashes |= {each.name: each.sha256 for each in (photo.mask, photo.control) if each is not None}
        return hashes


def compare_fingerprints(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the files that are new, gone or changed between two fingerprints, by these words."""
    found = {
        "new": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
        "changed": {name for name in before.keys() & now.keys() if before[name] != now[name]},
    }
    return {word: sorted(names) for word, names in found.items() if names}


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
    inside, shown = None if follow_symlinks else Path(folder), printable(folder, NAME_LIMIT)
    files, remarks = find_files(folder, "the photos", without=without, follow_symlinks=follow_symlinks)
    names = [name for name, path in files.items() if may_be_photo(path)]
    chosen = {names[index]: files[names[index]] for index in choose_samples(len(names), limit)}
    read = {name: (path, file_reader(path, inside)) for name, path in chosen.items()}
    return check_photos(read, shown, remarks, strict=strict, min_side=min_side, scaling=scaling)


def may_be_photo(path: Path) -> bool:
    """Say whether a file's name is none of captions, metadata or what operating systems leave behind."""
    name = path.name.lower()
    return not (name.startswith(".") or name in _NOT_PHOTOS or path.suffix.lower() in _TEXT_SUFFIXES)


def file_reader(path: Path, inside: Path | None) -> Read:
    """Return what reads a picture's file; links are followed as by `read_plain_file`."""
    return partial(read_plain_file, path, inside=inside, max_bytes=MAX_BYTES)


def choose_samples(number: int, limit: int | None) -> list[int]:
    """Return which of so many samples a run trains on, in their order: all, or as many as the limit."""
    if limit is None or limit >= number:
        return list(range(number))
    return sorted(torch.randperm(number, generator=stream(0, "chosen samples", number))[:limit].tolist())


def check_photos(
    files: Mapping[str, tuple[Path, Read]],
    place: str,
    remarks: Sequence[str] = (),
    *,
    strict: bool = False,
    min_side: int = MIN_SIDE,
    scaling: Scaling | None = None,
) -> PhotoFolder:
    """Decode the photos of a place, which has remarks of its own; raises as `find_photos`."""
    photos: list[Photo] = []
    refused: list[Refusal] = []
    room = KEPT_BYTES
    for name, (path, read) in files.items():
        try:
            photo = check_photo(path, read(), min_side=min_side, scaling=scaling)
        except UnusableFileError as reason:
            refused.append(Refusal(name, str(reason)))
            continue
        for kept in photo.kept:
            room -= 4 * kept.rgb.width * kept.rgb.height  # Pillow has RGB in four bytes
        photos.append(replace(photo, name=name, read=read, kept=photo.kept if room >= 0 else []))
    if not photos or (strict and refused):
        problem = f"{len(refused)} unusable files" if photos else "no usable photos"
        reasons = ";\n  ".join(refusal.sentence for refusal in refused)
        rest = f":\n  {reasons}" if refused else f" ({'; '.join((f'looked for {KINDS}', *remarks))})"
        raise ValueError(f"{problem} in {place}{rest}")
    return PhotoFolder(tuple(photos), tuple(refused), (*remarks, *remarks_on(photos)))


def check_photo(
    path: Path,
    data: bytes,
    *,
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
    scaling: Scaling | None = None,
) -> Photo:
    """Decode the bytes of a photo of this name whole, or raise an UnusableFileError."""

    def side(width: int, height: int) -> int:
        return _CHECKED_SIDE if scaling is None else min(scaling.covering((height, width)))

    decoded = decode_bytes(data, path.suffix, min_side=min_side, max_pixels=max_pixels, target_side=side)
    (width, height), (look, doubts) = decoded.size, look_at(decoded.rgb)
    pixels = hashlib.sha256(repr(decoded.size).encode())
    pixels.update(decoded.rgb.tobytes())
    pixels.update(b"" if decoded.mask is None else decoded.mask.tobytes())
    return Photo(
        path=path,
        name=path.name,
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels.hexdigest(),
        has_alpha=decoded.mask is not None,
        notes=decoded.notes + doubts,
        look=look,
        kept=[_resized(decoded, scaling.covering((height, width)), scaling.resampling)] if scaling else [],
    )


def look_at(rgb: Image.Image) -> tuple[bytes, tuple[str, ...]]:
    """Return the look of a photo and what is doubtful about it.

    How blurred it is says how little blurring it again changes: F. Crete et al., The Blur Effect, SPIE 2007.
    """
    grey, (width, height) = rgb.convert("L"), rgb.size
    long = (LONG,) * (max(width, height) > 3 * min(width, height))
    grey.thumbnail((_BLUR_SIDE, _BLUR_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(grey, dtype=np.float32)
    if values.std() < _GREY_LEVELS:
        return b"", (PLAIN, *long)
    left = []
    for lines in (values, values.T):
        means = np.cumsum(np.pad(lines, ((0, 0), (5, 4)), mode="edge"), axis=1)
        again = (means[:, 9:] - means[:, :-9]) / 9
        steps, after = (np.abs(np.diff(each, axis=1)) for each in (lines, again))
        left.append(1 - np.maximum(steps - after, 0).sum() / max(steps.sum(), 1e-9))
    look = grey.resize((_LOOK, _LOOK), Image.Resampling.BOX).tobytes()
    return look, (*long, *(BLURRED,) * int(max(left) > _BLUR))


def find_likes(looks: Sequence[bytes]) -> dict[int, int]:
    """Return which photos look like which before them, turned, mirrored or saved again, by their looks."""
    known = [index for index, look in enumerate(looks) if look]
    grey = np.array([[*looks[index]] for index in known], dtype=np.float32).reshape(-1, _LOOK, _LOOK)
    means, spread, found = grey.mean((1, 2)), grey.std((1, 2)), dict[int, int]()
    for at in range(1, len(known)):
        most = _ALIKE * np.minimum(spread[:at], spread[at])
        near = np.flatnonzero(np.abs(means[:at] - means[at]) < most)  # others differ by more in any turn
        turned = [np.rot90(each, turn) for each in (grey[at], grey[at].T) for turn in range(4)]
        away = [np.abs(grey[near] - each).mean((1, 2)) < most[near] for each in turned]
        like = near[np.any(away, axis=0)]
        if len(like):
            found[known[at]] = known[like[0]]
    return found


def remarks_on(photos: Sequence[Photo]) -> Iterator[str]:
    """Give warnings on photos that are there twice, are doubtful, or lose something by being decoded."""
    firsts: dict[str, int] = {}
    same = {n: m for n, photo in enumerate(photos) if (m := firsts.setdefault(photo.pixels_sha256, n)) != n}
    for number, first in same.items():
        pair = f"{photos[first].shown} and {photos[number].shown}"
        yield f"{pair} are the same picture; delete one, or it counts twice"
    likes = find_likes([b"" if number in same else photo.look for number, photo in enumerate(photos)])
    if likes:
        pairs = listed(f"{photos[number].name} like {photos[first].name}" for number, first in likes.items())
        yield f"{pairs}: looks like another photo, turned or saved again, and counts twice"
    for note in (*LOSSES, PLAIN, LONG, BLURRED):
        names = [photo.name for photo in photos if note in photo.notes]
        if names:
            yield f"{listed(names)}: {note}"
