"""What draws for the studio: jobs that run one at a time, tell how far they are, and stop within a second."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ether_diffusion.adapters import BaseFingerprint
from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import open_base
from ether_diffusion.control import holds_control
from ether_diffusion.pipelines.sampling import ControlUse
from ether_diffusion.ui.attached import MAX_LOADED, Wanted
from ether_diffusion.ui.events import (
    CellDone,
    Event,
    Finished,
    GridEvent,
    GridFinished,
    Previewing,
    SavedPicture,
    StopToken,
    Waiting,
)
from ether_diffusion.ui.jobs import Job
from ether_diffusion.ui.machine import Machine, Order
from ether_diffusion.ui.outputs import Outputs
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.ui.work import Bench, draw_grid_cells, generate_pictures
from ether_diffusion.wording import printable

__all__ = [
    "CellDone",
    "Engine",
    "Event",
    "Finished",
    "GridEvent",
    "GridFinished",
    "Previewing",
    "SavedPicture",
    "StopToken",
    "Waiting",
]

DEFAULT_STEPS = 20

E = TypeVar("E")


class Engine:
    """Draws pictures and grids with one base and the adapters of a library.

    Every picture is drawn by itself, so that each is made again bit for bit from what its file says.
    """

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
        self.machine = Machine(self.base, max_loaded=max_loaded, check_free=check_free)
        self.outputs = Outputs(outputs)
        self._folder_of, self._name_of = folder_of, name_of
        self._running: dict[Job[Any], StopToken] = {}

    @property
    def base_name(self) -> str:
        """What pictures call the base."""
        return shareable_name(self.base.name) or self.base.name

    @property
    def base_fingerprint(self) -> BaseFingerprint | None:
        """The fingerprint of the base's attention projections; it loads the base."""
        return self.machine.facts.fingerprint

    @property
    def native_size(self) -> int:
        """Side of the pictures that the base was trained at, px."""
        return self.base.native_size

    @property
    def default_guidance(self) -> float:
        """The guidance that suits the base."""
        return self.base.guidance_scale

    @property
    def default_steps(self) -> int:
        """The steps that a form starts with."""
        return DEFAULT_STEPS

    @property
    def supports_control(self) -> bool:
        """Whether control images can be followed."""
        return True

    @property
    def is_free(self) -> bool:
        """Whether no job works and none waits."""
        return self.machine.line.is_free

    def seconds_per_step(self, request: GenerateRequest | GridRequest) -> float | None:
        """Return what a step costs, and its share of the rest of a picture; None before any was drawn."""
        pace = self.machine.speed.of(request.sampling())
        return None if pace is None else pace.step + pace.picture / request.steps

    def check(self, request: GenerateRequest | GridRequest) -> None:
        """Refuse what this machine cannot draw.

        Raises:
            ValueError: it has not the memory, or it would take too long.
        """
        sampling, cost = request.sampling(), self.machine.cost
        num_images = len(sampling.prompts) * len(sampling.seeds) * len(sampling.choices)
        cost.check_memory(sampling, num_images)
        cost.check_time(sampling, num_images, self.seconds_per_step(request))

    def generate(self, request: GenerateRequest, stop: StopToken) -> Iterator[Event]:
        """Draw pictures; Finished is the last event, told when the lock is free again.

        Closing the iterator stops the job.

        Raises:
            FileNotFoundError, ValueError: an adapter is not there or does not fit, or the base or this
                machine cannot draw what is asked for; before the first step.
        """
        self.check(request)
        adapters = self._wanted(request.adapters)
        following = [name for name, one in adapters.items() if holds_control(one.folder)]
        order = self._order(request, adapters, num_images=request.num_images * (1 + request.draws_base))
        order = replace(order, control=_control_use(request, following))
        bench = Bench(self.machine, self.outputs, order, request.keep_metadata, stop)
        notes = _notes_of(request, [adapters[name].name for name in following])
        return self._stream(lambda emit: generate_pictures(bench, notes, emit), stop)

    def grid(self, request: GridRequest, stop: StopToken) -> Iterator[GridEvent]:
        """Draw a grid row by row: CellDone as soon as a cell's file is there, at last GridFinished.

        Raises:
            FileNotFoundError, ValueError: as `generate`.
        """
        self.check(request)
        order = self._order(request, self._wanted(request.adapters), num_images=request.num_cells)
        bench = Bench(self.machine, self.outputs, order, request.keep_metadata, stop)
        return self._stream(lambda emit: draw_grid_cells(bench, emit), stop)

    def close(self, timeout: float = 10.0) -> None:
        """Stop all jobs and wait until they have stopped, `timeout` seconds at most."""
        running = dict(self._running)
        for stop in running.values():
            stop.stop()
        for job in running:
            job.join(timeout)

    def _stream(self, work: Callable[[Callable[[E], None]], None], stop: StopToken) -> Iterator[E]:
        def finishing(emit: Callable[[E], None]) -> None:
            try:
                work(emit)
            finally:
                self._running.pop(job, None)

        job = Job(finishing, stop)
        return self._events(job, stop)

    def _events(self, job: Job[E], stop: StopToken) -> Iterator[E]:
        self._running[job] = stop
        yield from job.events()

    def _wanted(self, ids: Iterable[str]) -> dict[str, Wanted]:
        return {name: Wanted(self._folder_of(name), self._name_of(name)) for name in ids}

    def _order(
        self, request: GenerateRequest | GridRequest, adapters: Mapping[str, Wanted], *, num_images: int
    ) -> Order:
        return Order(request.sampling(), num_images, adapters, request.allow_other_base)


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
    return ControlUse(request.control_image, float(request.control_strength), following[0])


def _notes_of(request: GenerateRequest, following: Sequence[str]) -> tuple[str, ...]:
    if request.control_image is not None:
        return ()
    return tuple(f"{printable(name)} follows a control image, and none was given." for name in following)
