"""Folders of other people's files: listed in a fixed order, and only plain files are ever opened."""

import errno
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.wording import listed, printable

NAME_LIMIT = 300
"""Characters of a file's name that a message shows: all of any name, as file systems allow 255 bytes."""

MAX_FILES = 100_000
"""In a folder and below: more are a whole disk, given by mistake."""
MAX_DEPTH = 16
_OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}

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


@dataclass(frozen=True)
class FoundFiles:
    """The files in a folder and below, by their names from there, a/b.png; and a remark on others, if any."""

    files: dict[str, Path]
    remarks: tuple[str, ...]


def find_files(
    folder: str | Path,
    holding: str,
    *,
    without: Collection[Path] | None = (),
    follow_symlinks: bool = False,
) -> FoundFiles:
    """Return what a folder and its subfolders hold, sorted by the bytes of the names.

    Names that differ only in Unicode normalisation stay apart. `holding` says in messages what is looked for.
    Folders `without` are left out: they have another part to play; where it is None, all are. Hidden ones,
    those of systems and of training runs, and links, unless `follow_symlinks`, are passed over and told of.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, may not be read, or has more than MAX_FILES files.
    """
    shown = printable(folder, NAME_LIMIT) or "(an empty name)"
    if not str(folder) or not os.path.lexists(folder):
        raise FileNotFoundError(f"there is no folder {shown}; give the folder that holds {holding}")
    if not Path(folder).is_dir():
        raise ValueError(f"{shown} is not a folder; give the folder that holds {holding}")
    root, others = Path(folder), {os.path.realpath(path) for path in without or ()}
    seen, found, passed_over, waiting = {os.path.realpath(root)}, [], [], [root]
    while waiting:
        for path in _entries(waiting.pop()):
            if not os.path.isdir(path):  # noqa: PTH112
                found.append(path)
                continue
            real = os.path.realpath(path)
            if without is None or real in others:
                continue
            reason = _why_not_entered(path, root, follow_symlinks=follow_symlinks)
            if reason is None and real in seen:
                reason = "the same folder once more"
            if reason is not None:
                passed_over.append(f"{path.relative_to(root).as_posix()} ({reason})")
                continue
            seen.add(real)
            waiting.append(path)
        if len(found) > MAX_FILES:
            raise ValueError(f"{shown} holds more than {MAX_FILES} files; give the folder of {holding} alone")
    by_name = {path.relative_to(root).as_posix(): path for path in found}
    names = sorted(by_name, key=os.fsencode)
    remarks = (f"not looked into: {listed(sorted(passed_over))}",) if passed_over else ()
    return FoundFiles({name: by_name[name] for name in names}, remarks)


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(folder, name) for name in sorted(os.listdir(folder), key=os.fsencode)]  # noqa: PTH208
    except OSError as error:
        shown = printable(folder, NAME_LIMIT)
        raise ValueError(f"the folder {shown} cannot be read ({error.strerror}); change its rights") from None


def _why_not_entered(path: Path, root: Path, *, follow_symlinks: bool) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.name.lower() in _OF_SYSTEMS:
        return "of a system"
    if path.is_symlink() and not follow_symlinks:
        return "a link; follow_symlinks looks into it"
    if (path / "run.json").is_file():
        return "a training run"
    if set(path.name.partition("_")[0]) == {"0"} and "_" in path.name:
        return "0 repeats"  # as Photo.named_repeats reads it
    return f"more than {MAX_DEPTH} folders deep" if len(path.relative_to(root).parts) > MAX_DEPTH else None


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
