"""Jobs: what they tell while they run, what stops them, and the line in which they wait for the machine."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.ui.words import told

MAX_WAITING, POLL_SECONDS, BASE_SUFFIX = 32, 0.05, "-base"
T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Raised inside a job that was asked to stop."""


def check(stop: threading.Event) -> None:
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

    threading.Thread(target=run, name=f"studio: {work}", daemon=True).start()
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


Emit = Callable[[Working | SavedPicture], None]


class Job:
    """Work in a thread of its own that goes on whoever looks, until `stop` is set.

    Attributes:
        owner, place: whose it is, and the tab that it is shown in.
        state: the last one that it told.
        pictures: those that are there by now, in the order in which they were drawn.
        ended: gets how it ended, or what ended it.
    """

    def __init__(
        self, work: Callable[[Emit], Finished], request: Any, stop: threading.Event, *, owner: str = "",
        place: str = "",
    ) -> None:  # fmt: skip
        self.id, self.request, self.stop, self.owner, self.place = token_hex(4), request, stop, owner, place
        self.state: Working | None = None
        self.pictures = list[SavedPicture]()
        self.ended = in_background(partial(work, self._tell))

    @property
    def is_done(self) -> bool:
        """Whether it ended, in whatever way."""
        return self.ended.done()

    @property
    def end(self) -> Finished | None:
        """How it ended; None while it goes on, and where an error ended it."""
        return self.ended.result() if self.is_done and self.ended.exception() is None else None

    @cached_property
    def said(self) -> str:
        """What a visitor is told of the error."""
        error = self.ended.exception()
        return told(error) if isinstance(error, Exception) else "The studio was ended."

    def _tell(self, event: Working | SavedPicture) -> None:
        if isinstance(event, Working):
            self.state = event
        else:
            self.pictures.append(event)


class Line:
    """A lock with a queue: first come, first served, and everybody knows their place."""

    def __init__(self) -> None:
        self._tickets: list[object] = []

    @property
    def is_free(self) -> bool:
        """Whether nobody works and nobody waits."""
        return not self._tickets

    @contextmanager
    def turn(
        self, stop: threading.Event | None = None, on_wait: Callable[[int], None] = lambda place: None
    ) -> Iterator[None]:
        """Wait until all who came before are done and hold the lock inside; `on_wait` hears one's place."""
        ticket, stop, told = object(), stop or threading.Event(), 0
        self._tickets.append(ticket)
        try:
            while (place := self._tickets.index(ticket)) > 0:
                check(stop)
                if place != told:
                    on_wait(told := place)
                stop.wait(POLL_SECONDS)
            yield
        finally:
            self._tickets.remove(ticket)
