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
        return self.host == socket.gethostname() and process_start(self.pid) != self.started


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        ValueError: a living process holds it, or one on another host.
    """
    path, own = folder / LOCK_NAME, _this_process()
    with _guarded(folder):
        holder = _read(path)
        if holder is not None and not holder.is_gone():
            raise ValueError(
                f"{printable(folder)} is in use by process {holder.pid} on {printable(holder.host)}; wait "
                f"for it, give another --output_dir, or, if it is surely gone, delete {printable(path)}"
            )
        if holder is not None:
            logger.info("took over %s from process %d, which is gone", printable(folder), holder.pid)
        _write(path, own)
    try:
        yield
    finally:
        with _guarded(folder):
            if _read(path) == own:
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


def _this_process() -> Holder:
    return Holder(os.getpid(), socket.gethostname(), process_start(os.getpid()) or "")


def _read(path: Path) -> Holder | None:
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


def _write(path: Path, holder: Holder) -> None:
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
def _guarded(folder: Path) -> Iterator[None]:
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
