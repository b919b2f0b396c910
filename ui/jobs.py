"""Jobs: what they tell while they run, what stops them, and the line in which they wait for the machine."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any

from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata
from ether_diffusion.ui.words import told

MAX_WAITING, POLL_SECONDS, BASE_SUFFIX = 32, 0.05, "-base"


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


Event = Working | SavedPicture | Finished
Emit = Callable[[Working | SavedPicture], None]


class Job:
    """Work in a thread of its own that goes on whoever looks: its last state, its pictures, and its end.

    Attributes:
        owner, place: whose it is, and the tab that it is shown in.
        pictures: those that are there by now, in the order in which they were drawn.
        error: what ended it, where no `end` did.
    """

    def __init__(
        self,
        work: Callable[[Emit], Finished],
        request: Any,
        stop: StopToken,
        *,
        owner: str = "",
        place: str = "",
    ) -> None:
        self.id, self.request, self.stop, self.owner, self.place = token_hex(4), request, stop, owner, place
        self.state: Working | None = None
        self.pictures = list[SavedPicture]()
        self.end: Finished | None = None
        self.error: BaseException | None = None
        self._news = threading.Condition()
        self.thread = threading.Thread(target=self._run, args=(work,), name="studio job", daemon=True)
        self.thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it ended, in whatever way."""
        return self.end is not None or self.error is not None

    @cached_property
    def said(self) -> str:
        """What a visitor is told of the error."""
        return told(self.error) if isinstance(self.error, Exception) else "The studio was ended."

    def result(self) -> Finished:
        """Wait for the end, and return it or raise what ended it."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert self.end is not None
        return self.end

    def events(self) -> Iterator[Event]:
        """Yield what it tells, but for states that newer ones have overtaken; who looks away stops it."""
        told, state, is_done = 0, None, False
        try:
            while not is_done:
                with self._news:
                    while not self.is_done and self.state is state and len(self.pictures) == told:
                        self._news.wait()
                    is_done, new, now = self.is_done, self.pictures[told:], self.state
                yield from new
                told += len(new)
                if now is not None and now is not state:
                    yield (state := now)
        finally:
            self.stop.stop()
        yield self.result()

    def _run(self, work: Callable[[Emit], Finished]) -> None:
        end, error = None, None
        try:
            end = work(self._tell)
        except BaseException as raised:  # is raised, or told, where somebody looks
            error = raised
        with self._news:
            self.end, self.error = end, error
            self._news.notify_all()

    def _tell(self, event: Working | SavedPicture) -> None:
        with self._news:
            if isinstance(event, Working):
                self.state = event
            else:
                self.pictures.append(event)
            self._news.notify_all()


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
