"""Jobs: what they tell while they run, what stops them, and the line in which they wait for the machine."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata

HEARTBEAT_SECONDS = 0.5  # without news the last state is told again, so that a closed page is noticed
MAX_WAITING, POLL_SECONDS = 32, 0.05


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Raised inside a job whose token was stopped."""


class StopToken:
    """Stops one job, from any thread: inside a denoising step, or while it waits."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.stop = self._event.set

    @property
    def stopped(self) -> bool:
        """Whether the job was asked to stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise Stopped if it was asked to."""
        if self.stopped:
            raise Stopped


@dataclass(frozen=True)
class SavedPicture:
    """A picture of ours: its id is the stem of its file; without metadata it says nothing of itself."""

    id: str
    path: Path
    metadata: ImageMetadata | None


@dataclass(frozen=True)
class Working:
    """How far a job is, `done` of 1 and in words; the last look at what is being drawn, and its step."""

    words: str
    done: float = 0.0
    image: Image.Image | None = None
    step: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of a job, stopped or not. A grid that was stopped keeps its cells, and has no sheet.

    Attributes:
        pictures: all cells of a grid, by prompt, then seed, then choice; otherwise those with the adapters.
        base_pictures: by the base alone, on the seeds of `pictures`, in the same order.
        touched_layers: modules of the models that carry one of the adapters in force.
        notes: sentences on what one should know, e.g. the part of a prompt that was not read.
        sheet, manifest: of a grid; no manifest where the files shall not say how they were made.
    """

    pictures: tuple[SavedPicture, ...]
    base_pictures: tuple[SavedPicture, ...]
    seconds: float
    stopped: bool
    touched_layers: int
    notes: tuple[str, ...] = ()
    sheet: Path | None = None
    manifest: Path | None = None


Event = Working | SavedPicture | Finished
"""A picture is told of alone where it is a cell of a grid."""
Emit = Callable[[Event], None]


def stream(work: Callable[[Emit], None], stop: StopToken) -> Iterator[Event]:
    """Do work in a thread of its own and yield what it emits; closing the iterator stops the work.

    States that newer ones have overtaken are left out. The thread goes on to a safe end whoever looks away.
    """
    told: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work(told.put)
            told.put(None)
        except BaseException as error:  # is raised where somebody can tell of it
            told.put(error)

    threading.Thread(target=run, name="studio job", daemon=True).start()
    state: Event | None = None
    try:
        while True:
            try:
                event = told.get(timeout=HEARTBEAT_SECONDS)
            except queue.Empty:
                if state is not None:
                    yield state
                continue
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            state = event if isinstance(event, Working) else state
            if event is not state or told.empty():
                yield event
    finally:
        stop.stop()


class Line:
    """A lock with a queue: first come, first served, and everybody knows their place."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets: list[object] = []

    @property
    def is_free(self) -> bool:
        """Whether nobody works and nobody waits."""
        return not self._tickets

    @contextmanager
    def turn(self, stop: StopToken, on_wait: Callable[[int], None] = lambda place: None) -> Iterator[None]:
        """Wait until all who came before are done and hold the lock inside; `on_wait` hears one's place."""
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
                        on_wait(told := place)
                    self._changed.wait(POLL_SECONDS)
            yield
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()


class RunningJobs:
    """What each visitor has running, so that Stop stops theirs and nobody else's."""

    def __init__(self) -> None:
        self._jobs: list[tuple[str | None, StopToken]] = []

    @contextmanager
    def hold(self, visitor: str | None) -> Iterator[StopToken]:
        """Give a token for a job of the visitor's; leaving the block, a closed tab included, stops it."""
        self._jobs.append(job := (visitor, StopToken()))
        try:
            yield job[1]
        finally:
            job[1].stop()
            self._jobs.remove(job)

    def stop(self, visitor: str | None) -> None:
        """Tell the jobs of a visitor to stop."""
        for name, token in list(self._jobs):
            if name == visitor:
                token.stop()
