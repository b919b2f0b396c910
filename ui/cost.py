"""What pictures take of this machine: memory and operations, known before loading, and the pace of steps."""

import json
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from ether_diffusion.bases import Base, Denoiser
from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.ui.facts import counted, duration

MAX_SECONDS = 3600.0
"""Of one job: others wait for it."""
_TENSORS = 8
"""That a VAE has in memory at a time, as large as the largest; measured: 7 on the embedded base."""
_HELD_BYTES = 6
"""Of each pixel of each picture until a job ends: the picture, and its place on a sheet."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_PROBE_SIDE = 768


@dataclass(frozen=True)
class Pace:
    """Seconds per denoising step, and per picture beside its steps."""

    step: float
    picture: float


class Cost:
    """What pictures of a base cost on a device; the last measured pace is kept by size and guidance."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self._base, self._device = base, device
        self._step_flop = lru_cache(maxsize=64)(self._count_step)
        self._paces: dict[tuple[int, int, bool], Pace] = {}

    def check(self, sampling: Sampling) -> None:
        """Refuse what needs over half of this machine's memory, or takes longer than a job may.

        Raises:
            ValueError: it cannot be drawn here.
        """
        self.check_memory(sampling, machine_memory() // 2)
        seconds = self.seconds(sampling)
        if seconds is None and self._device.type == "cpu":  # then as long as at best
            steps = sampling.num_pictures * sampling.steps
            seconds = steps * self.of_step(sampling) / self._flop_per_second
        if seconds is not None and seconds > MAX_SECONDS:
            raise ValueError(
                f"{self._described(sampling)} with {sampling.steps} steps would take about "
                f"{duration(seconds)} on this machine, and up to {duration(MAX_SECONDS)} is drawn at once; "
                "choose smaller or fewer ones, or fewer steps"
            )

    def check_memory(self, sampling: Sampling, room: int) -> None:
        """Refuse pictures that do not fit into `room` bytes; accelerators say so themselves.

        Raises:
            ValueError: they do not fit.
        """
        width, height, _ = self._kind(sampling)
        held = _HELD_BYTES * sampling.num_pictures
        if self._device.type == "cpu" and (needed := width * height * (self._vae_bytes + held)) > room:
            raise ValueError(
                f"{self._described(sampling)} would take about {needed / 2**30:.1f} GiB of memory, and "
                f"{room / 2**30:.1f} GiB can be had here; choose smaller or fewer ones"
            )

    def seconds(self, sampling: Sampling) -> float | None:
        """Return how long pictures take; None before anything was measured."""
        pace = self.pace(sampling)
        return None if pace is None else sampling.num_pictures * (sampling.steps * pace.step + pace.picture)

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
        known, ratio = self._paces[nearest], self._step_flop(*kind) / self._step_flop(*nearest)
        return Pace(known.step * ratio, known.picture * pixels / (nearest[0] * nearest[1]))

    def of_step(self, sampling: Sampling) -> float:
        """Return the floating-point operations of a denoising step."""
        return self._step_flop(*self._kind(sampling))

    def _kind(self, sampling: Sampling) -> tuple[int, int, bool]:
        """Return width and height (px), and whether it is guided, which is twice the work."""
        native = self._base.native_size
        return sampling.width or native, sampling.height or native, sampling.guidance_scale > 1

    def _described(self, sampling: Sampling) -> str:
        width, height, _ = self._kind(sampling)
        return f"{counted(sampling.num_pictures, 'picture')} of {width} × {height} px"

    def _count_step(self, width: int, height: int, is_guided: bool) -> float:
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
        matrix, best = torch.ones(_PROBE_SIDE, _PROBE_SIDE), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return 2 * _PROBE_SIDE**3 / best


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is in."""
    limits = [Path(name).read_text().strip() for name in _LIMITS if Path(name).is_file()]
    # "max" is no limit
    return min([int(psutil.virtual_memory().total), *(int(text) for text in limits if text.isdecimal())])
