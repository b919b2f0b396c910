"""What visitors send: zips, read under bounds or refused whole, and photos, decoded and copied by us."""

import io
import re
import secrets
import shutil
import stat
import struct
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from ether_diffusion.training.decoding import decode_bytes
from ether_diffusion.training.photos import Photo, check_photo, remarks_on
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.facts import picture_address
from ether_diffusion.wording import printable

MAX_ENTRIES = 1000
MAX_BYTES = 256 * 2**20
"""Of a file, and of all that is read of an archive together."""
Wanted = Callable[[PurePosixPath], bool]
_OPENINGS = {
    b"PK": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
}
_LEFTOVERS = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}
"""What operating systems put into archives; it is passed over."""
_ENCRYPTED = 0x1
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError, OSError, RuntimeError)
"""What zipfile raises, beside a ValueError."""
SIDE = 256
"""Longer side of a thumbnail's file, in px."""
MAX_PHOTO_BYTES = 64 * 2**20
MAX_PHOTOS = 200
MAX_TOTAL_BYTES = 2**30
"""Of all photos of one subject."""
_KEPT_SECONDS = 24 * 3600
_THUMBNAILS = "thumbnails"
_FOLDER = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"photo-\d{3}(\.[a-z0-9]{1,6})?", re.ASCII)
_MAX_CHARACTERS = 300


def read_sent(path: Path, wanted: Wanted = lambda name: True) -> dict[str, bytes]:
    """Return what a visitor sent as one file: itself by its name, or the files in an archive by theirs.

    Raises:
        UnusableFileError: as `read_zip`, or it is too large, or no plain file.
    """
    data = read_plain_file(path, inside=path.parent, max_bytes=MAX_BYTES)
    return {path.name: data} if _archive_kind(data) is None else read_zip(data, wanted)


def _archive_kind(data: bytes) -> str | None:
    """Return what archive a file is, by its first bytes, or None."""
    if data[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for opening, kind in _OPENINGS.items() if data.startswith(opening)), None)


def read_zip(data: bytes, wanted: Wanted = lambda name: True) -> dict[str, bytes]:
    """Return the files in a zip archive by name; those that are not wanted are not read.

    Every name and size is checked before anything is read.

    Raises:
        UnusableFileError: it is no whole zip archive, or holds what nobody would pack; it reads on from the
            archive's name.
    """
    kind = _archive_kind(data)
    if kind not in ("a zip archive", None):
        raise UnusableFileError(f"is {kind}; pack the files as a zip")
    if data.count(b"PK\x01\x02") > MAX_ENTRIES:  # before zipfile makes an object of each
        raise UnusableFileError(f"holds more than {MAX_ENTRIES} entries; pack fewer files")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [e for e in archive.infolist() if not _LEFTOVERS & set(e.orig_filename.split("/"))]
            _check(entries)
            files = [e for e in entries if not e.is_dir() and wanted(PurePosixPath(e.filename))]
            if sum(entry.file_size for entry in files) > MAX_BYTES:
                raise UnusableFileError(f"unpacks to more than {MAX_BYTES // 2**20} MiB; give fewer files")
            return {entry.filename: archive.read(entry) for entry in files}  # no more than it claims to be
    except UnusableFileError:
        raise
    except (*_DAMAGED, ValueError) as error:
        raise UnusableFileError(f"is not a whole zip archive ({printable(error)}); pack it again") from None


def _check(entries: Sequence[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    folders: set[str] = set()
    for entry in entries:
        name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", entry.orig_filename).casefold())
        problem = _problem(entry)
        if problem is None and not entry.is_dir():
            folders |= {str(parent) for parent in PurePosixPath(name).parents}
            problem = "has the name of another entry, on some systems" if name in seen else None
            seen.add(name)
        if problem is not None:
            raise UnusableFileError(f"holds {printable(entry.orig_filename)}, which {problem}; pack it anew")
    if not seen:
        raise UnusableFileError("holds no files; pack it again")
    if seen & folders:
        raise UnusableFileError(f"holds {printable(min(seen & folders))} as file and folder; pack it anew")


def _problem(entry: zipfile.ZipInfo) -> str | None:
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    parts = name.removesuffix("/").split("/")
    if not name.isprintable() or "\\" in name or name[1:2] == ":" or {"", ".", ".."} & set(parts):
        return "is no plain path inside the archive"
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        return "is a link, a device or no regular file"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted, and there is nowhere to give a password"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed by an uncommon method"
    return None


def thumbnail_png(data: bytes, suffix: str) -> bytes:
    """Return a small PNG of a picture that was uploaded or drawn, decoded under our limits.

    Raises:
        UnusableFileError: it is no picture that can be used.
    """
    decoded = decode_bytes(data, suffix, min_side=1, target_side=SIDE)
    small, buffer = decoded.rgb.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "PNG")
    return buffer.getvalue()


def data_address(path: Path, side: int) -> str | None:
    """Return a picture of ours, `side` px at most, as a data address; None if gone or half written."""
    try:
        status = path.stat()
        return _encoded(path, side, status.st_mtime_ns, status.st_size)
    except OSError:  # Pillow's errors on damaged files are among these
        return None


@lru_cache(maxsize=512)
def _encoded(path: Path, side: int, time: int, size: int) -> str:
    """Encode a file, once until it changes."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture_address(small, "WEBP", quality=85)


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

    @property
    def kept(self) -> list[str]:
        """What the browser keeps of it: our folder, our file, its name for people, the remark on it."""
        return [self.path.parent.name, self.path.name, self.name, self.note]


class Refused(NamedTuple):
    """A file that is not used, by its escaped name, and why."""

    name: str
    reason: str


class IntakeReport(NamedTuple):
    """What became of uploaded files, in the order that they were given."""

    accepted: list[Accepted]
    refused: list[Refused]


def take_photos(paths: Sequence[Path], folder: Path, earlier: Sequence[Accepted] = ()) -> IntakeReport:
    """Check uploaded files, photos or zips of photos; copy what can be used into a new folder.

    What is among the `earlier` ones of the same subject is not taken again.

    Raises:
        ValueError: the disk is full or the folder cannot be written to.
    """
    own, report, photos = folder / secrets.token_hex(8), IntakeReport([], []), dict[str, Photo]()
    total = sum(photo.path.stat().st_size for photo in earlier)
    known = {photo.thumbnail.read_bytes(): photo.name for photo in earlier}
    with disk_explained(folder, "taking the photos"):
        _forget_old(folder)
        (own / _THUMBNAILS).mkdir(parents=True, mode=0o700)
        try:
            for name, data in _files(paths):
                try:
                    if isinstance(data, UnusableFileError):
                        raise data
                    number = len(report.accepted) + 1
                    _check_room(len(data), len(earlier) + number, total + len(data))
                    photo, suffix = check_photo(Path(name), data), Path(name).suffix.lower()
                    small = thumbnail_png(data, suffix)
                    if small in known:
                        same = f"is the same picture as {known[small]}, which was added before"
                        raise UnusableFileError(same)
                except UnusableFileError as reason:
                    report.refused.append(Refused(printable(name), str(reason)))
                    continue
                first = photos.setdefault(photo.pixels_sha256, photo)
                doubles = [] if first is photo else remarks_on([first, photo])
                notes = [*photo.notes, *(remark for remark in doubles if "the same" in remark)]
                file = f"photo-{number:03d}"
                file += suffix if _FILE.fullmatch(f"{file}{suffix}") else ""
                kept = Accepted(printable(name), own / file, "; ".join(notes))
                kept.thumbnail.write_bytes(small)
                kept.path.write_bytes(data)
                report.accepted.append(kept)
                total += len(data)
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
    return report


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, bytes | UnusableFileError]]:
    """Give each file, or why there is none, by its name; archives give what is in them, without folders."""
    for path in paths:
        try:
            for name, data in read_sent(path).items():
                yield PurePosixPath(name).name, data
        except UnusableFileError as reason:
            yield path.name, reason


def _check_room(num_bytes: int, num_photos: int, total: int) -> None:
    if num_bytes > MAX_PHOTO_BYTES:
        raise UnusableFileError(f"has more than {MAX_PHOTO_BYTES / 2**20:g} MiB; give a smaller file")
    if num_photos > MAX_PHOTOS:
        raise UnusableFileError(f"is more than the {MAX_PHOTOS} photos that are taken; leave some out")
    if total > MAX_TOTAL_BYTES:
        raise UnusableFileError(
            f"makes the photos larger than {MAX_TOTAL_BYTES / 2**20:g} MiB together; leave some out"
        )


def _forget_old(folder: Path) -> None:
    """Delete photos that nobody has trained on for a day."""
    for path in folder.glob("*"):
        with suppress(OSError):  # another visitor may have
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(path)


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
            words = [printable(text, _MAX_CHARACTERS) for text in (name, note)]
            photo = Accepted(words[0], folder / own / file, words[1])
            if photo.path.is_file() and photo.thumbnail.is_file():
                found.append(photo)
    return found
