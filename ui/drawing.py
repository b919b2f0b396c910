"""One job's pictures: what they cost; drawn one by one, and looked at now and then."""

import json
import math
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ether_diffusion.bases import Base, Denoiser
from ether_diffusion.console import machine_memory
from ether_diffusion.pipelines.sampling import SIDE, Request, Sampling
from ether_diffusion.serving.engine import Engine
from ether_diffusion.serving.engine import Job as Step
from ether_diffusion.ui.jobs import Job, Working, check
from ether_diffusion.ui.words import counted, duration, kilobytes

MAX_SECONDS = 3600.0  # of one job: others wait for it
REST, MIN_REST_SECONDS = 4.0, 0.2
# the next look comes after REST · t of the last: a fifth of the time at most
_TENSORS = 8  # that a VAE has in memory at a time, as large as the largest; 7 on the embedded base
_HELD_BYTES = 6  # of each pixel of each picture until a job ends: the picture, and its place on a sheet
_PROBE_SIDE = 768
_Kind = tuple[int, int, bool]  # width and height (px), and whether it is guided, which is twice the work


@dataclass(frozen=True)
class Pace:
    """Seconds per denoising step, and per picture beside its steps."""

    step: float
    picture: float


class Cost:
    """What pictures of a base cost on a device; the last measured pace is kept by size and guidance."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self._base, self._device = base, device
        self.of_step = lru_cache(maxsize=64)(self._count_step)
        self._paces: dict[_Kind, Pace] = {}

    def check(self, sampling: Sampling) -> None:
        """Refuse what needs over half of this machine's memory, or longer than a job may."""
        self.check_memory(sampling, machine_memory() // 2)
        seconds = self.seconds(sampling) or self.least_seconds(sampling)
        if seconds > MAX_SECONDS:
            takes = f"with {sampling.steps} steps would take about {duration(seconds)} on this machine"
            most = f"up to {duration(MAX_SECONDS)} is drawn at once"
            self._refuse(sampling, takes, f"{most}; choose smaller or fewer ones, or fewer steps")

    def check_memory(self, sampling: Sampling, room: int) -> None:
        """Refuse pictures that do not fit into `room` bytes; accelerators say so themselves."""
        needed = self.num_bytes(sampling)
        if self._device.type == "cpu" and needed > room:
            takes = f"would take about {needed / 2**30:.1f} GiB of memory"
            most = f"{room / 2**30:.1f} GiB can be had here; choose smaller or fewer ones"
            self._refuse(sampling, takes, most)

    def num_bytes(self, sampling: Sampling) -> int:
        """Return the memory that pictures need beside the models."""
        width, height, _ = self._kind(sampling)
        return width * height * (self._vae_bytes + _HELD_BYTES * sampling.num_pictures)

    @cached_property
    def largest_side(self) -> int:
        """The side (px) of the largest square picture that this machine has the memory for."""
        if self._device.type != "cpu":
            return int(SIDE.most)
        fits = math.isqrt(machine_memory() // 2 // (self._vae_bytes + _HELD_BYTES))
        return int(min(SIDE.most, fits // 8 * 8))

    def seconds(self, sampling: Sampling) -> float | None:
        """Return how long pictures take; None before anything was measured."""
        pace, number = self.pace(sampling), sampling.num_pictures
        return None if pace is None else number * (sampling.num_steps * pace.step + pace.picture)

    def least_seconds(self, sampling: Sampling) -> float:
        """Return how long pictures take a CPU that is always at its best; 0 elsewhere."""
        if self._device.type != "cpu":
            return 0.0
        num_steps = sampling.num_pictures * sampling.num_steps
        return num_steps * self.of_step(*self._kind(sampling)) / self._flop_per_second

    def words(self, sampling: Sampling) -> str:
        """Say what pictures cost: how many, how long on this machine, and how much of its memory."""
        number, seconds, took = sampling.num_pictures, self.seconds(sampling), ""
        if seconds is not None:
            took = f"about {duration(seconds)}"
        elif (least := self.least_seconds(sampling)) > 1:
            took = f"{duration(least)} or more"
        took = took or "how long is known after the first picture"
        said = [counted(number, "picture"), counted(number * sampling.num_steps, "step"), took]
        memory = [f"{kilobytes(self.num_bytes(sampling))} of memory"] * (self._device.type == "cpu")
        return " · ".join(said + memory)

    def measured(self, sampling: Sampling, pace: Pace) -> None:
        """Remember what was measured."""
        self._paces[self._kind(sampling)] = pace

    def pace(self, sampling: Sampling) -> Pace | None:
        """Return the pace to expect, scaled from the nearest size by the operations of a step."""
        kind = self._kind(sampling)
        if kind in self._paces or not self._paces:
            return self._paces.get(kind)
        pixels = kind[0] * kind[1]
        nearest = min(self._paces, key=lambda known: abs(known[0] * known[1] - pixels))
        known, ratio = self._paces[nearest], self.of_step(*kind) / self.of_step(*nearest)
        return Pace(known.step * ratio, known.picture * pixels / (nearest[0] * nearest[1]))

    def _kind(self, sampling: Sampling) -> _Kind:
        native = self._base.native_size
        return sampling.width or native, sampling.height or native, sampling.guidance_scale > 1

    def _refuse(self, sampling: Sampling, takes: str, most: str) -> None:
        width, height, _ = self._kind(sampling)
        pictures = f"{counted(sampling.num_pictures, 'picture')} of {width} × {height} px"
        raise ValueError(f"{pictures} {takes}, and {most}")

    def _count_step(self, width: int, height: int, is_guided: bool) -> float:
        """Return the floating-point operations of a denoising step."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._base.predict_nothing(self._denoiser, batch=1 + is_guided, size=(height, width))
        return float(counter.get_total_flops())

    @cached_property
    def _denoiser(self) -> Denoiser:
        return self._base.empty_denoiser()

    @cached_property
    def _vae_bytes(self) -> int:
        """Of each pixel while the VAE decodes: of float32 channels that come to the full size."""
        config = json.loads((self._base.vae_folder / "config.json").read_bytes())
        return 4 * _TENSORS * int(max(config.get("block_out_channels", [128, 256])[:2]))

    @cached_property
    def _flop_per_second(self) -> float:
        """What this CPU does at best: no picture is drawn faster."""
        matrix, best = torch.ones(_PROBE_SIDE, _PROBE_SIDE), math.inf
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return 2 * _PROBE_SIDE**3 / best


class Drawing:
    """Draws the pictures of a job one by one: none depends on another, so each can be made again alone."""

    def __init__(self, engine: Engine, sampling: Sampling, cost: Cost, job: Job, what: str) -> None:
        self._engine, self._sampling, self._cost, self._job, self._what = engine, sampling, cost, job, what
        self._num_done, self._next_look = 0, 0.0
        self._image: Image.Image | None = None

    def draw(self, request: Request) -> Image.Image:
        """Draw a picture of the sampling, or raise Stopped."""
        stopping = partial(check, self._job.stop)
        stopping()
        self._tell(0, None)
        begun = last = time.monotonic()
        steps, looked = list[float](), 0.0

        def per_step() -> float:
            timed = steps[1:] or steps  # the prompt is encoded before the first
            return sum(timed) / len(timed)

        def on_step(step: Step) -> None:
            nonlocal last, looked
            stopping()
            now = time.monotonic()
            steps.append(now - last)
            if now >= self._next_look:
                self._image = self._engine.preview(step)
                end = time.monotonic()
                self._next_look = end + max(MIN_REST_SECONDS, REST * (end - now))
            self._tell(step.step, per_step())
            last = time.monotonic()
            looked += last - now

        (image,) = self._engine.draw([request], on_step=on_step, check=stopping)
        stopping()
        self._num_done += 1
        beside = time.monotonic() - begun - looked - per_step() * len(steps)
        self._cost.measured(self._sampling, Pace(per_step(), max(0.0, beside)))
        return image

    def _tell(self, step: int, per_step: float | None) -> None:
        every, done, left = self._sampling, self._num_done, None
        words, number = [f"Step {step} of {every.num_steps}"], every.num_pictures
        if number > 1:
            words.append(f"{self._what} {min(done + 1, number)} of {number}")
        pace = self._cost.pace(every) or Pace(per_step or 0.0, 0.0)
        if per_step := per_step or pace.step:
            left = ((number - done) * every.num_steps - step) * per_step + (number - done) * pace.picture
            words.append(f"about {duration(left)} left")
        share = (done + step / every.num_steps) / number
        self._job.state = Working(" · ".join(words), share, self._image, step, left)
