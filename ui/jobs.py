"""Jobs in threads of their own, whose events are streamed to whoever looks on."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ether_diffusion.ui.events import Previewing, StopToken, Waiting

E = TypeVar("E")
HEARTBEAT_SECONDS = 0.5
"""After this long without news the last state is told again, so that a closed page is noticed."""


@dataclass(frozen=True)
class _End:
    """The work is over; the error is raised in the thread that looks on."""

    error: BaseException | None


class Job(Generic[E]):
    """Work that emits events, and whose thread goes on to a safe end whoever looks away."""

    def __init__(self, work: Callable[[Callable[[E], None]], None], stop: StopToken) -> None:
        self._work, self._stop = work, stop
        self._events: queue.SimpleQueue[E | _End] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="studio job", daemon=True)

    def events(self) -> Iterator[E]:
        """Start the work and yield what it emits; closing the iterator stops the work.

        States that newer ones have overtaken are left out; without news the last one is told again.
        """
        self._thread.start()
        state: E | None = None
        try:
            while True:
                event = self._next(state)
                if isinstance(event, _End):
                    if event.error is not None:
                        raise event.error
                    return
                state = event if _is_state(event) else state
                yield event
        finally:
            self._stop.stop()

    def join(self, timeout: float) -> None:
        """Wait until the work is over, seconds at most."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _next(self, state: E | None) -> E | _End:
        """Return the next event that none has overtaken, or the state again."""
        while True:
            try:
                event = self._events.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                if state is not None:
                    return state
                continue
            if isinstance(event, _End) or not _is_state(event) or self._events.empty():
                return event
            state = event

    def _run(self) -> None:
        try:
            self._work(self._events.put)
        except BaseException as error:  # is raised where somebody can tell of it
            self._events.put(_End(error))
        else:
            self._events.put(_End(None))


def _is_state(event: object) -> bool:
    return isinstance(event, Waiting | Previewing)


class Stoppable(Protocol):
    """A job that can be told to stop."""

    def stop(self) -> None: ...


class RunningJobs:
    """What each visitor has running, so that Stop stops theirs and nobody else's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, list[Stoppable]] = {}

    @contextmanager
    def hold(self, visitor: str | None, job: Stoppable) -> Iterator[None]:
        """Know the job as the visitor's while the block runs; leaving it, a closed tab included, stops it."""
        name = visitor or ""
        with self._lock:
            self._jobs.setdefault(name, []).append(job)
        try:
            yield
        finally:
            job.stop()
            with self._lock:
                self._jobs[name].remove(job)
                if not self._jobs[name]:
                    del self._jobs[name]

    def stop(self, visitor: str | None) -> int:
        """Tell the jobs of a visitor to stop and return how many there were."""
        with self._lock:
            jobs = list(self._jobs.get(visitor or "", ()))
        for job in jobs:
            job.stop()
        return len(jobs)
