"""What draws for the studio: jobs that run one at a time, tell how far they are, and stop within a second."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import open_base
from ether_diffusion.control import holds_control
from ether_diffusion.pipelines.grid import MANIFEST_NAME, PICTURES_FOLDER, SHEET_NAME, draw_grid, sheet_files
from ether_diffusion.pipelines.sampling import ControlUse, Picture, Sampling
from ether_diffusion.ui.attached import MAX_LOADED, Wanted
from ether_diffusion.ui.events import CellDone, Event, Finished, SavedPicture, Stopped, StopToken
from ether_diffusion.ui.jobs import Job
from ether_diffusion.ui.machine import Machine, Order
from ether_diffusion.ui.outputs import BASE_SUFFIX, Outputs, plain_png
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.wording import printable

Request = GenerateRequest | GridRequest


class Engine:
    """Draws pictures and grids with one base and the adapters of a library.

    Every picture is drawn by itself, so that each is made again bit for bit from what its file says.
    """

    default_steps = 20
    """The steps that a form starts with."""

    def __init__(
        self,
        base: str | Path,
        *,
        outputs: Path,
        folder_of: Callable[[str], Path],
        name_of: Callable[[str], str] = str,
        max_loaded: int = MAX_LOADED,
        check_free: Callable[[torch.device], None] = lambda device: None,
    ) -> None:
        """Open a base, whose weights the first job loads.

        Args:
            outputs: where pictures are written.
            folder_of: the folder of an adapter by its library id; it raises where there is none.
            name_of: what people call it, and pictures say.
            check_free: raises ValueError where a job must not start beside what else uses the device.

        Raises:
            FileNotFoundError, OSError, ValueError: as `open_base`, or the base is for inpainting.
        """
        self.base = open_base(base)
        if self.base.is_inpainting:
            raise ValueError(
                f"{self.base.name} is a base for inpainting; the studio needs one that draws from text alone"
            )
        self.base_name = shareable_name(self.base.name) or self.base.name
        """What pictures call the base."""
        self.native_size, self.default_guidance = self.base.native_size, self.base.guidance_scale
        self.machine = Machine(self.base, max_loaded=max_loaded, check_free=check_free)
        self.outputs = Outputs(outputs)
        self._folder_of, self._name_of = folder_of, name_of
        self._running: set[Job[Event]] = set()

    @property
    def is_free(self) -> bool:
        """Whether no job works and none waits."""
        return self.machine.line.is_free

    def seconds_per_step(self, request: Request) -> float | None:
        """Return what a step costs, and its share of the rest of a picture; None before any was drawn."""
        pace = self.machine.speed.of(request.sampling())
        return None if pace is None else pace.step + pace.picture / request.steps

    def check(self, request: Request) -> None:
        """Refuse what this machine cannot draw.

        Raises:
            ValueError: it has not the memory, or it would take too long.
        """
        sampling, cost = request.sampling(), self.machine.cost
        cost.check_memory(sampling, sampling.num_pictures)
        cost.check_time(sampling, sampling.num_pictures, self.seconds_per_step(request))

    def draw(self, request: Request, stop: StopToken) -> Iterator[Event]:
        """Draw pictures, or a grid row by row; Finished is the last event, told when the lock is free again.

        CellDone comes as soon as a cell's file is there. Closing the iterator stops the job.

        Raises:
            FileNotFoundError, ValueError: an adapter is not there or does not fit, or the base or this
                machine cannot draw what is asked for; before the first step.
        """
        self.check(request)
        wanted = {name: Wanted(self._folder_of(name), self._name_of(name)) for name in request.adapters}
        control, notes = None, list[str]()
        if isinstance(request, GenerateRequest):
            following = [name for name, one in wanted.items() if holds_control(one.folder)]
            control = _control_use(request, following)
            if control is None:
                names = [printable(wanted[name].name) for name in following]
                notes = [f"{name} follows a control image, and none was given." for name in names]
        order = Order(request.sampling(), wanted, request.allow_other_base, control)
        return self._stream(lambda emit: self._work(request, order, notes, stop, emit), stop)

    def close(self, timeout: float = 10.0) -> None:
        """Stop all jobs and wait until they have stopped, `timeout` seconds at most."""
        running = list(self._running)
        for job in running:
            job.stop.stop()
        for job in running:
            job.join(timeout)

    def _stream(self, work: Callable[[Callable[[Event], None]], None], stop: StopToken) -> Iterator[Event]:
        def finishing(emit: Callable[[Event], None]) -> None:
            try:
                work(emit)
            finally:
                self._running.discard(job)

        def events() -> Iterator[Event]:
            self._running.add(job)
            yield from job.events()

        job = Job(finishing, stop)
        return events()

    def _work(
        self, request: Request, order: Order, notes: list[str], stop: StopToken, emit: Callable[[Event], None]
    ) -> None:
        """Draw each place in a job's turn: a seed's picture and the base's right after it, or grid cells."""
        start, touched, stopped, keep = time.monotonic(), 0, False, request.keep_metadata
        is_grid, job, sampling = isinstance(request, GridRequest), self.outputs.new_job(), order.sampling
        day = self.outputs.day_folder(job)
        folder = day / job / PICTURES_FOLDER if is_grid else day
        pictures, of_base = list[SavedPicture](), list[SavedPicture]()
        drawn: dict[str, Picture] = {}
        sheet, manifest = None, None
        try:
            with self.machine.turn(order, stop, emit) as turn:
                touched, sampling = turn.touched_layers, turn.sampling
                notes += turn.notes
                if turn.control is not None and keep:
                    self.outputs.keep_control(turn.control.image)
                sides = (sampling.prompts, sampling.seeds, sampling.choices)
                for prompt, seed, choice in itertools.product(*(range(len(side)) for side in sides)):
                    picture = turn.drawing.draw((prompt, seed, choice), turn.control)
                    if picture.fault:
                        notes.append(f"The picture of seed {sampling.seeds[seed]} {picture.fault}.")
                    of_pair = f"i{seed:02d}{BASE_SUFFIX if choice else ''}"
                    name = f"{job}-{f'c{len(pictures) + 1:03d}' if is_grid else of_pair}"
                    saved = self.outputs.save(picture, folder, name, keep_metadata=keep)
                    (of_base if choice and not is_grid else pictures).append(saved)
                    if is_grid:
                        drawn[f"{PICTURES_FOLDER}/{name}.png"] = picture
                        emit(CellDone(prompt, seed, choice, saved, len(pictures), sampling.num_pictures))
            if is_grid:
                sheet, manifest = self._write_sheet(sampling, day / job, drawn, keep=keep)
        except Stopped:
            stopped = True
        seconds = time.monotonic() - start
        emit(
            Finished(
                job, tuple(pictures), tuple(of_base), seconds, stopped, touched, tuple(notes), sheet, manifest
            )
        )

    def _write_sheet(
        self, sampling: Sampling, folder: Path, drawn: dict[str, Picture], *, keep: bool
    ) -> tuple[Path, Path | None]:
        if not keep:
            sheet = plain_png(draw_grid(sampling, list(drawn.values())))
            return self.outputs.write(folder, SHEET_NAME, sheet), None
        for name, data in sheet_files(sampling, drawn).items():
            self.outputs.write(folder, name, data)
        return folder / SHEET_NAME, folder / MANIFEST_NAME


def _control_use(request: GenerateRequest, following: Sequence[str]) -> ControlUse | None:
    """Return the control image with the adapter that follows it.

    Raises:
        ValueError: there is not exactly one such adapter.
    """
    if request.control_image is None:
        return None
    if len(following) != 1:
        found = f"{len(following)} of them" if following else "none"
        raise ValueError(f"a control image needs one adapter that follows it; found {found}")
    return ControlUse(request.control_image, request.control_strength, following[0])
