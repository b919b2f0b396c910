"""One job's pictures, drawn one by one: looked at now and then, timed, and stopped at any operation."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ether_diffusion.bases import decode_latents
from ether_diffusion.pipelines.sampling import ControlUse, Picture, Sampling, draw_pictures
from ether_diffusion.ui.cost import Cost, Pace
from ether_diffusion.ui.jobs import Emit, Previewing, Stopped, StopToken

MAX_SIDE_LATENTS = 32
"""Larger latents are shrunk before a look: 256 px for a VAE that divides sides by 8."""
REST = 4.0
"""After a look of t seconds the next comes REST · t later or more: a fifth of the time at most."""
MIN_REST_SECONDS = 0.2
LONG_FLOP = 4e9
"""For each thread: a longer operation on a CPU is done in parts of about that much, a tenth of a second."""
_BLOCK, _FEWEST = 256, 768
"""Queries that torch's attention on a CPU takes at a time, and the fewest for which it does."""


class Drawing:
    """Draws single pictures: none depends on what is drawn beside it, so each can be made again alone."""

    def __init__(
        self,
        pipeline: Any,
        sampling: Sampling,
        control: ControlUse | None,
        *,
        cost: Cost,
        stop: StopToken,
        emit: Emit,
    ) -> None:
        self._pipeline, self._sampling, self._control = pipeline, sampling, control
        self._cost, self._stop, self._emit = cost, stop, emit
        self._num_done, self._next_look = 0, 0.0
        self._image: Image.Image | None = None

    def draw(self, prompt: int, seed: int, choice: int) -> Picture:
        """Draw the picture of a place in the sampling.

        Raises:
            Stopped: the token was stopped.
        """
        self._stop.check()
        every = self._sampling
        one = replace(
            every,
            prompts=(every.prompts[prompt],),
            seeds=(every.seeds[seed],),
            choices=(every.choices[choice],),
            batch_size=1,
        )
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
            self._look(latents)
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
        known, every = self._cost.pace(self._sampling), self._sampling
        pictures, left = every.num_pictures - self._num_done, None
        per_step = known.step if per_step is None and known is not None else per_step
        if per_step is not None:
            beside = 0.0 if known is None else known.picture
            left = (pictures * every.steps - step) * per_step + pictures * beside
        done = self._num_done
        self._emit(Previewing(step, every.steps, left, self._image, done, every.num_pictures))

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
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
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
        rows = max(1, math.ceil(height * self._long / flop))
        parts = []
        for top in range(0, height, rows):
            self._check()
            first, last = top - above, min(top + rows, height) + reach - above
            seen = x[..., max(0, first) : last, :]
            seen = F.pad(seen, (0, 0, max(0, -first), max(0, last - x.shape[-2])))
            parts.append(F.conv2d(seen, weight, bias, stride, (0, beside), *rest))
        return torch.cat(parts, dim=-2)
