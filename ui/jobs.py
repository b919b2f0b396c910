"""Jobs in threads of their own, one at a time over the machine, whose events are streamed to who looks on."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from ether_diffusion.ui.events import Previewing, StopToken, Waiting

E = TypeVar("E")
HEARTBEAT_SECONDS = 0.5
"""After this long without news the last state is told again, so that a closed page is noticed."""
MAX_WAITING = 32
_POLL_SECONDS = 0.05


class Line:
    """A lock with a queue: first come, first served, and everybody knows their place."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[object] = []

    @property
    def is_free(self) -> bool:
        """Whether nobody works and nobody waits."""
        with self._changed:
            return not self._tickets

    @contextmanager
    def turn(self, stop: StopToken, on_wait: Callable[[int], None]) -> Iterator[None]:
        """Wait until all who came before are done and hold the lock inside; `on_wait` hears one's place.

        Raises:
            Stopped: the token was stopped while waiting.
            ValueError: MAX_WAITING wait already.
        """
        ticket, told = object(), 0
        with self._changed:
            if len(self._tickets) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} jobs wait already; try again when some are done")
            self._tickets.append(ticket)
        try:
            with self._changed:
                while (place := self._tickets.index(ticket)) > 0:
                    stop.check()
                    if place != told:
                        told = place
                        on_wait(place)
                    self._changed.wait(_POLL_SECONDS)
            yield
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()


class Job(Generic[E]):
    """Work that emits events, and whose thread goes on to a safe end whoever looks away."""

    def __init__(self, work: Callable[[Callable[[E], None]], None], stop: StopToken) -> None:
        self.stop = stop
        self._work = work
        self._told: queue.SimpleQueue[Callable[[], E | None]] = queue.SimpleQueue()
        """Each gives an event, None at the end of the work, or raises what the work raised."""
        self._thread = threading.Thread(target=self._run, name="studio job", daemon=True)

    def events(self) -> Iterator[E]:
        """Start the work and yield what it emits; closing the iterator stops the work.

        States that newer ones have overtaken are left out; without news the last one is told again.
        """
        self._thread.start()
        state: E | None = None
        try:
            while True:
                try:
                    event = self._told.get(timeout=HEARTBEAT_SECONDS)()
                except queue.Empty:
                    if state is not None:
                        yield state
                    continue
                if event is None:
                    return
                if isinstance(event, Waiting | Previewing):
                    state = event
                    if not self._told.empty():
                        continue
                yield event
        finally:
            self.stop.stop()

    def join(self, timeout: float) -> None:
        """Wait until the work is over, seconds at most."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._work(lambda event: self._told.put(lambda: event))
        except BaseException as error:  # is raised where somebody can tell of it
            self._told.put(lambda found=error: _raise(found))  # type: ignore[misc]
        else:
            self._told.put(lambda: None)


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


def _raise(error: BaseException) -> None:
    raise error
