"""One process per folder: a lock that names its holder, and is taken over when that process is gone."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ether_diffusion.adapter_file.strict_json import is_whole, parse_json
from ether_diffusion.adapter_file.wording import printable

LOCK_NAME = ".lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `started` tells it from a later process of the same number."""

    pid: int
    host: str
    started: str

    def is_gone(self) -> bool:
        """Say whether this process ended; one on another host is taken to be alive."""
        return self.is_here and process_start(self.pid) != self.started

    @property
    def is_here(self) -> bool:
        """Whether this is a process of this host, which can be looked at."""
        return self.host == socket.gethostname()


@contextmanager
def locked(folder: Path, *, option: str = "--output_dir") -> Iterator[None]:
    """Hold the lock of a folder; `option` is where the message says that another one can be given.

    Raises:
        ValueError: a living process holds it, or one on another host.
    """
    path, own = folder / LOCK_NAME, holder_of(os.getpid())
    with guarded(folder):
        holder = read_holder(path)
        if holder is not None and not holder.is_gone():
            raise ValueError(
                f"{printable(folder)} is in use by process {holder.pid} on {printable(holder.host)}; wait "
                f"for it, give another {option}, or, if it is surely gone, delete {printable(path)}"
            )
        if holder is not None:
            logger.info("took over %s from process %d, which is gone", printable(folder), holder.pid)
        write_holder(path, own)
    try:
        yield
    finally:
        with guarded(folder):
            if read_holder(path) == own:
                path.unlink(missing_ok=True)


def process_start(pid: int) -> str | None:
    """Return when a process of this host started, as text to compare, or None where there is none.

    Where the system does not say when, the text is empty.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # the name in brackets may hold anything; field 22 is the start in ticks since booting
            text = stat.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = text.rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return None if fields[0] == "Z" else f"{boot} {fields[19]}"
    if os.name != "posix":
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def holder_of(pid: int) -> Holder:
    """Return what tells a process of this host from every other, before or after."""
    return Holder(pid, socket.gethostname(), process_start(pid) or "")


def read_holder(path: Path) -> Holder | None:
    """Return the process that a file names; None where there is no such file or it is damaged."""
    try:
        value = parse_json(path.read_bytes(), printable(path))
    except (FileNotFoundError, ValueError):
        return None  # a power cut may leave it empty; nobody holds it then
    if not isinstance(value, dict) or value.keys() != {"pid", "host", "started"}:
        return None
    pid, host, started = value["pid"], value["host"], value["started"]
    if not (is_whole(pid) and isinstance(host, str) and isinstance(started, str)):
        return None
    assert isinstance(pid, int)
    return Holder(pid, host, started)


def write_holder(path: Path, holder: Holder) -> None:
    """Write a file that names a process, whole or not at all."""
    aside = path.with_name(f"{path.name}.{holder.pid}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(holder), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Keep others out while the lock is looked at and changed; the system ends it with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
