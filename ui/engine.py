"""What draws for the studio: one base in memory, for jobs in turn that tell how far they are, and stop."""

import ctypes
import gc
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import open_base
from ether_diffusion.console import ran_short
from ether_diffusion.control import holds_control
from ether_diffusion.pipelines.metadata import fingerprint_of
from ether_diffusion.pipelines.opening import default_device, default_dtype, open_pipeline
from ether_diffusion.pipelines.sampling import (
    MANIFEST_NAME,
    PICTURES_FOLDER,
    SHEET_NAME,
    ControlUse,
    Picture,
    Sampling,
    draw_grid,
    sheet_files,
)
from ether_diffusion.training import find_cut
from ether_diffusion.ui.attached import MAX_LOADED, AttachedAdapters
from ether_diffusion.ui.cost import Cost
from ether_diffusion.ui.drawing import Drawing
from ether_diffusion.ui.jobs import (
    POLL_SECONDS,
    CellDone,
    Emit,
    Event,
    Finished,
    Line,
    Previewing,
    SavedPicture,
    Stopped,
    StopToken,
    Waiting,
    stream,
)
from ether_diffusion.ui.outputs import BASE_SUFFIX, Outputs, plain_png
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.wording import printable

Request = GenerateRequest | GridRequest


class Engine:
    """Draws pictures and grids with one base and the adapters of a library.

    Every picture is drawn by itself, so that each is made again bit for bit from what its file says.

    Attributes:
        line: in which jobs wait; only who has the turn may use `pipeline` and `attached`.
        base_name: what pictures call the base.
        default_steps: that a form starts with.
    """

    default_steps = 20

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
        self.native_size, self.default_guidance = self.base.native_size, self.base.guidance_scale
        self.device, self.line, self.outputs = default_device(), Line(), Outputs(outputs)
        self.cost = Cost(self.base, self.device)
        self._folder_of, self._name_of = folder_of, name_of
        self._max_loaded, self._check_free = max_loaded, check_free
        self._loading = threading.Lock()
        self._loaded: Future[tuple[Any, str | None]] | None = None
        self._running: dict[threading.Thread, StopToken] = {}

    @property
    def is_free(self) -> bool:
        """Whether no job works and none waits."""
        return self.line.is_free

    @property
    def pipeline(self) -> Any:
        """The pipeline, loaded when it is first asked for."""
        return self._load()[0]

    @property
    def fingerprint(self) -> str | None:
        """The short name of the base's weights, which are loaded to know it."""
        return self._load()[1]

    @cached_property
    def attached(self) -> AttachedAdapters:
        """The adapters in the pipeline."""
        return AttachedAdapters(self.pipeline, max_loaded=self._max_loaded)

    def draw(self, request: Request, stop: StopToken) -> Iterator[Event]:
        """Draw pictures, or a grid row by row; Finished is the last event, told when the lock is free again.

        CellDone comes as soon as a cell's file is there. Closing the iterator stops the job.

        Raises:
            FileNotFoundError, ValueError: an adapter is not there or does not fit, or the base or this
                machine cannot draw what is asked for; before the first step.
        """
        self.cost.check(request.sampling())
        folders = {each: self._folder_of(each) for each in request.adapters}
        control, notes = None, list[str]()
        if isinstance(request, GenerateRequest):
            following = [each for each, folder in folders.items() if holds_control(folder)]
            if request.control_image is None:
                names = [printable(self._name_of(each)) for each in following]
                notes = [f"{name} follows a control image, and none was given." for name in names]
            elif len(following) == 1:
                control = ControlUse(request.control_image, request.control_strength, following[0])
            else:
                found = f"{len(following)} of them" if following else "none"
                raise ValueError(f"a control image needs one adapter that follows it; found {found}")

        def work(emit: Emit) -> None:
            self._running[threading.current_thread()] = stop
            try:
                emit(self._work(request, control, notes, stop, emit))
            finally:
                del self._running[threading.current_thread()]

        return stream(work, stop)

    def close(self, timeout: float = 10.0) -> None:
        """Stop all jobs and wait until they have stopped, `timeout` seconds at most."""
        running = list(self._running.items())
        for _, stop in running:
            stop.stop()
        for thread, _ in running:
            thread.join(timeout)

    def _work(
        self, request: Request, control: ControlUse | None, notes: list[str], stop: StopToken, emit: Emit
    ) -> Finished:
        """Draw each place in a job's turn: a seed's picture and the base's right after it, or grid cells."""
        start, touched, stopped, keep = time.monotonic(), 0, False, request.keep_metadata
        is_grid, job = isinstance(request, GridRequest), self.outputs.new_job()
        day = self.outputs.day_folder(job)
        folder = day / job / PICTURES_FOLDER if is_grid else day
        pictures, of_base = list[SavedPicture](), list[SavedPicture]()
        drawn: dict[str, Picture] = {}
        files: list[Path | None] = [None, None]
        try:
            with self._turn(request.sampling(), stop, emit):
                sampling, control = self._attach(request, control, notes)
                used = {name for choice in sampling.choices for name, strength in choice.items() if strength}
                touched = self.attached.num_touched(used)
                if control is not None and keep:
                    self.outputs.keep_control(control.image)
                drawing = Drawing(self.pipeline, sampling, control, cost=self.cost, stop=stop, emit=emit)
                sides = (sampling.prompts, sampling.seeds, sampling.choices)
                for prompt, seed, choice in itertools.product(*(range(len(side)) for side in sides)):
                    picture = drawing.draw(prompt, seed, choice)
                    if picture.fault:
                        notes.append(f"The picture of seed {sampling.seeds[seed]} {picture.fault}.")
                    of_pair = f"i{seed:02d}{BASE_SUFFIX if choice else ''}"
                    name = f"{job}-{f'c{len(pictures) + 1:03d}' if is_grid else of_pair}"
                    saved = self.outputs.save(picture, folder, name, keep_metadata=keep)
                    (of_base if choice and not is_grid else pictures).append(saved)
                    if is_grid:
                        drawn[f"{PICTURES_FOLDER}/{name}.png"] = picture
                        emit(CellDone(prompt, seed, choice, saved))
            if is_grid:
                files = self._write_sheet(sampling, day / job, drawn, keep=keep)
        except Stopped:
            stopped = True
        seconds = time.monotonic() - start
        return Finished(tuple(pictures), tuple(of_base), seconds, stopped, touched, tuple(notes), *files)

    @contextmanager
    def _turn(self, sampling: Sampling, stop: StopToken, emit: Emit) -> Iterator[None]:
        """Wait for the lock, load what is missing, and hold the lock inside."""
        waiting = self.line.turn(stop, lambda place: emit(Waiting(place)))
        with waiting, _memory_given_back(), _shortage_explained():
            self._check_free(self.device)
            if self._loaded is None or not self._loaded.done():
                emit(Previewing(0, sampling.steps, None, None, 0, sampling.num_pictures, is_loading=True))
            self._load(stop)
            self.cost.check_memory(sampling, psutil.virtual_memory().available)
            yield

    def _attach(
        self, request: Request, control: ControlUse | None, notes: list[str]
    ) -> tuple[Sampling, ControlUse | None]:
        """Return what to draw, with adapters by their names in the pipeline; notes get what is doubtful."""
        sampling, ids = request.sampling(), list(request.adapters)
        names = {
            each: self.attached.attach(each, self._folder_of(each), self._name_of(each), keep=ids)
            for each in ids
        }
        notes += self.attached.doubts(ids, allow_other_base=request.allow_other_base)
        prompts = [*sampling.prompts, *filter(None, [sampling.negative_prompt])]
        cuts = [find_cut(prompt, self.pipeline.tokenizer) for prompt in dict.fromkeys(prompts)]
        notes += [str(cut) for cut in cuts if cut is not None]
        choices = tuple({names[each]: s for each, s in choice.items()} for choice in sampling.choices)
        if control is not None and control.control is not None:
            control = replace(control, control=names[control.control])
        return replace(sampling, choices=choices), control

    def _write_sheet(
        self, sampling: Sampling, folder: Path, drawn: dict[str, Picture], *, keep: bool
    ) -> list[Path | None]:
        if not keep:
            sheet = plain_png(draw_grid(sampling, list(drawn.values())))
            return [self.outputs.write(folder, SHEET_NAME, sheet), None]
        for name, data in sheet_files(sampling, drawn).items():
            self.outputs.write(folder, name, data)
        return [folder / SHEET_NAME, folder / MANIFEST_NAME]

    def _load(self, stop: StopToken | None = None) -> tuple[Any, str | None]:
        """Return what is loaded once; who stops waiting for it leaves the loading to go on for the next."""

        def fill(future: Future[tuple[Any, str | None]]) -> None:
            try:
                future.set_result(self._open())
            except BaseException as error:  # is raised where somebody waits
                future.set_exception(error)

        with self._loading:
            if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
                self._loaded = Future()
                threading.Thread(target=fill, args=(self._loaded,), daemon=True).start()
            loaded = self._loaded
        while stop is not None and not wait([loaded], timeout=POLL_SECONDS).done:
            stop.check()
        return loaded.result()

    def _open(self) -> tuple[Any, str | None]:
        dtype = default_dtype(self.device, self.base)
        pipeline = open_pipeline(self.base, device=self.device, dtype=dtype, with_control=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, fingerprint_of(pipeline.components[self.base.denoiser])


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """Return to the system what glibc keeps between blocks that are in use: 500 MB after 100 sizes."""
    try:
        yield
    finally:
        with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _shortage_explained() -> Iterator[None]:
    """Turn a lack of memory into a ValueError on what to do, and give back what was taken."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_short(error):
            raise
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__.tb_next)  # which hold tensors
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        text = printable(str(error).splitlines()[0] if str(error) else "MemoryError", 200)
        raise ValueError(
            f"memory ran out ({text}); choose smaller pictures, or end what else uses it"
        ) from None
