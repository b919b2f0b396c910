"""The one base in memory with adapters attached to it, and the one lock that is held to use it."""

import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.adapter_file import BaseFingerprint, base_fingerprint
from ether_diffusion.adapter_file.fit import plain_targets
from ether_diffusion.adapter_file.wording import printable
from ether_diffusion.base import Base
from ether_diffusion.pipelines.opening import default_device, default_dtype, open_pipeline
from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.training import find_cut
from ether_diffusion.training.shortages import is_out_of_memory
from ether_diffusion.tuner import EtherConfig
from ether_diffusion.ui.attached import MAX_LOADED, AttachedAdapters
from ether_diffusion.ui.drawing import Drawing
from ether_diffusion.ui.events import Previewing, StopToken, Waiting
from ether_diffusion.ui.line import Line
from ether_diffusion.ui.speed import Speed


@dataclass(frozen=True)
class Turn:
    """A job at work: what draws its pictures, and what is known before the first step."""

    drawing: Drawing
    touched_layers: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """What a job needs: adapters' folders by id, what to draw and how many pictures that is."""

    sampling: Sampling
    num_images: int
    folders: Mapping[str, Path]
    allow_other_base: bool


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
        self.speed = Speed(base.native_size)
        self._max_loaded, self._check_free = max_loaded, check_free
        self._loading = threading.Lock()
        self._pipeline: Any = None

    @property
    def pipeline(self) -> Any:
        """The pipeline, which only a job in its turn may call."""
        with self._loading:
            if self._pipeline is None:
                self._pipeline = open_pipeline(
                    self.base, device=self.device, dtype=default_dtype(self.device), with_control=True
                )
                self._pipeline.set_progress_bar_config(disable=True)
        return self._pipeline

    @cached_property
    def attached(self) -> AttachedAdapters:
        """The adapters in the pipeline, which only a job in its turn may change."""
        return AttachedAdapters(self.pipeline, max_loaded=self._max_loaded)

    @cached_property
    def base_fingerprint(self) -> BaseFingerprint | None:
        """The fingerprint of the base's attention projections, of its own weights."""
        unet = self.pipeline.unet
        return base_fingerprint(unet, sorted(plain_targets(unet, EtherConfig())))

    @contextmanager
    def turn(
        self, order: Order, stop: StopToken, on_state: Callable[[Waiting | Previewing], None]
    ) -> Iterator[Turn]:
        """Wait for the lock, load what is missing, and hold the lock inside.

        Raises:
            Stopped: the token was stopped.
            FileNotFoundError, ValueError: an adapter does not fit, or memory ran out.
        """
        with self.line.turn(stop, lambda place: on_state(Waiting(place))), _shortage_explained():
            self._check_free(self.device)
            on_state(Previewing(0, order.sampling.steps, None, None, 0, order.num_images))
            drawing = Drawing(
                self.pipeline,
                order.sampling,
                num_images=order.num_images,
                stop=stop,
                speed=self.speed,
                on_state=on_state,
            )
            stop.check()
            doubts = self.attached.attach(order.folders, allow_other_base=order.allow_other_base)
            used = {
                name for choice in order.sampling.choices for name, strength in choice.items() if strength
            }
            yield Turn(drawing, self.attached.num_touched(used), (*doubts, *self._cuts(order.sampling)))

    def _cuts(self, sampling: Sampling) -> list[str]:
        prompts = [*sampling.prompts, *filter(None, [sampling.negative_prompt])]
        cuts = [find_cut(prompt, self.pipeline.tokenizer) for prompt in dict.fromkeys(prompts)]
        return [str(cut) for cut in cuts if cut is not None]


@contextmanager
def _shortage_explained() -> Iterator[None]:
    """Turn a lack of memory into a ValueError on what to do, and give back what was taken."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
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
