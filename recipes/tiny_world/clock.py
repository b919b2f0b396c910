"""The clock of a training run: a time budget, laps, and pauses that count for nothing."""

import time
from pathlib import Path


class Clock:
    """Seconds since the start, without those spent paused."""

    def __init__(self, budget_minutes: float) -> None:
        self.budget_seconds = 60 * budget_minutes
        self.started = time.monotonic()
        self.laps: dict[str, float] = {}

    def seconds(self) -> float:
        """Seconds since the start that were not spent paused."""
        return time.monotonic() - self.started

    def elapsed(self) -> float:
        """Used part of the budget; 1 and more is used up."""
        return self.seconds() / self.budget_seconds

    def wait_while_exists(self, pause_file: Path | None) -> None:
        """Wait until the pause file is gone."""
        began = time.monotonic()
        while pause_file is not None and pause_file.exists():
            time.sleep(0.5)
        self.started += time.monotonic() - began

    def lap(self, name: str) -> float:
        """Seconds since the last lap of this name, or since the start; begins a new one."""
        now = self.seconds()
        seconds = now - self.laps.get(name, 0.0)
        self.laps[name] = now
        return seconds

    def is_due(self, name: str, minutes: float) -> bool:
        """Say whether the lap of this name has lasted so many minutes, and if so begin a new one."""
        if self.seconds() - self.laps.get(name, 0.0) < 60 * minutes:
            return False
        self.laps[name] = self.seconds()
        return True
