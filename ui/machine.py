"""The one base in memory with adapters attached to it, and the one lock that is held to use it."""

import ctypes
import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import psutil
import torch

from ether_diffusion.adapters import BaseFingerprint, base_fingerprint
from ether_diffusion.adapters.format import Fact
from ether_diffusion.adapters.models import plain_targets
from ether_diffusion.bases import Base
from ether_diffusion.console import ran_short
from ether_diffusion.pipelines.call import scheduler_settings
from ether_diffusion.pipelines.opening import default_device, default_dtype, open_pipeline
from ether_diffusion.pipelines.sampling import ControlUse, Sampling
from ether_diffusion.training import find_cut
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.ui.attached import MAX_LOADED, AttachedAdapters, Wanted
from ether_diffusion.ui.cost import Cost, Speed
from ether_diffusion.ui.drawing import Drawing
from ether_diffusion.ui.events import Previewing, StopToken, Waiting
from ether_diffusion.ui.jobs import Line
from ether_diffusion.wording import printable

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Turn:
    """A job at work: what draws its pictures, and what is known before the first step.

    In `sampling` and `control` adapters go by their names in the pipeline, which are those for people.
    """

    drawing: Drawing
    sampling: Sampling
    control: ControlUse | None
    touched_layers: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """What a job needs: what to draw, and adapters by library id."""

    sampling: Sampling
    adapters: Mapping[str, Wanted]
    allow_other_base: bool = False
    control: ControlUse | None = None


@dataclass(frozen=True)
class BaseFacts:
    """What pictures say of a base: its weights' fingerprint, and its scheduler with its settings."""

    fingerprint: BaseFingerprint | None
    scheduler: str
    scheduler_config: Mapping[str, Fact]


class Machine:
    """Loads the base when the first job has its turn."""

    def __init__(
        self,
        base: Base,
        *,
        device: torch.device | None = None,
        max_loaded: int = MAX_LOADED,
        check_free: Callable[[torch.device], None] = lambda device: None,
    ) -> None:
        self.base = base
        self.device = device or default_device()
        self.line = Line()
        self.cost = Cost(base, self.device)
        self.speed = Speed(self.cost)
        self._max_loaded, self._check_free = max_loaded, check_free
        self._loading = threading.Lock()
        self._loaded: Future[tuple[Any, BaseFacts]] | None = None

    @property
    def pipeline(self) -> Any:
        """The pipeline, which only a job in its turn may call."""
        return self._load()[0]

    @property
    def facts(self) -> BaseFacts:
        """What pictures say of the base, which is loaded to know it."""
        return self._load()[1]

    @cached_property
    def attached(self) -> AttachedAdapters:
        """The adapters in the pipeline, which only a job in its turn may change."""
        return AttachedAdapters(self.pipeline, max_loaded=self._max_loaded)

    @contextmanager
    def turn(
        self, order: Order, stop: StopToken, on_state: Callable[[Waiting | Previewing], None]
    ) -> Iterator[Turn]:
        """Wait for the lock, load what is missing, and hold the lock inside.

        Raises:
            Stopped: the token was stopped.
            FileNotFoundError, ValueError: an adapter does not fit, or memory ran out.
        """
        waiting = self.line.turn(stop, lambda place: on_state(Waiting(place)))
        with waiting, _memory_given_back(), _shortage_explained():
            self._check_free(self.device)
            if self._loaded is None or not self._loaded.done():
                num_images = order.sampling.num_pictures
                on_state(Previewing(0, order.sampling.steps, None, None, 0, num_images, is_loading=True))
            self._load(stop)
            available = psutil.virtual_memory().available
            self.cost.check_memory(order.sampling, order.sampling.num_pictures, available=available)
            attached = self.attached
            names = attached.attach(order.adapters)
            doubts = attached.doubts(order.adapters, allow_other_base=order.allow_other_base)
            sampling, control = _named(order, names)
            used = {name for choice in sampling.choices for name, strength in choice.items() if strength}
            drawing = Drawing(self.pipeline, sampling, stop=stop, speed=self.speed, on_state=on_state)
            notes = (*doubts, *self._cuts(sampling))
            yield Turn(drawing, sampling, control, attached.num_touched(used), notes)

    def _load(self, stop: StopToken | None = None) -> tuple[Any, BaseFacts]:
        """Return what is loaded once; who stops waiting for it leaves the loading to go on for the next."""
        with self._loading:
            if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
                self._loaded = Future()
                threading.Thread(target=_fill, args=(self._loaded, self._open), daemon=True).start()
            loaded = self._loaded
        while stop is not None and not wait([loaded], timeout=_POLL_SECONDS).done:
            stop.check()
        return loaded.result()

    def _open(self) -> tuple[Any, BaseFacts]:
        dtype = default_dtype(self.device)
        pipeline = open_pipeline(self.base, device=self.device, dtype=dtype, with_control=True)
        pipeline.set_progress_bar_config(disable=True)
        # now, while no adapter is attached
        names = sorted(plain_targets(pipeline.unet, EtherConfig()))
        facts = BaseFacts(
            base_fingerprint(pipeline.unet, names) if names else None,
            type(pipeline.scheduler).__name__,
            scheduler_settings(pipeline.scheduler),
        )
        return pipeline, facts

    def _cuts(self, sampling: Sampling) -> list[str]:
        prompts = [*sampling.prompts, *filter(None, [sampling.negative_prompt])]
        cuts = [find_cut(prompt, self.pipeline.tokenizer) for prompt in dict.fromkeys(prompts)]
        return [str(cut) for cut in cuts if cut is not None]


def _fill(future: "Future[tuple[Any, BaseFacts]]", work: Callable[[], tuple[Any, BaseFacts]]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # is raised where somebody waits
        future.set_exception(error)


def _named(order: Order, names: Mapping[str, str]) -> tuple[Sampling, ControlUse | None]:
    choices = tuple({names[name]: s for name, s in choice.items()} for choice in order.sampling.choices)
    control = order.control
    if control is not None and control.control is not None:
        control = replace(control, control=names[control.control])
    return replace(order.sampling, choices=choices), control


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
