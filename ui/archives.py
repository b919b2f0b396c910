"""Zip archives from strangers, unpacked by our own rules: refused whole, or written inside one new folder."""

import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ether_diffusion.ui.archive_entries import DEFAULT_LIMITS, MIB, ArchiveLimits, check_entries, is_left_over
from ether_diffusion.wording import printable

_CHUNK_BYTES = MIB
_END_BYTES, _MAX_COMMENT_BYTES = 22, 2**16 - 1
_NESTED = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ")
_NOT_ZIP = {
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
}


def is_archive(path: Path) -> bool:
    """Say whether a file is an archive of some kind, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", *_NOT_ZIP)) or _is_tar(head)


def unpack_zip(
    path: Path, folder: Path, *, name: str | None = None, limits: ArchiveLimits = DEFAULT_LIMITS
) -> list[Path]:
    """Unpack a zip archive into a folder that is made for it, and return its files by sorted path.

    `name` is what messages call the archive. All names and sizes are checked before anything is written, and
    sizes again while it is; what was refused leaves no folder.

    Raises:
        ValueError: it is no zip archive, or holds what is not unpacked; the message names the entry.
        FileExistsError: there is such a folder.
    """
    shown = printable(path.name if name is None else name)
    with path.open("rb") as file:
        _check_end(file, shown, limits)
        with _explained(shown), zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not is_left_over(entry)]
            targets = check_entries(entries, shown, limits)
            folder.mkdir(parents=True, mode=0o700)
            try:
                _write_all(archive, targets, folder, shown, limits)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return sorted(folder / target for entry, target in targets if not entry.is_dir())


def _check_end(file: BinaryIO, shown: str, limits: ArchiveLimits) -> None:
    """Refuse by the archive's end record, before its list of entries is read into memory."""
    head = file.read(512)
    size = file.seek(0, 2)
    if size > limits.archive_bytes:
        raise ValueError(
            f"{shown} has {size / MIB:.0f} MiB, and {limits.archive_bytes / MIB:.0f} MiB are taken; "
            "give fewer or smaller files"
        )
    if head.startswith(b"PK\x07\x08"):
        raise ValueError(f"{shown} is one part of a split archive; join the parts into one zip")
    for opening, kind in _NOT_ZIP.items():
        if head.startswith(opening):
            raise ValueError(f"{shown} is {kind}; pack the files as a zip")
    if _is_tar(head):
        raise ValueError(f"{shown} is a tar archive; pack the files as a zip")
    file.seek(max(0, size - _END_BYTES - _MAX_COMMENT_BYTES))
    tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    if tail[-_END_BYTES:-18] == b"PK\x05\x06" and tail.endswith(b"\0\0"):  # as zipfile looks for it
        place = len(tail) - _END_BYTES
    if place < 0 or len(tail) - place < _END_BYTES:
        raise ValueError(f"{shown} is not a whole zip archive; fetch or pack it again")
    disk, first_disk, _, num_entries, list_bytes = struct.unpack("<4HL", tail[place + 4 : place + 16])
    if tail[max(0, place - 20) : place].startswith(b"PK\x06\x07"):
        raise ValueError(f"{shown} is a Zip64 archive, as for over 4 GiB; pack fewer files")
    if disk or first_disk:
        raise ValueError(f"{shown} is one part of a split archive; join the parts into one zip")
    if num_entries > limits.num_entries or list_bytes > limits.num_entries * 512:
        raise ValueError(f"{shown} holds more than {limits.num_entries} entries; pack fewer files")
    file.seek(0)


def _write_all(
    archive: zipfile.ZipFile,
    targets: list[tuple[zipfile.ZipInfo, PurePosixPath]],
    folder: Path,
    shown: str,
    limits: ArchiveLimits,
) -> None:
    left = limits.total_bytes
    for entry, target in targets:
        path = folder / target
        (path if entry.is_dir() else path.parent).mkdir(parents=True, exist_ok=True)
        if not entry.is_dir():
            with _explained(f"{shown}: {printable(entry.orig_filename)}"):
                left -= _write(archive, entry, path, min(left, entry.file_size), shown)


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int, shown: str) -> int:
    """Write one entry, at most `limit` bytes of it, and return how many it has."""
    named, size = printable(entry.orig_filename), 0
    with archive.open(entry) as source, path.open("xb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            if size == 0 and (chunk.startswith(_NESTED) or _is_tar(chunk[:512])):
                raise ValueError(f"{shown}: {named} is an archive inside the archive; unpack it first")
            size += len(chunk)
            if size > limit:
                raise ValueError(f"{shown}: {named} is larger than the archive says; pack it again")
            file.write(chunk)
    return size


@contextmanager
def _explained(shown: str) -> Iterator[None]:
    """Turn what zipfile finds wrong into one sentence."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{shown} is damaged ({printable(error)}); fetch or pack it again") from None


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"
