"""What draws for the studio: one base in memory, for jobs in turn that tell how far they are, and stop."""

import gc
import itertools
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

import psutil
import torch

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.adapters.methods import name_of
from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import open_base
from ether_diffusion.console import give_memory_back, ran_short
from ether_diffusion.control import holds_control
from ether_diffusion.pipelines import sampling as grids
from ether_diffusion.pipelines.opening import default_device
from ether_diffusion.pipelines.sampling import ControlUse, Picture, Sampling
from ether_diffusion.prompts import Wildcards, plain_text
from ether_diffusion.serving import engine as engines
from ether_diffusion.training import find_cut
from ether_diffusion.ui import jobs
from ether_diffusion.ui.drawing import Cost, Drawing
from ether_diffusion.ui.facts import Stamp, stamp_of
from ether_diffusion.ui.jobs import BASE_SUFFIX, Job, Stopped, Working, in_background
from ether_diffusion.ui.outputs import Outputs, plain_png
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.wording import printable

Request = GenerateRequest | GridRequest
MAX_LOADED = 16  # adapters in the pipeline
MAX_KEPT = 48  # jobs that ended, for pages that look at them again


class Loaded(NamedTuple):
    """An adapter in memory by its name in pictures, the files it came from, and how its base compares."""

    name: str
    stamp: Stamp
    match: str


class Engine:
    """Draws pictures and grids with one base and the adapters of a library.

    Every picture is drawn by itself, so that each is made again bit for bit from what its file says. Only who
    has the turn in `line` may use `pipeline` and `attached`.
    """

    default_steps = 20  # that a form starts with

    def __init__(
        self, base: str | Path, *, outputs: Path, folder_of: Callable[[str], Path],
        name_of: Callable[[str], str] = str, max_loaded: int = MAX_LOADED,
        check_free: Callable[[torch.device], None] = lambda device: None,
    ) -> None:  # fmt: skip
        """Open a base, whose weights the first job loads; pictures are written to `outputs`.

        `folder_of` and `name_of` say where an adapter of a library id lies, and what people call it;
        `check_free` refuses a job beside what else uses the device.
        """
        self.base = open_base(base)
        if self.base.is_inpainting:
            needed = "the studio needs one that draws from text alone"
            raise ValueError(f"{self.base.name} is a base for inpainting; {needed}")
        self.base_name = shareable_name(self.base.name) or self.base.name
        self.native_size, self.default_guidance = self.base.native_size, self.base.guidance_scale
        self.device, self.line, self.outputs = default_device(), jobs.Line(), Outputs(outputs)
        self.cost = Cost(self.base, self.device)
        self._folder_of, self._name_of, self._check_free = folder_of, name_of, check_free
        self._max_loaded, self._changing = max_loaded, Lock()
        self._loaded: Future[engines.Engine] | None = None
        self.jobs = list[Job]()  # the oldest first; of those that ended, the last ones
        self.attached: dict[str, Loaded] = {}  # adapters in memory by id, the least recently used first

    @property
    def pipeline(self) -> Any:
        """The base's models, loaded when they are first asked for."""
        return self._load().pipeline

    @property
    def fingerprint(self) -> str | None:
        """The short name of the base's weights, which are loaded to know it."""
        return self._load().fingerprint

    def start(self, request: Request, *, stop: Event | None = None, owner: str = "", place: str = "") -> Job:
        """Begin to draw pictures, or a grid row by row, or refuse it before the first step."""
        self.cost.check(self._sampling(request))
        folders = {each: self._folder_of(each) for each in request.adapters}
        control, notes = None, list[str]()
        if isinstance(request, GenerateRequest):
            following = [each for each, folder in folders.items() if holds_control(folder)]
            if request.control_image is None:
                none = "follows a control image, and none was given."
                notes = [f"{printable(self._name_of(each))} {none}" for each in following]
            elif len(following) == 1:
                control = ControlUse(request.control_image, following[0], request.control_strength)
            else:
                found = f"{len(following)} of them" if following else "none"
                raise ValueError(f"a control image needs one adapter that follows it; found {found}")
        if sum(not job.is_done for job in self.jobs) > jobs.MAX_WAITING:
            raise ValueError(f"{jobs.MAX_WAITING} jobs wait already; try again when some are done")
        job = Job(request, stop=stop, owner=owner, place=place)
        job.notes += notes
        ticket = self.line.join()  # here, as threads start in any order
        try:
            job.begin(partial(self._work, control=control, ticket=ticket))
        except RuntimeError:  # there is no room for another thread
            self.line.leave(ticket)
            raise
        with self._changing:  # others begin at the same time
            old = [each for each in self.jobs if each.is_done][:-MAX_KEPT]
            self.jobs = [*(each for each in self.jobs if each not in old), job]
        return job

    def seconds_left(self, job: Job) -> float | None:
        """Return how long a job takes from now on; None where nothing was measured."""
        known = job.state.seconds_left if job.state is not None else None
        return self.cost.seconds(job.request.sampling()) if known is None else known

    def _sampling(self, request: Request) -> Sampling:
        """Return what is to be drawn, with the wildcards that lie beside the pictures."""
        folder = self.outputs.folder.with_name("wildcards")
        return replace(request.sampling(), wildcards=Wildcards(folder if folder.is_dir() else None))

    def close(self, timeout: float = 10.0) -> None:
        """Stop all jobs and wait until they have stopped, `timeout` seconds at most."""
        running = [job for job in self.jobs if not job.is_done]
        for job in running:
            job.stop.set()
        wait([job.ended for job in running], timeout)

    def _work(self, job: Job, control: ControlUse | None, ticket: object) -> None:
        """Draw each place in a job's turn: a seed's picture and the base's right after it, or grid cells."""
        request, begun = job.request, time.monotonic()
        keep, start = request.keep_metadata, request.start
        is_grid, cells = isinstance(request, GridRequest), dict[str, Picture]()
        try:
            with self._turn(job, ticket):
                begun = time.monotonic()
                name, day = self.outputs.new_job()
                folder = day / name / grids.PICTURES_FOLDER if is_grid else day
                sampling, control = self._attach(job, control)
                used = {n for choice in sampling.choices for n, strength in choice.items() if strength}
                parts = [pair for n in used for pair in self._load().adapters[n].parts.items()]
                layers = {(component, layer) for component, part in parts for layer in part.modules()}
                job.touched_layers = len(layers)
                given = [control and control.image, start and start.image, start and start.mask]
                for image in filter(None, given if keep else ()):
                    self.outputs.keep_control(image)
                drawing = Drawing(self._load(), sampling, self.cost, job, "cell" if is_grid else "picture")
                sides = (sampling.prompts, sampling.seeds, sampling.choices)
                for prompt, seed, choice in itertools.product(*(range(len(side)) for side in sides)):
                    image = drawing.draw(sampling.request(prompt, seed, choice, control))
                    picture = Picture(prompt, seed, choice, image)
                    if picture.fault:
                        job.notes.append(f"The picture of seed {sampling.seeds[seed]} {picture.fault}.")
                    of_pair = f"i{seed:02d}{BASE_SUFFIX if choice else ''}"
                    picture_id = f"{name}-{f'c{len(cells) + 1:03d}' if is_grid else of_pair}"
                    if is_grid:
                        cells[f"{grids.PICTURES_FOLDER}/{picture_id}.png"] = picture
                    job.drawn.append(self.outputs.save(picture, folder, picture_id, keep_metadata=keep))
            if is_grid and keep:
                files = grids.sheet_files(sampling, cells)
                job.manifest = self.outputs.write(day / name, grids.MANIFEST_NAME, files[grids.MANIFEST_NAME])
                job.sheet = self.outputs.write(day / name, grids.SHEET_NAME, files[grids.SHEET_NAME])
            elif is_grid:
                sheet = plain_png(grids.draw_grid(sampling, list(cells.values())))
                job.sheet = self.outputs.write(day / name, grids.SHEET_NAME, sheet)
        except Stopped:
            job.stopped = True
        job.seconds = time.monotonic() - begun

    @contextmanager
    def _turn(self, job: Job, ticket: object) -> Iterator[None]:
        """Wait for the lock, load what is missing, and hold the lock inside."""

        def wait_at(place: int) -> None:
            job.state = Working(f"Waiting: {'yours is next' if place == 1 else f'number {place} in line'}")

        with self.line.turn(job.stop, wait_at, ticket), _memory_minded():
            self._check_free(self.device)
            if self._loaded is None or not self._loaded.done():
                job.state = Working("Loading the models …")
            self._load(job.stop)
            self.cost.check_memory(job.request.sampling(), psutil.virtual_memory().available)
            yield

    def _attach(self, job: Job, control: ControlUse | None) -> tuple[Sampling, ControlUse | None]:
        """Return what to draw, with adapters by their names in pictures; the job notes what is doubtful."""
        sampling, ids, names = self._sampling(job.request), list(job.request.adapters), dict[str, str]()
        for each in ids:
            one = self._attached(each, keep=ids)
            names[each] = one.name
            if one.match == "other weights":
                made = "was made for a base of this architecture with other weights than this one"
                raise ValueError(f"“{printable(one.name)}” {made}; use one that was made for this base")
            if one.match == "unknown":
                unsaid = "does not say which base it was made for; its shapes fit."
                job.notes.append(f"{printable(one.name)} {unsaid}")
        prompts = [*sampling.drawn_prompts(), *filter(None, [sampling.negative_prompt])]
        prompts = [plain_text(prompt) if self.base.takes_weights else prompt for prompt in prompts]
        cuts = [find_cut(prompt, self.pipeline.tokenizer) for prompt in dict.fromkeys(prompts)]
        job.notes += [str(cut) for cut in cuts if cut is not None]
        choices = tuple({names[each]: s for each, s in choice.items()} for choice in sampling.choices)
        if control is not None:
            control = replace(control, control=names[control.control])
        return replace(sampling, choices=choices), control

    def _attached(self, adapter_id: str, *, keep: Collection[str]) -> Loaded:
        """Load an adapter that is not, or not as it is now; where it does not fit, the others stay."""
        engine, folder = self._load(), self._folder_of(adapter_id)
        stamp, used = stamp_of(folder), self.attached.pop(adapter_id, None)
        if used is not None and used.stamp != stamp:  # it was renamed, or is another by now
            engine.remove_adapter(used.name)
            used = None
        if used is None:
            adapter, name = read_adapter(folder), self._name_of(adapter_id)
            for each in [each for each in self.attached if each not in keep]:  # one method works at a time
                is_other = _method(engine.adapters[self.attached[each].name]) != _method(adapter)
                if is_other or len(self.attached) >= self._max_loaded:
                    engine.remove_adapter(self.attached.pop(each).name)
            called = itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
            name = next(each for each in called if each not in engine.adapters)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the one on other weights, which the studio says itself
                used = Loaded(name, stamp, engine.add_adapter(name, adapter))
        self.attached[adapter_id] = used
        return used

    def _load(self, stop: Event | None = None) -> engines.Engine:
        """Return what is loaded once; who stops waiting for it leaves the loading to go on for the next."""
        with self._changing:
            if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
                self._loaded = in_background(self._open)
            loaded = self._loaded
        while stop is not None and not wait([loaded], timeout=jobs.POLL_SECONDS).done:
            jobs.check(stop)
        return loaded.result()

    def _open(self) -> engines.Engine:
        """Load the base, to draw with adapters of any method, a picture at a time."""
        engine = engines.Engine(self.base, device=self.device, max_rows=1, num_slots=None)
        _ = engine.fingerprint
        return engine


@contextmanager
def _memory_minded() -> Iterator[None]:
    """Turn a lack of memory into a ValueError on what to do, and give back to the system what was taken."""
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
        said = f"memory ran out ({text}); choose smaller pictures, or end what else uses it"
        raise ValueError(said) from None
    finally:
        give_memory_back()  # 500 MB after 100 sizes


def _method(adapter: Adapter) -> str | None:
    return name_of(adapter.config) if adapter.parts else None
