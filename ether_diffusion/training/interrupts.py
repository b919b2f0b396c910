"""SIGINT and SIGTERM, noted: the step in progress ends and is saved before the process is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(Exception):
    """The run was asked to stop; exit_code is the shell's for that signal: 130 or 143."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class StoppedAtOnceError(InterruptedRunError):
    """It was asked twice: what is in memory may be half done, and is not saved."""


class Interrupts:
    """While it is entered, a signal is noted instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def check(self) -> None:
        """Stop here if a signal came.

        Raises:
            InterruptedRunError: one came.
        """
        if self.signal_number is not None:
            raise InterruptedRunError(self.signal_number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise StoppedAtOnceError(number)
        self.signal_number = number


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off what this thread gets of both signals, and processes it starts until they release_signals.

    Nothing is put off where there are no signal masks, as on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """Let a process that was started while signals were held have them again."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
