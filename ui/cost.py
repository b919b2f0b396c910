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


class Cost:
    """What pictures of a base cost on a device."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self._base, self._device = base, device
        self.step_flop = lru_cache(maxsize=64)(self._step_flop)

    def size(self, sampling: Sampling) -> tuple[int, int]:
        """Return the width and height of the pictures, px."""
        native = self._base.native_size
        return sampling.width or native, sampling.height or native

    def of_step(self, sampling: Sampling) -> float:
        """Return the floating-point operations of a denoising step."""
        return self.step_flop(*self.size(sampling), sampling.guidance_scale > 1)

    def check_memory(self, sampling: Sampling, num_images: int, *, available: int | None = None) -> None:
        """Refuse pictures that do not fit into `available` bytes, or else half of this machine's memory.

        Accelerators say themselves what they have no room for, and nothing else ends by it.

        Raises:
            ValueError: they do not fit.
        """
        if self._device.type != "cpu":
            return
        width, height = self.size(sampling)
        needed = width * height * (4 * self._vae_channels * _TENSORS + _HELD_BYTES * num_images)
        room = machine_memory() // 2 if available is None else available
        if needed > room:
            raise ValueError(
                f"{counted(num_images, 'picture')} of {width} × {height} px would take about "
                f"{needed / 2**30:.1f} GiB of memory, and {room / 2**30:.1f} GiB can be had here; choose "
                "smaller or fewer ones"
            )

    def check_time(self, sampling: Sampling, num_images: int, seconds_per_step: float | None) -> None:
        """Refuse what takes longer than a job may; a step that none knows of as long as at best.

        Raises:
            ValueError: it would take too long.
        """
        if seconds_per_step is None:
            if self._device.type != "cpu":
                return
            seconds_per_step = self.of_step(sampling) / self._flop_per_second
        seconds = num_images * sampling.steps * seconds_per_step
        if seconds > MAX_SECONDS:
            raise ValueError(
                f"{counted(num_images, 'picture')} of {' × '.join(map(str, self.size(sampling)))} px with "
                f"{sampling.steps} steps would take about {duration(seconds)} on this machine, and up to "
                f"{duration(MAX_SECONDS)} is drawn at once; choose smaller or fewer ones, or fewer steps"
            )

    def _step_flop(self, width: int, height: int, is_guided: bool) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._base.predict_nothing(self._denoiser, batch=1 + is_guided, size=(height, width))
        return float(counter.get_total_flops())

    @cached_property
    def _denoiser(self) -> Denoiser:
        return self._base.empty_denoiser()

    @cached_property
    def _vae_channels(self) -> int:
        """Channels of the largest tensors in the VAE: those that come to the full size."""
        channels = json.loads((self._base.vae_folder / "config.json").read_bytes()).get(
            "block_out_channels", [128, 256]
        )
        return int(max(channels[:2]))

    @cached_property
    def _flop_per_second(self) -> float:
        """What this CPU does at best: no picture is drawn faster."""
        matrix, best = torch.ones(_PROBE_SIDE, _PROBE_SIDE), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return 2 * _PROBE_SIDE**3 / best


@dataclass(frozen=True)
class Pace:
    """Seconds per denoising step, and per picture beside its steps."""

    step: float
    picture: float


class Speed:
    """The last measured pace by size and guidance; what was not measured is scaled from what was."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._paces: dict[tuple[int, int, bool], Pace] = {}

    def measured(self, sampling: Sampling, pace: Pace) -> None:
        """Remember what was measured."""
        self._paces[self._kind(sampling)] = pace

    def of(self, sampling: Sampling) -> Pace | None:
        """Return the pace to expect, by the operations of a step; None before anything was measured."""
        kind = self._kind(sampling)
        if kind in self._paces or not self._paces:
            return self._paces.get(kind)
        pixels = kind[0] * kind[1]
        nearest = min(self._paces, key=lambda known: abs(known[0] * known[1] - pixels))
        ratio = self._cost.step_flop(*kind) / self._cost.step_flop(*nearest)
        known = self._paces[nearest]
        return Pace(known.step * ratio, known.picture * pixels / (nearest[0] * nearest[1]))

    def _kind(self, sampling: Sampling) -> tuple[int, int, bool]:
        return *self._cost.size(sampling), sampling.guidance_scale > 1  # without guidance, half the work


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is in."""
    found = [psutil.virtual_memory().total]
    for name in _LIMITS:
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdecimal() else []  # "max" is none
    return int(min(found))
