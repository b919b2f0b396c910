"""One job's pictures, drawn one by one: looked at now and then, timed, and stopped at any operation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.bases import decode_latents
from ether_diffusion.pipelines.sampling import ControlUse, Picture, Sampling, draw_pictures
from ether_diffusion.ui.cost import Pace, Speed
from ether_diffusion.ui.events import Previewing, StopToken
from ether_diffusion.ui.stopping import StopInside

Place = tuple[int, int, int]
"""Indices into the prompts, seeds and choices of a sampling."""
MAX_SIDE_LATENTS = 32
"""Larger latents are shrunk first: 256 px for a VAE that divides sides by 8."""
REST = 4.0
"""After a look of t seconds the next comes REST · t later or more: a fifth of the time at most."""
MIN_REST_SECONDS = 0.2


class Drawing:
    """Draws single pictures: none depends on what is drawn beside it, so each can be made again alone."""

    def __init__(
        self,
        pipeline: Any,
        sampling: Sampling,
        *,
        stop: StopToken,
        speed: Speed,
        on_state: Callable[[Previewing], None],
    ) -> None:
        self._pipeline, self._sampling, self._num_images = pipeline, sampling, sampling.num_pictures
        self._stop, self._speed, self._on_state = stop, speed, on_state
        self._previewer = Previewer(pipeline)
        self._num_done = 0

    def draw(self, place: Place, control: ControlUse | None = None) -> Picture:
        """Draw the picture of a place; with `control` unless it is the base's.

        Raises:
            Stopped: the token was stopped.
        """
        self._stop.check()
        prompt, seed, choice = place
        one = replace(
            self._sampling,
            prompts=(self._sampling.prompts[prompt],),
            seeds=(self._sampling.seeds[seed],),
            choices=(self._sampling.choices[choice],),
            batch_size=1,
        )
        timer = _Timer()
        self._tell(0, one.steps, None)

        def on_step(step: int, num_steps: int, latents: Tensor) -> None:
            self._stop.check()
            timer.stepped()
            self._previewer.look(latents)
            self._tell(step, num_steps, timer.pace)
            timer.resumed()

        with StopInside(self._stop), _vae_as_it_was(self._pipeline.vae):
            drawn = draw_pictures(self._pipeline, one, control=control, on_step=on_step)[0]
        self._stop.check()
        self._num_done += 1
        if timer.pace is not None:
            self._speed.measured(one, replace(timer.pace, picture=timer.seconds_beside()))
        return replace(drawn, prompt=prompt, seed=seed, choice=choice)

    def _tell(self, step: int, num_steps: int, pace: Pace | None) -> None:
        known = self._speed.of(self._sampling)
        beside = 0.0 if known is None else known.picture
        pictures = self._num_images - self._num_done
        steps = pictures * num_steps - step
        pace = pace or known
        left = None if pace is None else steps * pace.step + pictures * beside
        self._on_state(
            Previewing(step, num_steps, left, self._previewer.image, self._num_done, self._num_images)
        )


@contextmanager
def _vae_as_it_was(vae: Any) -> Iterator[None]:
    """Undo the pipelines' change of the dtype where a stop comes before they do."""
    dtype = vae.dtype
    try:
        yield
    finally:
        if vae.dtype != dtype:
            vae.to(dtype)


class _Timer:
    """Measures the steps of a picture, without the time spent on looking at it.

    The first step counts only where it is the only one: the prompt is encoded before it.
    """

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._steps: list[float] = []
        self._looked = 0.0

    def stepped(self) -> None:
        now = time.monotonic()
        self._steps.append(now - self._last)
        self._last = now

    def resumed(self) -> None:
        now = time.monotonic()
        self._looked += now - self._last
        self._last = now

    @property
    def pace(self) -> Pace | None:
        counted = self._steps[1:] or self._steps
        return Pace(sum(counted) / len(counted), 0.0) if counted else None

    def seconds_beside(self) -> float:
        """Return the time of the picture so far that is neither a step's nor a look's."""
        pace = self.pace
        steps = 0.0 if pace is None else pace.step * len(self._steps)
        return max(0.0, time.monotonic() - self._start - self._looked - steps)


class Previewer:
    """Looks at latents at the first step, and then as often as costs little."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._next = 0.0
        self.image: Image.Image | None = None
        """The last look."""

    def look(self, latents: Tensor) -> None:
        """Decode latents (b, c, h, w) of one picture, if it is time."""
        start = time.monotonic()
        if start < self._next:
            return
        self.image = _decode(self._pipeline, _denoised(self._pipeline, latents))
        end = time.monotonic()
        self._next = end + max(MIN_REST_SECONDS, REST * (end - start))


def _denoised(pipeline: Any, latents: Tensor) -> Tensor:
    """Return the picture that a step aimed at where the scheduler remembers it, else the noisy one."""
    scheduler = pipeline.scheduler
    if scheduler.config.get("algorithm_type") == "dpmsolver++":
        remembered = getattr(scheduler, "model_outputs", [None])[-1]
        if isinstance(remembered, Tensor) and remembered.shape == latents.shape:
            return remembered
    return latents


@torch.no_grad()
def _decode(pipeline: Any, latents: Tensor) -> Image.Image:
    vae, latents = pipeline.vae, latents[:1].detach().float()
    shrink = MAX_SIDE_LATENTS / max(latents.shape[-2:])
    if shrink < 1:
        sides = [max(1, int(side * shrink)) for side in latents.shape[-2:]]
        latents = torch.nn.functional.interpolate(latents, size=sides, mode="area")
    dtype = vae.dtype
    is_cast = dtype == torch.float16 and vae.config.force_upcast  # as the pipelines do for SDXL
    try:
        if is_cast:
            vae.to(torch.float32)
        return decode_latents(vae, latents)[0]
    finally:
        if is_cast:
            vae.to(dtype)
