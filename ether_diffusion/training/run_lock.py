"""One process per folder: the system holds the lock on an open file, which says who it is."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout, lock_descriptor

from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import read_json
from ether_diffusion.training.plain_files import read_plain_file
from ether_diffusion.wording import printable

LOCK_NAME = ".lock"
PATIENCE_SECONDS = 2.0
"""A process that was killed holds its lock until the system has taken its memory apart."""
FOREVER = -1.0
"""Patience for what whoever holds the lock soon has done for all."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A process; `started` tells it from a later one of the same number, `since` says when it took a lock."""

    pid: int
    host: str
    started: str
    since: str = ""

    def is_gone(self) -> bool:
        """Say whether this process ended; one on another host is taken to be alive."""
        return self.host == socket.gethostname() and not self.is_here

    @property
    def is_here(self) -> bool:
        """Whether this is a living process that can be looked at: of this host, and of no other container."""
        return self.host == socket.gethostname() and process_start(self.pid) == self.started


class FolderInUseError(ValueError):
    """Another process holds the lock of a folder; `holder` is None where it has not said which."""

    def __init__(self, folder: Path, holder: Holder | None, option: str) -> None:
        self.holder, who = holder, "another process"
        if holder is not None:
            since = f" since {printable(holder.since)}" if holder.since else ""
            who = f"process {holder.pid} on {printable(holder.host)}{since}"
        self.sentence = f"{printable(folder)} is in use by {who}"
        super().__init__(f"{self.sentence}; wait for it, or give another {option}")


@contextmanager
def locked(
    folder: Path, *, option: str = "--output_dir", patience: float = PATIENCE_SECONDS
) -> Iterator[None]:
    """Hold the lock of a folder; `option` is where the message says that another one can be given.

    The system ends it with the process, however that ends, and other containers and hosts see it where their
    file system shares locks. Who holds it is a word in the file, and decides nothing. A FolderInUseError says
    that somebody held it for `patience` seconds.
    """
    path, own = folder / LOCK_NAME, holder_of(os.getpid())
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{printable(path)} is no plain file, as the folder's lock has to be; delete it")
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise FolderInUseError(folder, read_holder(path), option) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("%s has no locks (%s); start no second run in it", printable(folder), error.strerror)
    try:
        if (before := read_holder(path)) is not None:
            logger.info("took over %s from process %d, which is gone", printable(folder), before.pid)
        with suppress(OSError):  # a disk may be full: the lock holds all the same
            path.write_text(json.dumps(asdict(own)), encoding="utf-8")  # into the very file that is locked
        yield
    finally:
        with suppress(OSError):  # the folder may have gone, or be another one by now
            if read_holder(path) == own:
                path.unlink()
        lock.release()


def current_holder(folder: Path) -> Holder | None:
    """Return the process that holds the lock of a folder; None where nobody does, or has said who."""
    path = folder / LOCK_NAME
    if not path.is_file():
        return None
    with suppress(OSError), path.open("r+b") as file:
        if lock_descriptor(file.fileno(), blocking=False):
            return None  # it is given back at once, and whoever wants it has patience
    return read_holder(path)


def process_start(pid: int) -> str | None:
    """Return when a process of this host started, as text to compare, or None where there is none."""
    try:
        process, stat = psutil.Process(pid), Path(f"/proc/{pid}/stat")
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if not stat.exists():
            return str(process.create_time())
        # seconds since 1970 move with the clock; field 22, behind the name in brackets, is ticks since boot
        ticks = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {ticks}"
    except psutil.AccessDenied:
        return ""
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def holder_of(pid: int) -> Holder:
    """Return what tells a process of this host from every other, before or after."""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    return Holder(pid, socket.gethostname(), process_start(pid) or "", now)


def read_holder(path: Path) -> Holder | None:
    """Return the process that a file names; None where there is no such file or it is damaged."""
    with suppress(ValueError):  # a power cut may leave it empty
        return read_json(read_plain_file(path, inside=None, max_bytes=2**16), Holder, printable(path))
    return None


def write_holder(path: Path, holder: Holder) -> None:
    """Write a file that names a process, whole or not at all."""
    write_files(path.parent, {path.name: json.dumps(asdict(holder)).encode()})


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Keep others out of a folder for a moment, and wait for them; the system ends it with the process."""
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_descriptor(descriptor, blocking=True)
        yield
    finally:
        os.close(descriptor)
