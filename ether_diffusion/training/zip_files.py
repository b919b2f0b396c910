"""Zips that others send, read into memory under bounds, or refused whole."""

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

MAX_ENTRIES, MAX_BYTES = 1000, 256 * 2**20  # of an archive, and of all that is read of it together
Wanted = Callable[[PurePosixPath], bool]
_OTHERS = (b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ")  # as other archives begin
_LEFTOVERS = {"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"}  # of systems; passed over
_ENCRYPTED, _PACKED = 0x1, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError, OSError, RuntimeError)
"""What zipfile raises, beside a ValueError."""


def is_archive(data: bytes) -> bool:
    """Say whether a file begins as a zip, or as another archive, which `read_zip` refuses."""
    return data.startswith((b"PK", *_OTHERS)) or data[257:262] == b"ustar"


def read_zip(data: bytes, wanted: Wanted = lambda name: True) -> dict[str, bytes]:
    """Return the files in a zip by name, those that are wanted, after every name and size was checked."""
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
        raise UnusableFileError(f"is not a whole zip archive ({printable(error)}); pack a zip anew") from None


def _check(entries: Sequence[zipfile.ZipInfo]) -> None:
    seen, folders = set[str](), set[str]()
    for entry in entries:
        shown, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
        parts = set(shown.removesuffix("/").split("/"))
        is_path = (
            shown.isprintable() and "\\" not in shown and shown[1:2] != ":" and not {"", ".", ".."} & parts
        )
        is_file = kind in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG)
        is_open = not entry.flag_bits & _ENCRYPTED and entry.compress_type in _PACKED
        name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", shown).casefold())
        is_twice = not entry.is_dir() and name in seen
        if is_path and not entry.is_dir():
            folders |= {str(parent) for parent in PurePosixPath(name).parents}
            seen.add(name)
        if not (is_path and is_file and is_open) or is_twice or seen & folders:
            needed = "no plain, open file with a path and name of its own inside the archive"
            raise UnusableFileError(f"holds {printable(shown)}, which is {needed}; pack it anew")
    if not seen:
        raise UnusableFileError("holds no files; pack it again")
