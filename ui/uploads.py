"""Photos from visitors: decoded whole by us, copied under names of our own, noted in their browser."""

import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ether_diffusion.training.photos import Photo, check_photo, remarks_on
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.archives import MAX_BYTES, archive_kind, read_zip
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.thumbnails import thumbnail_png
from ether_diffusion.wording import printable

MAX_PHOTO_BYTES = 64 * 2**20
MAX_PHOTOS = 200
MAX_TOTAL_BYTES = 2**30
"""Of all photos of one subject."""
_TOO_LARGE = UnusableFileError(f"has more than {MAX_PHOTO_BYTES / 2**20:g} MiB; give a smaller file")
_KEPT_SECONDS = 24 * 3600
_THUMBNAILS = "thumbnails"
_FOLDER = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"photo-\d{3}(\.[a-z0-9]{1,6})?", re.ASCII)
_MAX_CHARACTERS = 300

Note = list[str]
"""A photo as the browser keeps it: our folder, our file, its name for people, the remark on it."""


@dataclass(frozen=True)
class Accepted:
    """A photo that can be used: its name for people, escaped, and our copy of it.

    `note` says what decoding does to it, or which other photo it repeats; empty if nothing is notable.
    """

    name: str
    path: Path
    note: str

    @property
    def thumbnail(self) -> Path:
        """Our thumbnail of it."""
        return self.path.parent / _THUMBNAILS / f"{self.path.stem}.png"


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


def take_photos(paths: Sequence[Path], folder: Path) -> IntakeReport:
    """Check uploaded files, photos or zips of photos; copy what can be used into a new folder.

    Raises:
        ValueError: the disk is full or the folder cannot be written to.
    """
    own, accepted, refused = folder / secrets.token_hex(8), list[Accepted](), list[Refused]()
    photos, total = list[Photo](), 0
    with disk_explained(folder, "taking the photos"):
        _forget_old(folder)
        (own / _THUMBNAILS).mkdir(parents=True, mode=0o700)
        try:
            for name, data in _files(paths):
                try:
                    if isinstance(data, UnusableFileError):
                        raise data
                    _check_room(len(photos), total + len(data))
                    photo = check_photo(Path(name), data)
                    suffix = Path(name).suffix.lower()
                    copy = own / f"photo-{len(photos) + 1:03d}{suffix}"
                    if not _FILE.fullmatch(copy.name):
                        copy = copy.with_suffix("")
                    kept = Accepted(printable(name), copy, "; ".join(photo.notes))
                    kept.thumbnail.write_bytes(thumbnail_png(data, suffix))
                except UnusableFileError as reason:
                    refused.append(Refused(printable(name), str(reason)))
                    continue
                copy.write_bytes(data)
                total += len(data)
                same = next((each for each in photos if each.pixels_sha256 == photo.pixels_sha256), None)
                pair = () if same is None else remarks_on([same, photo])
                doubles = [remark for remark in pair if "the same" in remark]
                photos.append(photo)
                accepted.append(replace(kept, note="; ".join([*photo.notes, *doubles])))
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
    return IntakeReport(tuple(accepted), tuple(refused))


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, bytes | UnusableFileError]]:
    """Give each file, or why there is none, by its name; archives give what is in them, without folders."""
    for path in paths:
        try:
            data = read_plain_file(path, inside=path.parent, max_bytes=MAX_BYTES)
            is_photo = archive_kind(data) is None
            for name, each in ({path.name: data} if is_photo else read_zip(data)).items():
                yield PurePosixPath(name).name, each if len(each) <= MAX_PHOTO_BYTES else _TOO_LARGE
        except UnusableFileError as reason:
            yield path.name, reason


def _forget_old(folder: Path) -> None:
    """Delete photos that nobody has trained on for a day."""
    for path in folder.glob("*"):
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


def add_photos(earlier: Sequence[Accepted], report: IntakeReport) -> IntakeReport:
    """Add photos to those that are there already; what is there is not taken again."""
    photos, refused = list(earlier), list(report.refused)
    known = {photo.thumbnail.read_bytes(): photo.name for photo in earlier}
    for photo in report.accepted:
        other = known.get(photo.thumbnail.read_bytes())
        if other is not None:
            refused.append(Refused(photo.name, f"is the same picture as {other}, which was added before"))
        elif len(photos) >= MAX_PHOTOS:
            refused.append(Refused(photo.name, f"is more than the {MAX_PHOTOS} photos that are taken"))
        else:
            photos.append(photo)
    return IntakeReport(tuple(photos), tuple(refused))


def note_photos(photos: Sequence[Accepted]) -> list[Note]:
    """Return photos as the browser keeps them."""
    return [[photo.path.parent.name, photo.path.name, photo.name, photo.note] for photo in photos]


def recall_photos(kept: object, folder: Path) -> list[Accepted]:
    """Return the photos that a browser says it added, as far as they still are in `folder`.

    Whatever it says, nothing but our own copies is reached.
    """
    found = []
    for each in kept[:MAX_PHOTOS] if isinstance(kept, list) else []:
        if not isinstance(each, list) or len(each) != 4 or not all(isinstance(word, str) for word in each):
            continue
        own, file, name, note = each
        if _FOLDER.fullmatch(own) and _FILE.fullmatch(file):
            path, words = folder / own / file, [printable(text, _MAX_CHARACTERS) for text in (name, note)]
            photo = Accepted(words[0], path, words[1])
            if photo.path.is_file() and photo.thumbnail.is_file():
                found.append(photo)
    return found
