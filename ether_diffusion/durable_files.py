"""Writing that survives a crash: aside, to the disk, then renamed; readers find whole files, old or new."""

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

_ASIDE = re.compile(r"\..+\.(?:(\d{1,9})\.part|unfinished)")


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into `folder`: all of them aside and to the disk, then renamed in the order given."""
    aside = {name: folder / f".{name}.{os.getpid()}.part" for name in files}
    try:
        for name, data in files.items():
            _write(aside[name], data)
        for name, path in aside.items():
            path.replace(folder / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    sync_folder(folder)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder that holds these files, all or none; names may have subfolders.

    What an earlier crash left unfinished is deleted; a folder that is there is a FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; it is not replaced")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    delete(unfinished)
    try:
        for name, data in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
        for inner in {(unfinished / name).parent for name in files} | {unfinished}:
            sync_folder(inner)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_folder(folder.parent)


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder of these files in the place of one that is there, or of none.

    At every instant one of the two is on the disk, whole; for an instant the older one has another name.
    """
    before, fresh = (folder.with_name(f".{folder.name}.{name}.unfinished") for name in ("before", "new"))
    delete(before)
    delete(fresh)
    write_folder(fresh, files)
    if folder.exists():
        folder.rename(before)
    fresh.rename(folder)
    delete(before)
    sync_folder(folder.parent)


def delete_unfinished(folder: Path, *, is_shared: bool = False) -> None:
    """Delete what crashes left unfinished in a folder and its subfolders.

    Nobody else may write there, or it `is_shared`: then only files of processes that ended are deleted.
    """
    for path in list(folder.rglob(".*")):
        match = _ASIDE.fullmatch(path.name)
        if match and not (is_shared and (match[1] is None or psutil.pid_exists(int(match[1])))):
            delete(path)


def delete(path: Path) -> None:
    """Delete a file, or a folder with what is in it, as far as that may be; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
