"""What a run takes of its machine: seconds, memory and disk, and sentences where one of them runs out."""

import errno
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ether_diffusion.console import ran_short
from ether_diffusion.wording import printable

MIB = 2**20
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_INTERVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Phase:
    """A part of a run: seconds, and the peak of memory (bytes) of the GPU, or of the process without one."""

    name: str
    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.name}: {self.seconds:.1f} s, peak memory {self.peak_bytes / MIB:.0f} MiB"


@dataclass
class Phases:
    """Measures phases one after the other."""

    device: torch.device
    found: list[Phase] = field(default_factory=list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        began, peak, is_over, process = time.monotonic(), 0, threading.Event(), psutil.Process()

        def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, process.memory_info().rss)
                if is_over.wait(_INTERVAL_SECONDS):
                    return

        has_gpu = self.device.type == "cuda"
        watcher = threading.Thread(target=watch, daemon=True)
        if has_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            watcher.start()
        try:
            yield
        finally:
            is_over.set()
            if has_gpu:
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_allocated(self.device)
            else:
                watcher.join()
                peak = max(peak, process.memory_info().rss)
            self.found.append(Phase(name, time.monotonic() - began, peak))


@contextmanager
def shortages_explained(folder: Path) -> Iterator[None]:
    """Turn a lack of memory, or of space in a run's folder, into a ValueError on what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_short(error):
            raise
        text = str(error).splitlines()[0][:200] if str(error) else "MemoryError"
        raise ValueError(
            f"memory ran out ({text}); the last checkpoint is kept. Try --gradient_checkpointing, "
            "--mixed_precision bf16, a smaller --train_batch_size with more --gradient_accumulation_steps, "
            "or a lower --resolution, with --allow_changes to go on so; --dry_run shows what it takes"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise ValueError(f"memory ran out ({error}); the last checkpoint is kept") from error
        if error.errno not in _NO_SPACE:
            raise
        free = shutil.disk_usage(folder).free / MIB
        raise ValueError(
            f"{error.strerror}, with {free:.1f} MiB free in {printable(folder)}; the "
            "checkpoints in it are whole: free some space, and the same command goes on from the newest"
        ) from error
