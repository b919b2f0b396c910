"""Photos from visitors: unpacked, counted, decoded whole by us, and copied under names of our own."""

import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.training.decoding import decode_bytes
from ether_diffusion.training.photos import Photo, check_photo, remarks_on
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.archives import is_archive, unpack_zip
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.wording import printable

MAX_PHOTO_BYTES = 64 * 2**20
MAX_PHOTOS = 200
MAX_TOTAL_BYTES = 2**30
"""Of all photos of one subject."""
THUMBNAIL_SIDE = 256
"""Longer side in px."""
_KEPT_SECONDS = 24 * 3600
_UNPACKED, THUMBNAILS = "unpacked", "thumbnails"


@dataclass(frozen=True)
class Accepted:
    """A photo that can be used: its name for people, escaped, our copy and our thumbnail of it.

    `note` says what decoding does to it, or which other photo it repeats; empty if nothing is notable.
    """

    name: str
    path: Path
    thumbnail: Path
    note: str


@dataclass(frozen=True)
class Refused:
    """A file that is not used, by its escaped name, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class IntakeReport:
    """What became of uploaded files, in the order that they were given."""

    accepted: tuple[Accepted, ...]
    refused: tuple[Refused, ...]

    @property
    def photos(self) -> tuple[Path, ...]:
        """Our copies of the accepted photos, to train on."""
        return tuple(each.path for each in self.accepted)


class _Refusals(list[Refused]):
    """Refusals as they are found."""

    def note(self, name: str, reason: str) -> None:
        self.append(Refused(printable(name), reason))


def take_photos(paths: Sequence[Path], folder: Path) -> IntakeReport:
    """Check uploaded files, photos or zips of photos; copy what can be used into a new folder.

    Raises:
        ValueError: the disk is full or the folder cannot be written to.
    """
    _forget_old(folder)
    own = folder / secrets.token_hex(8)
    refusals = _Refusals()
    photos: list[tuple[Photo, Path, Path]] = []
    total = 0
    with disk_explained(folder, "taking the photos"):
        (own / THUMBNAILS).mkdir(parents=True, mode=0o700)
        try:
            for name, path in _files(paths, own, refusals):
                try:
                    data = read_plain_file(path, inside=path.parent, max_bytes=MAX_PHOTO_BYTES)
                    _check_room(len(photos), total + len(data))
                    photo = check_photo(Path(name), data)
                    copy = own / f"photo-{len(photos) + 1:03d}{_plain_suffix(name)}"
                    thumbnail = own / THUMBNAILS / f"{copy.stem}.png"
                    _write_thumbnail(data, name, thumbnail)
                except UnusableFileError as reason:
                    refusals.note(name, str(reason))
                    continue
                copy.write_bytes(data)
                total += len(data)
                photos.append((photo, copy, thumbnail))
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(own / _UNPACKED, ignore_errors=True)
    return IntakeReport(tuple(_accepted(photos)), tuple(refusals))


def write_thumbnail(source: Path, target: Path) -> None:
    """Write a small PNG of a picture that was uploaded or drawn, decoded under our limits.

    Raises:
        ValueError: it is no picture that can be used.
    """
    data = read_plain_file(source, inside=source.parent, max_bytes=MAX_PHOTO_BYTES)
    _write_thumbnail(data, source.name, target)


def _files(paths: Sequence[Path], own: Path, refusals: _Refusals) -> Iterator[tuple[str, Path]]:
    """Give each file with its name for people; archives give what is in them, without its folders."""
    for number, path in enumerate(paths):
        if not path.is_file() or not is_archive(path):
            yield path.name, path
            continue
        target = own / _UNPACKED / str(number)
        try:
            files = unpack_zip(path, target)
        except ValueError as refusal:
            name = printable(path.name)
            refusals.note(path.name, str(refusal).removeprefix(f"{name}: ").removeprefix(f"{name} "))
            continue
        for file in files:
            yield file.name, file
        shutil.rmtree(target, ignore_errors=True)


def _forget_old(folder: Path) -> None:
    """Delete photos that nobody has trained on for a day."""
    for path in folder.glob("*") if folder.is_dir() else ():
        with suppress(OSError):  # another visitor may have
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(path)


def _check_room(num_photos: int, total_bytes: int) -> None:
    if num_photos >= MAX_PHOTOS:
        raise UnusableFileError(f"is more than the {MAX_PHOTOS} photos that are taken; leave some out")
    if total_bytes > MAX_TOTAL_BYTES:
        raise UnusableFileError(
            f"makes the photos larger than {MAX_TOTAL_BYTES / 2**20:g} MiB together; leave some out"
        )


def _accepted(photos: Sequence[tuple[Photo, Path, Path]]) -> Iterator[Accepted]:
    doubles = _doubles([photo for photo, _, _ in photos])
    for index, (photo, copy, thumbnail) in enumerate(photos):
        notes = [*photo.notes, *doubles.get(index, [])]
        yield Accepted(printable(photo.path.name), copy, thumbnail, "; ".join(notes))


def _doubles(photos: Sequence[Photo]) -> dict[int, list[str]]:
    """Return what `remarks_on` says of pairs, by the place of the later photo."""
    found: dict[int, list[str]] = {}
    first: dict[str, int] = {}
    for index, photo in enumerate(photos):
        other = first.setdefault(photo.pixels_sha256, index)
        if other != index:
            pair = remarks_on([photos[other], photo])
            found[index] = [remark for remark in pair if "the same" in remark]
    return found


def _write_thumbnail(data: bytes, name: str, target: Path) -> None:
    decoded = decode_bytes(data, Path(name).suffix, min_side=1, target_side=THUMBNAIL_SIDE)
    small = decoded.rgb.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small.save(target, "PNG")


def _plain_suffix(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return suffix if suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 6 else ""
