"""The one lock over the machine: first come, first served, and everybody knows their place."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ether_diffusion.ui.events import Stopped, StopToken

MAX_WAITING = 32
_POLL_SECONDS = 0.05


class Line:
    """A lock with a queue: who is first works, the others wait in the order they came."""

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
        ticket = self._enter()
        try:
            self._wait(ticket, stop, on_wait)
            yield
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _enter(self) -> object:
        with self._changed:
            if len(self._tickets) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} jobs wait already; try again when some are done")
            ticket = object()
            self._tickets.append(ticket)
            return ticket

    def _wait(self, ticket: object, stop: StopToken, on_wait: Callable[[int], None]) -> None:
        told = 0
        with self._changed:
            while (place := self._tickets.index(ticket)) > 0:
                if stop.stopped:
                    raise Stopped
                if place != told:
                    told = place
                    on_wait(place)
                self._changed.wait(_POLL_SECONDS)
