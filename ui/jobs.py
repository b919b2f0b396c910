"""Jobs: what they tell while they run, what stops them, and the line in which they wait for the machine."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from secrets import token_hex
from threading import Event, Thread
from typing import Any, TypeVar

from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.ui.words import told

MAX_WAITING, POLL_SECONDS, BASE_SUFFIX = 32, 0.05, "-base"
T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Raised inside a job that was asked to stop."""


def check(stop: Event) -> None:
    """Raise Stopped where that was asked for."""
    if stop.is_set():
        raise Stopped


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Work in a thread that ends with the process, and return what becomes of it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # is raised, or told, where somebody looks
            future.set_exception(error)

    Thread(target=run, name=f"studio: {work}", daemon=True).start()
    return future


@dataclass(frozen=True)
class SavedPicture:
    """A picture of ours: its id is the stem of its file; without metadata it says nothing of itself."""

    id: str
    path: Path
    metadata: ImageMetadata | None

    @property
    def is_base(self) -> bool:
        """Whether it is the base's, beside one with adapters."""
        return self.id.endswith(BASE_SUFFIX)


@dataclass(frozen=True)
class Working:
    """How far a job is, `done` of 1 and in words; the last look at what is being drawn, and its step.

    `seconds_left` is None where nothing was measured.
    """

    words: str
    done: float = 0.0
    image: Image.Image | None = None
    step: int = 0
    seconds_left: float | None = None


class Job:
    """Pictures that somebody asked for: drawn in the background, whoever looks, until `stop` is set.

    Attributes:
        owner, place: whose it is, and the tab that it is shown in.
        state: how far it is.
        drawn: what is there by now, in the order in which it was drawn; a grid that was stopped keeps it.
        notes: sentences on what one should know, e.g. the part of a prompt that was not read.
        seconds: since its turn came.
        touched_layers: modules of the models that carry one of the adapters in force.
        stopped: whether it ended before it was done, as it was asked to.
        sheet, manifest: of a whole grid; no manifest where the files shall not say how they were made.
        ended: is done when the job ended, and holds the error that ended it.
    """

    def __init__(self, request: Any, *, stop: Event | None = None, owner: str = "", place: str = "") -> None:
        self.id, self.request, self.owner, self.place = token_hex(4), request, owner, place
        self.stop, self.stopped, self.seconds, self.touched_layers = stop or Event(), False, 0.0, 0
        self.state: Working | None = None
        self.drawn, self.notes = list[SavedPicture](), list[str]()
        self.sheet: Path | None = None
        self.manifest: Path | None = None
        self.ended: Future[None] = Future()

    def begin(self, work: Callable[["Job"], None]) -> None:
        """Have it done in a thread of its own."""
        self.ended = in_background(partial(work, self))

    @property
    def pictures(self) -> tuple[SavedPicture, ...]:
        """The cells of a grid, by prompt, then seed, then choice; otherwise those with the adapters."""
        return tuple(picture for picture in self.drawn if not picture.is_base)

    @property
    def base_pictures(self) -> tuple[SavedPicture, ...]:
        """Those of the base alone, on the seeds of `pictures`, in the same order."""
        return tuple(picture for picture in self.drawn if picture.is_base)

    @property
    def is_done(self) -> bool:
        """Whether it ended, in whatever way."""
        return self.ended.done()

    @cached_property
    def error(self) -> str:
        """What a visitor is told of what ended it; nothing where it did its work, or was stopped."""
        error = self.ended.exception()
        if error is None:
            return ""
        return told(error) if isinstance(error, Exception) else "The studio was ended."


class Line:
    """A lock with a queue: first come, first served, and everybody knows their place."""

    def __init__(self) -> None:
        self._tickets: list[object] = []

    @property
    def is_free(self) -> bool:
        """Whether nobody works and nobody waits."""
        return not self._tickets

    def join(self) -> object:
        """Take the next place, which `turn` is given, and `leave` where it comes to nothing."""
        ticket = object()
        self._tickets.append(ticket)
        return ticket

    def leave(self, ticket: object) -> None:
        """Give a place up."""
        self._tickets.remove(ticket)

    @contextmanager
    def turn(
        self,
        stop: Event | None = None,
        on_wait: Callable[[int], None] = lambda place: None,
        ticket: object | None = None,
    ) -> Iterator[None]:
        """Wait until all who came before are done and hold the lock inside; `on_wait` hears one's place."""
        ticket, stop, told = ticket or self.join(), stop or Event(), 0
        try:
            while (place := self._tickets.index(ticket)) > 0:
                check(stop)
                if place != told:
                    on_wait(told := place)
                stop.wait(POLL_SECONDS)
            yield
        finally:
            self.leave(ticket)
