"""What draws for the studio: one base in memory, for jobs in turn that tell how far they are, and stop."""

import gc
import itertools
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
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
from ether_diffusion.ui.jobs import BASE_SUFFIX, Emit, Finished, Job, Stopped, Working, in_background
from ether_diffusion.ui.outputs import Outputs, plain_png
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.wording import printable

Request = GenerateRequest | GridRequest
MAX_LOADED = 16  # adapters in the pipeline
MAX_KEPT = 48  # jobs that ended, for pages that look at them again
_DOUBTS = {
    "other weights": "{} was made for another base of this architecture; results may differ.",
    "unknown": "{} does not say which base it was made for; its shapes fit.",
}


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
        self._max_loaded, self._loading = max_loaded, threading.Lock()
        self._loaded: Future[engines.Engine] | None = None
        self.jobs = list[Job]()  # the oldest first; of those that ended, the last ones

    @property
    def pipeline(self) -> Any:
        """The base's models, loaded when they are first asked for."""
        return self._load().pipeline

    @property
    def fingerprint(self) -> str | None:
        """The short name of the base's weights, which are loaded to know it."""
        return self._load().fingerprint

    @cached_property
    def attached(self) -> "LoadedAdapters":
        """The adapters in memory."""
        return LoadedAdapters(self._load(), self._max_loaded)

    def start(
        self, request: Request, *, stop: threading.Event | None = None, owner: str = "", place: str = ""
    ) -> Job:
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
        stop = stop or threading.Event()
        work = partial(self._work, request, control, notes, stop)
        ended = [job for job in self.jobs if job.is_done]
        self.jobs = [job for job in self.jobs if job not in ended[:-MAX_KEPT]]
        self.jobs.append(job := Job(work, request, stop, owner=owner, place=place))
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

    def _work(
        self,
        request: Request,
        control: ControlUse | None,
        notes: list[str],
        stop: threading.Event,
        emit: Emit,
    ) -> Finished:
        """Draw each place in a job's turn: a seed's picture and the base's right after it, or grid cells."""
        begun, touched, stopped, keep = time.monotonic(), 0, False, request.keep_metadata
        is_grid, (job, day) = isinstance(request, GridRequest), self.outputs.new_job()
        folder = day / job / grids.PICTURES_FOLDER if is_grid else day
        pictures, of_base = list[jobs.SavedPicture](), list[jobs.SavedPicture]()
        drawn, files = dict[str, Picture](), list[Path | None]()
        try:
            with self._turn(request.sampling(), stop, emit):
                begun = time.monotonic()
                sampling, control = self._attach(request, control, notes)
                touched = self.attached.num_touched(sampling)
                if control is not None and keep:
                    self.outputs.keep_control(control.image)
                for given in (request.start.image, request.start.mask) if request.start and keep else ():
                    if given is not None:
                        self.outputs.keep_control(given)
                what = "cell" if is_grid else "picture"
                drawing = Drawing(self._load(), sampling, cost=self.cost, stop=stop, emit=emit, what=what)
                sides = (sampling.prompts, sampling.seeds, sampling.choices)
                for prompt, seed, choice in itertools.product(*(range(len(side)) for side in sides)):
                    image = drawing.draw(sampling.request(prompt, seed, choice, control))
                    picture = Picture(prompt, seed, choice, image)
                    if picture.fault:
                        notes.append(f"The picture of seed {sampling.seeds[seed]} {picture.fault}.")
                    of_pair = f"i{seed:02d}{BASE_SUFFIX if choice else ''}"
                    name = f"{job}-{f'c{len(pictures) + 1:03d}' if is_grid else of_pair}"
                    saved = self.outputs.save(picture, folder, name, keep_metadata=keep)
                    (of_base if saved.is_base else pictures).append(saved)
                    if is_grid:
                        drawn[f"{grids.PICTURES_FOLDER}/{name}.png"] = picture
                    emit(saved)
            if is_grid and not keep:
                sheet = plain_png(grids.draw_grid(sampling, list(drawn.values())))
                files = [self.outputs.write(day / job, grids.SHEET_NAME, sheet)]
            elif is_grid:
                made = grids.sheet_files(sampling, drawn)
                files = [
                    self.outputs.write(day / job, name, made[name])
                    for name in (grids.SHEET_NAME, grids.MANIFEST_NAME)
                ]
        except Stopped:
            stopped = True
        seconds = time.monotonic() - begun
        return Finished(tuple(pictures), tuple(of_base), seconds, stopped, touched, tuple(notes), *files)

    @contextmanager
    def _turn(self, sampling: Sampling, stop: threading.Event, emit: Emit) -> Iterator[None]:
        """Wait for the lock, load what is missing, and hold the lock inside."""
        words = {1: "yours is next"}
        waiting = lambda n: emit(Working(f"Waiting: {words.get(n, f'number {n} in line')}"))  # noqa: E731
        with self.line.turn(stop, waiting), _memory_minded():
            self._check_free(self.device)
            if self._loaded is None or not self._loaded.done():
                emit(Working("Loading the models …"))
            self._load(stop)
            self.cost.check_memory(sampling, psutil.virtual_memory().available)
            yield

    def _attach(
        self, request: Request, control: ControlUse | None, notes: list[str]
    ) -> tuple[Sampling, ControlUse | None]:
        """Return what to draw, with adapters by their names in pictures; notes get what is doubtful."""
        sampling, ids, names = self._sampling(request), list(request.adapters), dict[str, str]()
        for each in ids:
            one = self.attached.attach(each, self._folder_of(each), self._name_of(each), keep=ids)
            names[each] = one.name
            if one.match == "other weights" and not request.allow_other_base:
                raise ValueError(
                    f"“{printable(one.name)}” was made for a base of this architecture with other weights "
                    "than this one; results may differ: it is used only where that is allowed expressly"
                )
            if one.match in _DOUBTS:
                notes.append(_DOUBTS[one.match].format(printable(one.name)))
        prompts = [*sampling.drawn_prompts(), *filter(None, [sampling.negative_prompt])]
        prompts = [plain_text(prompt) if self.base.takes_weights else prompt for prompt in prompts]
        cuts = [find_cut(prompt, self.pipeline.tokenizer) for prompt in dict.fromkeys(prompts)]
        notes += [str(cut) for cut in cuts if cut is not None]
        choices = tuple({names[each]: s for each, s in choice.items()} for choice in sampling.choices)
        if control is not None:
            control = replace(control, control=names[control.control])
        return replace(sampling, choices=choices), control

    def _load(self, stop: threading.Event | None = None) -> engines.Engine:
        """Return what is loaded once; who stops waiting for it leaves the loading to go on for the next."""
        with self._loading:
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


class Loaded(NamedTuple):
    """An adapter in memory by its name in pictures, the files it came from, and how its base compares."""

    name: str
    stamp: Stamp
    match: str


class LoadedAdapters:
    """Holds the adapters that were used last."""

    def __init__(self, engine: engines.Engine, max_loaded: int) -> None:
        self._engine, self._max_loaded = engine, max_loaded
        self._loaded: dict[str, Loaded] = {}  # the least recently used first

    @property
    def ids(self) -> tuple[str, ...]:
        """What is loaded, the least recently used first."""
        return tuple(self._loaded)

    def attach(self, adapter_id: str, folder: Path, name: str, *, keep: Collection[str]) -> Loaded:
        """Load an adapter that is not, under a name for people; where it does not fit, the others stay."""
        stamp, used = stamp_of(folder), self._loaded.pop(adapter_id, None)
        if used is not None and used.stamp != stamp:  # it was renamed, or is another by now
            self._engine.remove_adapter(used.name)
            used = None
        if used is None:
            adapter = read_adapter(folder)
            self._make_room(adapter, keep)
            called = itertools.chain([name], (f"{name} ({n})" for n in itertools.count(2)))
            name = next(each for each in called if each not in self._engine.adapters)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the one on other weights, which the studio says itself
                used = Loaded(name, stamp, self._engine.add_adapter(name, adapter))
        self._loaded[adapter_id] = used
        return used

    def num_touched(self, sampling: Sampling) -> int:
        """Return how many modules of the models carry at least one adapter that is in force."""
        used = {name for choice in sampling.choices for name, strength in choice.items() if strength}
        parts = [pair for name in used for pair in self._engine.adapters[name].parts.items()]
        return len({(component, module) for component, part in parts for module in part.modules()})

    def _make_room(self, adapter: Adapter, keep: Collection[str]) -> None:
        """Unload adapters of other methods, and those used longest ago where there are too many."""
        for each in [each for each in self._loaded if each not in keep]:
            is_other = _method(self._engine.adapters[self._loaded[each].name]) != _method(adapter)
            if is_other or len(self._loaded) >= self._max_loaded:
                self._engine.remove_adapter(self._loaded.pop(each).name)


def _method(adapter: Adapter) -> str | None:
    return name_of(adapter.config) if adapter.parts else None
