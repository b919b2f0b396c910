"""What a job tells while it runs, and the token that stops it."""

import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.pipelines.metadata import ImageMetadata


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Raised inside a job whose token was stopped."""


class StopToken:
    """Stops one job, from any thread: inside a denoising step, or while it waits."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def stop(self) -> None:
        """Ask the job to stop; it does so once, and for good."""
        self._event.set()

    @property
    def stopped(self) -> bool:
        """Whether it was asked to."""
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
class Waiting:
    """Others are at work; place 1 is next."""

    place: int


@dataclass(frozen=True)
class Previewing:
    """A picture is being drawn: step of num_steps of picture num_done + 1 of num_images, base ones included.

    Attributes:
        step: 0 until the first is done.
        seconds_left: of the whole job; None before a step was measured.
        image: how the picture looks by now; None before the first look, and the last look until the next.
        is_loading: the models are read, before anything is drawn.
    """

    step: int
    num_steps: int
    seconds_left: float | None
    image: Image.Image | None
    num_done: int
    num_images: int
    is_loading: bool = False


@dataclass(frozen=True)
class CellDone:
    """A cell of a grid: its place as indices into the request's prompts, seeds and choices."""

    prompt: int
    seed: int
    choice: int
    picture: SavedPicture
    num_done: int
    num_cells: int


@dataclass(frozen=True)
class Finished:
    """The end of a job, stopped or not. A grid that was stopped keeps its cells, and has no sheet.

    Attributes:
        pictures: all cells of a grid; otherwise those with the adapters.
        base_pictures: by the base alone, on the seeds of `pictures`, in the same order.
        touched_layers: modules of the models that carry one of the adapters in force.
        notes: sentences on what one should know, e.g. the part of a prompt that was not read.
        sheet, manifest: of a grid; no manifest where the files shall not say how they were made.
    """

    id: str
    pictures: tuple[SavedPicture, ...]
    base_pictures: tuple[SavedPicture, ...]
    seconds: float
    stopped: bool
    touched_layers: int
    notes: tuple[str, ...] = ()
    sheet: Path | None = None
    manifest: Path | None = None


Event = Waiting | Previewing | CellDone | Finished
