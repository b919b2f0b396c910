"""Folders of other people's files: listed in a fixed order, and only plain files are ever opened."""

import errno
import os
import stat
from collections.abc import Collection
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
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
_LINKS = {errno.ELOOP: "is a link that leads back to itself", errno.ENOENT: "is a link to nothing"}


class UnusableFileError(ValueError):
    """Why a file is not used, said as what follows its name: "is empty (0 bytes); fetch it again"."""


def find_files(
    folder: str | Path,
    holding: str,
    *,
    without: Collection[Path] | None = (),
    follow_symlinks: bool = False,
) -> tuple[dict[str, Path], list[str]]:
    """Return the files of a folder and below by their names from there, a/b.png, in the order of their bytes.

    `holding` says in messages what is looked for. Folders `without` are left out: they have another part to
    play; where it is None, all are. Hidden ones, those of systems and of training runs, and links, unless
    `follow_symlinks`, are passed over; a remark, which comes second, tells of them.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a folder, may not be read, or has more than MAX_FILES files.
    """
    root, shown = Path(folder), printable(folder, NAME_LIMIT) or "(an empty name)"
    if not str(folder) or not os.path.lexists(folder):
        raise FileNotFoundError(f"there is no folder {shown}; give the folder that holds {holding}")
    if not root.is_dir():
        raise ValueError(f"{shown} is not a folder; give the folder that holds {holding}")
    others = {os.path.realpath(path) for path in without or ()}
    seen, found, passed_over = {os.path.realpath(root)}, list[Path](), list[str]()
    for place, folders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        found += [Path(place, name) for name in names]
        if len(found) > MAX_FILES:
            raise ValueError(f"{shown} holds more than {MAX_FILES} files; give the folder of {holding} alone")
        paths, folders[:] = [Path(place, name) for name in sorted(folders) if without is not None], []
        for path in paths:
            real = os.path.realpath(path)
            if real in others:
                continue
            reason = _why_not_entered(path, len(path.relative_to(root).parts), follow_symlinks)
            if reason is None and real in seen:
                reason = "the same folder once more"
            if reason is None:
                seen.add(real)
                folders.append(path.name)
            else:
                passed_over.append(f"{path.relative_to(root).as_posix()} ({reason})")
    by_name = {path.relative_to(root).as_posix(): path for path in found}
    remarks = [f"not looked into: {listed(sorted(passed_over))}"] if passed_over else []
    return {name: by_name[name] for name in sorted(by_name, key=os.fsencode)}, remarks


def _refuse_folder(error: OSError) -> None:
    shown = printable(error.filename, NAME_LIMIT)
    raise ValueError(f"the folder {shown} cannot be read ({error.strerror}); change its rights") from None


def _why_not_entered(path: Path, depth: int, follow_symlinks: bool) -> str | None:
    number, underscore, _ = path.name.partition("_")
    reasons = {
        "hidden": path.name.startswith("."),
        "of a system": path.name.lower() in _OF_SYSTEMS,
        "a link; follow_symlinks looks into it": path.is_symlink() and not follow_symlinks,
        "a training run": os.path.isfile(path / "run.json"),  # noqa: PTH113  # False where rights are lacking
        "0 repeats": bool(underscore) and set(number) == {"0"},  # as Photo.named_repeats reads it
        f"more than {MAX_DEPTH} folders deep": depth > MAX_DEPTH,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def read_plain_file(path: Path, *, inside: Path | None, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; a FIFO, socket or device is not opened.

    Links are followed to places within `inside`, and anywhere where it is None.

    Raises:
        UnusableFileError: it is no regular file, a link that leads nowhere, back or out, or too large.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
        if inside is not None and not target.is_relative_to(os.path.realpath(inside)):
            found = f"is a link to {printable(target, NAME_LIMIT)}, outside the folder"
            raise UnusableFileError(f"{found}; copy that file here, or allow links with follow_symlinks")
        _refuse_unless_regular(target.stat().st_mode)  # opening a device may already do something
        with open(os.open(target, _OPEN_FLAGS), "rb") as file:  # noqa: PTH123
            status = os.fstat(file.fileno())
            _refuse_unless_regular(status.st_mode)
            data = file.read(min(status.st_size, max_bytes) + 1)  # as much is set aside before reading
    except OSError as error:
        if path.is_symlink() and error.errno in _LINKS:
            raise UnusableFileError(f"{_LINKS[error.errno]}; delete it") from None
        if error.errno == errno.ENOENT:
            raise UnusableFileError("is gone; it was here just now") from None
        raise UnusableFileError(f"cannot be opened ({error.strerror}); change its rights") from None
    if len(data) > max_bytes:
        raise UnusableFileError(f"has more than {max_bytes / 2**20:g} MiB; give a smaller file")
    return data


def _refuse_unless_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "device")
        raise UnusableFileError(f"is a {kind}, which is never opened; delete it or move it away")
