"""One job's pictures: what they cost; drawn one by one, looked at now and then, stopped at any operation."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ether_diffusion.bases import Base, Denoiser, decode_latents
from ether_diffusion.pipelines.sampling import ControlUse, Picture, Sampling, draw_pictures
from ether_diffusion.ui.jobs import Emit, Stopped, StopToken, Working
from ether_diffusion.ui.words import counted, duration

MAX_SECONDS = 3600.0  # of one job: others wait for it
MAX_SIDE_LATENTS = 32  # larger ones are shrunk before a look: 256 px for a VAE that divides sides by 8
REST, MIN_REST_SECONDS = (
    4.0,
    0.2,
)  # the next look comes after REST · t of the last: a fifth of the time at most
LONG_FLOP = 4e9  # for each thread: longer operations on a CPU are done in parts, each of a tenth of a second
_TENSORS = 8  # that a VAE has in memory at a time, as large as the largest; 7 on the embedded base
_HELD_BYTES = 6  # of each pixel of each picture until a job ends: the picture, and its place on a sheet
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_PROBE_SIDE = 768
_BLOCK, _FEWEST = 256, 768  # queries that torch's attention on a CPU takes at a time, and the fewest for that
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
        seconds = self.seconds(sampling)
        if seconds is None and self._device.type == "cpu":  # then as long as at best
            num_steps = sampling.num_pictures * sampling.steps
            seconds = num_steps * self.of_step(*self._kind(sampling)) / self._flop_per_second
        if seconds is not None and seconds > MAX_SECONDS:
            takes = f"with {sampling.steps} steps would take about {duration(seconds)} on this machine"
            most = f"up to {duration(MAX_SECONDS)} is drawn at once"
            self._refuse(sampling, takes, f"{most}; choose smaller or fewer ones, or fewer steps")

    def check_memory(self, sampling: Sampling, room: int) -> None:
        """Refuse pictures that do not fit into `room` bytes; accelerators say so themselves."""
        width, height, _ = self._kind(sampling)
        needed = width * height * (self._vae_bytes + _HELD_BYTES * sampling.num_pictures)
        if self._device.type == "cpu" and needed > room:
            takes = f"would take about {needed / 2**30:.1f} GiB of memory"
            most = f"{room / 2**30:.1f} GiB can be had here; choose smaller or fewer ones"
            self._refuse(sampling, takes, most)

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
        known, ratio = self._paces[nearest], self.of_step(*kind) / self.of_step(*nearest)
        return Pace(known.step * ratio, known.picture * pixels / (nearest[0] * nearest[1]))

    def _kind(self, sampling: Sampling) -> _Kind:
        native = self._base.native_size
        return sampling.width or native, sampling.height or native, sampling.guidance_scale > 1

    def unpacked(self, sampling: Sampling, latents: Tensor) -> Tensor:
        """Return latents between two steps as (b, c, h, w)."""
        width, height, _ = self._kind(sampling)
        return self._base.unpacked(latents, (height, width))

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


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is in."""
    limits = [Path(name).read_text().strip() for name in _LIMITS if Path(name).is_file()]
    # "max" is no limit
    return min([int(psutil.virtual_memory().total), *(int(text) for text in limits if text.isdecimal())])


class Drawing:
    """Draws single pictures: none depends on what is drawn beside it, so each can be made again alone."""

    def __init__(
        self, pipeline: Any, sampling: Sampling, control: ControlUse | None, *, cost: Cost, stop: StopToken,
        emit: Emit, what: str = "picture",
    ) -> None:  # fmt: skip
        self._what, self._pipeline, self._sampling, self._control = what, pipeline, sampling, control
        self._cost, self._stop, self._emit = cost, stop, emit
        self._num_done, self._next_look = 0, 0.0
        self._image: Image.Image | None = None

    def draw(self, prompt: int, seed: int, choice: int) -> Picture:
        """Draw the picture of a place in the sampling, or raise Stopped."""
        self._stop.check()
        every = self._sampling
        places = {"prompts": prompt, "seeds": seed, "choices": choice}
        named: dict[str, Any] = {name: (getattr(every, name)[index],) for name, index in places.items()}
        one = replace(every, **named, batch_size=1)
        self._tell(0, None)
        begun = last = time.monotonic()
        steps, looked = list[float](), 0.0

        def per_step() -> float:
            timed = steps[1:] or steps  # the prompt is encoded before the first
            return sum(timed) / len(timed)

        def on_step(step: int, num_steps: int, latents: Tensor) -> None:
            nonlocal last, looked
            self._stop.check()
            now = time.monotonic()
            steps.append(now - last)
            self._look(self._cost.unpacked(one, latents))
            self._tell(step, per_step())
            last = time.monotonic()
            looked += last - now

        with StopInside(self._stop), _dtype_kept(self._pipeline.vae):
            (picture,) = draw_pictures(self._pipeline, one, control=self._control, on_step=on_step)
        self._stop.check()
        self._num_done += 1
        if steps:
            beside = time.monotonic() - begun - looked - per_step() * len(steps)
            self._cost.measured(one, Pace(per_step(), max(0.0, beside)))
        return replace(picture, prompt=prompt, seed=seed, choice=choice)

    def _tell(self, step: int, per_step: float | None) -> None:
        known, every, done = self._cost.pace(self._sampling), self._sampling, self._num_done
        words, number = [f"Step {step} of {every.steps}"], every.num_pictures
        if number > 1:
            words.append(f"{self._what} {min(done + 1, number)} of {number}")
        per_step = known.step if per_step is None and known is not None else per_step
        if per_step is not None:
            left = ((number - done) * every.steps - step) * per_step
            left += 0.0 if known is None else (number - done) * known.picture
            words.append(f"about {duration(left)} left")
        share = (done + step / every.steps) / number
        self._emit(Working(" · ".join(words), share, self._image, step))

    def _look(self, latents: Tensor) -> None:
        start = time.monotonic()
        if start >= self._next_look:
            self._image = look_at(self._pipeline, latents)
            end = time.monotonic()
            self._next_look = end + max(MIN_REST_SECONDS, REST * (end - start))


@contextmanager
def _dtype_kept(vae: Any) -> Iterator[None]:
    """Undo a change of the VAE's dtype, also the pipelines' where a stop comes before they do."""
    dtype = vae.dtype
    try:
        yield
    finally:
        if vae.dtype != dtype:
            vae.to(dtype)


@torch.no_grad()
def look_at(pipeline: Any, latents: Tensor) -> Image.Image:
    """Decode latents (b, c, h, w) of one picture: what a step aimed at where the scheduler remembers it."""
    scheduler, vae = pipeline.scheduler, pipeline.vae
    if scheduler.config.get("algorithm_type") == "dpmsolver++":
        aimed = getattr(scheduler, "model_outputs", [None])[-1]
        latents = aimed if isinstance(aimed, Tensor) and aimed.shape == latents.shape else latents
    latents = latents[:1].detach().float()
    shrink = MAX_SIDE_LATENTS / max(latents.shape[-2:])
    if shrink < 1:
        sides = [max(1, int(side * shrink)) for side in latents.shape[-2:]]
        latents = F.interpolate(latents, size=sides, mode="area")
    with _dtype_kept(vae):
        if vae.dtype == torch.float16 and vae.config.force_upcast:  # as the pipelines do for SDXL
            vae.to(torch.float32)
        return decode_latents(vae, latents)[0]


class StopInside(TorchFunctionMode):
    """Raises Stopped at the next operation of this thread after a token was stopped, once: then is tidied up.

    Attention and convolutions of large pictures are computed in parts, of queries or of rows. Each number is
    computed from the same numbers in the same order, so that pictures do not change by a bit.
    """

    def __init__(self, stop: StopToken, long_flop: float = LONG_FLOP) -> None:
        super().__init__()
        self._stop, self._was_told = stop, False
        self._long = long_flop * torch.get_num_threads()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._check()
        if func is F.scaled_dot_product_attention and not torch.is_grad_enabled():
            return self._attend(*args, **(kwargs or {}))
        if func is F.conv2d and not kwargs and len(args) == 7 and not torch.is_grad_enabled():
            return self._convolve(*args)
        return func(*args, **(kwargs or {}))

    def _check(self) -> None:
        if not self._was_told and self._stop.stopped:
            self._was_told = True
            raise Stopped

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend with queries (b, heads, n, c) to keys and values (b, heads, m, c)."""
        flop = 4 * query.numel() * key.shape[-2]
        is_plain = not args and kwargs.get("attn_mask") is None and not kwargs.get("is_causal")
        if flop <= self._long or query.device.type != "cpu" or not is_plain or query.dim() != 4:
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        rows = max(_FEWEST, int(self._long / (4 * num_keys * query.shape[-1])) // _BLOCK * _BLOCK)
        starts = range(0, max(1, num_queries - rows + 1), rows)
        ends = [*starts[1:], num_queries]  # the last part has the rest, too
        attended = query.new_empty(*query.shape[:-1], value.shape[-1])
        for picture, head in itertools.product(range(len(query)), range(query.shape[1])):
            one = slice(picture, picture + 1), slice(head, head + 1)
            for start, end in zip(starts, ends, strict=True):
                self._check()
                part = (*one, slice(start, end))
                attended[part] = F.scaled_dot_product_attention(query[part], key[one], value[one], **kwargs)
        return attended

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any
    ) -> Tensor:
        """Convolve pictures (b, c, h, w)."""
        flop = 2 * x.shape[-1] * x.shape[-2] * len(x) * weight.numel()
        is_plain = stride == (1, 1) and rest == ((1, 1), 1) and isinstance(padding, tuple)
        if flop <= self._long or x.device.type != "cpu" or not is_plain:
            return F.conv2d(x, weight, bias, stride, padding, *rest)
        (above, beside), reach = padding, weight.shape[-2] - 1
        height = x.shape[-2] + 2 * above - reach
        rows, parts = max(1, math.ceil(height * self._long / flop)), []
        for top in range(0, height, rows):
            self._check()
            first, last = top - above, min(top + rows, height) + reach - above
            seen = x[..., max(0, first) : last, :]
            seen = F.pad(seen, (0, 0, max(0, -first), max(0, last - x.shape[-2])))
            parts.append(F.conv2d(seen, weight, bias, stride, (0, beside), *rest))
        return torch.cat(parts, dim=-2)
