"""Zip archives from strangers, unpacked by our own rules: refused whole, or written inside one new folder."""

import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ether_diffusion.adapter_file.wording import printable

_MIB = 2**20
_CHUNK_BYTES = _MIB
_END_BYTES, _MAX_COMMENT_BYTES = 22, 2**16 - 1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_NESTED = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ")
_NOT_ZIP = {
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
}
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LEFT_OVERS = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
"""What operating systems put into archives; it is not unpacked."""


@dataclass(frozen=True)
class ArchiveLimits:
    """What an archive may hold: bytes are those of the archive, of all its files, and of one file.

    `ratio` is how many times larger than in the archive a file over 1 MiB may be.
    """

    archive_bytes: int = 256 * _MIB
    total_bytes: int = 512 * _MIB
    file_bytes: int = 256 * _MIB
    num_entries: int = 1000
    ratio: int = 100


def is_archive(path: Path) -> bool:
    """Say whether a file is an archive of some kind, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", *_NOT_ZIP)) or _is_tar(head)


def unpack_zip(
    path: Path, folder: Path, *, name: str | None = None, limits: ArchiveLimits = ArchiveLimits()
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
            entries = [entry for entry in archive.infolist() if not _is_left_over(entry)]
            targets = _check_entries(entries, shown, limits)
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
            f"{shown} has {size / _MIB:.0f} MiB, and {limits.archive_bytes / _MIB:.0f} MiB are taken; "
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


def _check_entries(
    entries: list[zipfile.ZipInfo], shown: str, limits: ArchiveLimits
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Return each entry with its path in the folder, or refuse the first that cannot be unpacked."""
    if len(entries) > limits.num_entries:
        raise ValueError(f"{shown} holds more than {limits.num_entries} entries; pack fewer files")
    targets: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for entry in entries:
        entry_name = entry.orig_filename
        problem = _name_problem(entry_name) or _kind_problem(entry) or _size_problem(entry, limits)
        if problem is not None:
            raise ValueError(f"{shown}: {printable(entry_name)} {problem}; nothing was unpacked")
        target = PurePosixPath(entry_name)
        own = folders if entry.is_dir() else files
        other = _clash(target, files, folders, is_folder=entry.is_dir())
        if other is not None:
            raise ValueError(
                f"{shown}: {printable(entry_name)} and {printable(other)} would be one file on some "
                "systems; rename one of them"
            )
        own.setdefault(_folded(target), entry_name)
        for parent in target.parents[:-1]:
            folders.setdefault(_folded(parent), str(parent))
        targets.append((entry, target))
    if sum(entry.file_size for entry in entries) > limits.total_bytes:
        raise ValueError(
            f"{shown} unpacks to more than {limits.total_bytes / _MIB:.0f} MiB; give fewer or smaller files"
        )
    if not files:
        raise ValueError(f"{shown} holds no files; pack it again")
    return targets


def _clash(
    target: PurePosixPath, files: dict[str, str], folders: dict[str, str], *, is_folder: bool
) -> str | None:
    """Return an earlier name that a file system without cases or Unicode forms takes for the same."""
    same = files.get(_folded(target)) or (None if is_folder else folders.get(_folded(target)))
    if same is not None:
        return same
    for parent in (target, *target.parents[:-1]) if is_folder else target.parents[:-1]:
        folded = _folded(parent)
        if folded in files:
            return files[folded]
        if folders.get(folded, str(parent)).rstrip("/") != str(parent):
            return folders[folded]
    return None


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold())


def _name_problem(name: str) -> str | None:
    parts = name.rstrip("/").split("/")
    if not name.isprintable():
        return "has control or invisible characters in its name"
    if "\\" in name:
        return "has a backslash in its name"
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "is an absolute path"
    if ".." in parts:
        return "leads out of the folder"
    if any(part in ("", ".") for part in parts):
        return "is no plain path"
    if len(parts) > 8 or any(len(part.encode()) > 255 for part in parts):
        return "has too long a path"
    return None


def _kind_problem(entry: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind in _KINDS:
        return f"is {_KINDS[kind]}, which is not unpacked"
    if kind and kind not in (stat.S_IFREG, stat.S_IFDIR):
        return "is no regular file"
    if (kind == stat.S_IFDIR) != entry.is_dir() and kind:
        return "is said to be a file and a folder"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted, and there is nowhere to give a password; pack it without one"
    if entry.compress_type not in _METHODS:
        return "is packed by an uncommon method; pack it as an ordinary zip"
    return None


def _size_problem(entry: zipfile.ZipInfo, limits: ArchiveLimits) -> str | None:
    if entry.file_size > limits.file_bytes:
        return f"has more than {limits.file_bytes / _MIB:.0f} MiB"
    if entry.file_size > _MIB and entry.file_size > limits.ratio * entry.compress_size:
        return f"is over {limits.ratio} times larger than in the archive, as only traps are"
    return None


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


def _is_left_over(entry: zipfile.ZipInfo) -> bool:
    return any(part in _LEFT_OVERS for part in entry.orig_filename.split("/"))


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"
