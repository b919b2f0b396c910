"""Zip archives from strangers: read into memory under bounds, or refused whole; nothing is ever unpacked."""

import io
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import printable

MAX_ENTRIES = 1000
MAX_BYTES = 256 * 2**20
"""Of all that is read of an archive together."""
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


def archive_kind(data: bytes) -> str | None:
    """Return what archive a file is, by its first bytes, or None."""
    if data[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for opening, kind in _OPENINGS.items() if data.startswith(opening)), None)


def read_zip(data: bytes, wanted: Callable[[PurePosixPath], bool] = lambda name: True) -> dict[str, bytes]:
    """Return the files in a zip archive by name; those that are not wanted are not read.

    Every name and size is checked before anything is read.

    Raises:
        UnusableFileError: it is no whole zip archive, or holds what nobody would pack; it reads on from the
            archive's name.
    """
    kind = archive_kind(data)
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
