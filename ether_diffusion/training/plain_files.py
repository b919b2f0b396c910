"""Folders of other people's files: listed in a fixed order, and only plain files are ever opened."""

import errno
import os
import stat
from pathlib import Path

from ether_diffusion.adapter_file.wording import printable

NAME_LIMIT = 300
"""Characters of a file's name that a message shows: all of any name, as file systems allow 255 bytes."""

# a FIFO put in place of the file after it was looked at must not hold us up; Windows has neither flag
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {
    stat.S_IFIFO: "is a FIFO",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFDIR: "is a folder",
}


class UnusableFileError(ValueError):
    """Why a file is not used, said as what follows its name: "is empty (0 bytes); fetch it again"."""


def list_files(folder: str | Path, holding: str) -> list[Path]:
    """Return what a folder holds, without its subfolders, sorted by the bytes of the names.

    Names that differ only in Unicode normalisation stay apart. `holding` says in messages what is looked for.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, or may not be read.
    """
    shown = printable(folder, NAME_LIMIT) or "(an empty name)"
    if not str(folder) or not os.path.lexists(folder):
        raise FileNotFoundError(f"there is no folder {shown}; give the folder that holds {holding}")
    if not Path(folder).is_dir():
        raise ValueError(f"{shown} is not a folder; give the folder that holds {holding}")
    try:
        names = sorted(os.listdir(folder), key=os.fsencode)  # noqa: PTH208
    except OSError as error:
        raise ValueError(f"the folder {shown} cannot be read ({error.strerror}); change its rights") from None
    return [Path(folder, name) for name in names if not os.path.isdir(Path(folder, name))]  # noqa: PTH112


def read_plain_file(path: Path, *, inside: Path | None, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; a FIFO, socket or device is not opened.

    Links are followed to places within `inside`, and anywhere where it is None.

    Raises:
        UnusableFileError: it is no regular file, a link that leads nowhere, back or out, or too large.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
        if inside is not None and not target.is_relative_to(os.path.realpath(inside)):
            raise UnusableFileError(
                f"is a link to {printable(target, NAME_LIMIT)}, outside the folder; copy that file here, or "
                "allow links with follow_symlinks"
            )
        _refuse_unless_regular(target.stat().st_mode)  # opening a device may already do something
        with open(os.open(target, _OPEN_FLAGS), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            _refuse_unless_regular(status.st_mode)
            data = file.read(min(status.st_size, max_bytes) + 1)  # as much is set aside before reading
    except OSError as error:
        raise UnusableFileError(_why_not_opened(path, error)) from None
    if len(data) > max_bytes:
        raise UnusableFileError(f"has more than {max_bytes / 2**20:g} MiB; give a smaller file")
    return data


def _refuse_unless_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "is not a regular file")
        raise UnusableFileError(f"{kind}, which is never opened; delete it or move it away")


def _why_not_opened(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself; delete it"
    if error.errno == errno.ENOENT:
        return "is a link to nothing; delete it" if path.is_symlink() else "is gone; it was here just now"
    return f"cannot be opened ({error.strerror}); change its rights or move it away"
