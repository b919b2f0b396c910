"""Where a run's seconds and memory go, phase by phase."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

_INTERVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Phase:
    """A part of a run: seconds, and the peak of memory (bytes) while it went on.

    The memory is the GPU's where there is one, else the process's.
    """

    name: str
    seconds: float
    peak_bytes: int


@dataclass
class Phases:
    """Measures phases one after the other."""

    device: torch.device
    found: list[Phase] = field(default_factory=list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        began = time.monotonic()
        with _peak(self.device) as peak:
            yield
        self.found.append(Phase(name, time.monotonic() - began, peak[0]))


@contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Give a list whose only entry is, after the block, the peak of memory inside it."""
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process, stop = psutil.Process(), threading.Event()
    peak[0] = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(_INTERVAL_SECONDS):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak[0] = max(peak[0], process.memory_info().rss)
