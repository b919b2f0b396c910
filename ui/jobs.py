"""Jobs in threads of their own, whose events are streamed to whoever looks on."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

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
