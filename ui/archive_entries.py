"""What an entry of a zip archive may be: a plain file or folder, of a plain name, of a size in bounds."""

import stat
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath

from ether_diffusion.wording import printable

MIB = 2**20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
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

    archive_bytes: int = 256 * MIB
    total_bytes: int = 512 * MIB
    file_bytes: int = 256 * MIB
    num_entries: int = 1000
    ratio: int = 100


DEFAULT_LIMITS = ArchiveLimits()


def is_left_over(entry: zipfile.ZipInfo) -> bool:
    """Say whether an entry is what an operating system put there."""
    return any(part in _LEFT_OVERS for part in entry.orig_filename.split("/"))


def check_entries(
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
            f"{shown} unpacks to more than {limits.total_bytes / MIB:.0f} MiB; give fewer or smaller files"
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
        return f"has more than {limits.file_bytes / MIB:.0f} MiB"
    if entry.file_size > MIB and entry.file_size > limits.ratio * entry.compress_size:
        return f"is over {limits.ratio} times larger than in the archive, as only traps are"
    return None
