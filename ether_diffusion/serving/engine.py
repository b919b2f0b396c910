"""Continuous batching: requests join and leave a batch between steps, each row with its own of everything."""

import copy
import json
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ether_diffusion.adapters import Adapter
from ether_diffusion.adapters.format import Fact, content_hash
from ether_diffusion.adapters.methods import method_of
from ether_diffusion.adapters.models import Match
from ether_diffusion.bases import (
    Base,
    Beginning,
    Denoising,
    PromptEmbeddings,
    fault_of,
    predict_together,
)
from ether_diffusion.control import ControlEncoder, control_batch, control_image_sha256
from ether_diffusion.control.conditioning import check_encoder, features_of
from ether_diffusion.pipelines.metadata import (
    AdapterUse,
    ImageMetadata,
    attach_metadata,
    base_facts,
    fingerprint_of,
)
from ether_diffusion.pipelines.opening import default_device, default_dtype, make_scheduler, open_pipeline
from ether_diffusion.pipelines.sampling import ControlUse, Start
from ether_diffusion.pipelines.sampling import Request as Request
from ether_diffusion.prompts import check_unweighted, weighted_fragments
from ether_diffusion.serving.attached import AttachedAdapters
from ether_diffusion.serving.bank import AdapterBank, Choice, MixedAdapters
from ether_diffusion.serving.stopping import StopInside
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

LONG_SECONDS = 0.2
"""Shorter steps are not stopped inside, which costs a tenth of them."""
MAX_SIDE_LATENTS = 32
"""Larger ones are shrunk before a preview: to 256 px for a VAE that divides sides by 8."""


class QueueFullError(RuntimeError):
    """No more requests are taken now; `seconds` is when to ask again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; ask again in {seconds:.0f} s")
        self.seconds = seconds


class CancelledError(RuntimeError):
    """The request was cancelled."""


@dataclass(eq=False)
class Job:
    """A request on its way: how far it is, and at last its picture.

    Attributes:
        rows: the adapters of its rows: the unconditional one's if there is one, then the prompt's.
        on_step: hears of every step that was done.
        check: is called at every operation, and may raise what ends the job.
        picture: becomes the picture with its metadata, or raises what went wrong, or CancelledError.
        step: how many are done of `num_steps`, which of some schedulers are more than were asked for.
    """

    request: Request
    size: tuple[int, int]
    rows: list[Choice]
    on_step: Callable[["Job"], None] | None = None
    check: Callable[[], None] | None = None
    picture: "Future[Image.Image]" = field(default_factory=Future)
    step: int = 0
    num_steps: int = 0
    failure: Exception | None = None
    """Why it is not drawn any further."""
    denoising: Denoising | None = None
    control: Tensor | None = None
    """The image to follow (1, 3, height, width), then its features."""
    beginning: Beginning | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is not drawn any further."""
        if self.failure is None and self.check is not None:
            try:
                self.check()
            except Exception as error:
                self.failure = error
        return self.failure is not None

    def cancel(self) -> None:
        """Have it drawn no further: who waits hears at once, and its row is freed at the next step."""
        self.fail(CancelledError("the request was cancelled"))

    def fail(self, error: Exception) -> None:
        """Have it drawn no further, for a reason."""
        self.failure = error
        with suppress(InvalidStateError):  # it is done
            self.picture.set_exception(error)


class Engine:
    """Draws requests with one base: at every step the rows of one size go through the denoiser together.

    What a request draws does not depend on who else is in the batch: it is the same bit for bit in a batch
    of as many rows, and equal to rounding in one of another size. Requests that are submitted are drawn in
    a thread of its own; or `draw` does it in the caller's.

    Attributes:
        pipeline: the base's models, which nobody else may use.
        counts: of "steps", "rows" (the sum over steps), "done", "failed" and "cancelled" requests.
        step_seconds: spent on steps.
    """

    def __init__(
        self,
        base: Base,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_rows: int = 8,
        max_waiting: int = 64,
        num_slots: int | None = 16,
    ) -> None:
        """Load a base.

        Args:
            max_rows: requests that are drawn together at most.
            max_waiting: further ones that wait; beyond, they are refused.
            num_slots: adapters whose factors are kept, ETHER and LoRA, for batches whose rows each take
                their own; None takes adapters of any method, and draws those together that take the same.
        """
        self.base, self.device = base, device or default_device()
        dtype = dtype or default_dtype(self.device, base)
        self.pipeline: Any = open_pipeline(base, device=self.device, dtype=dtype)
        self.denoiser: Any = self.pipeline.components[base.denoiser]
        self._models: MixedAdapters | AttachedAdapters = (
            AttachedAdapters(self.pipeline) if num_slots is None else MixedAdapters(self.pipeline, num_slots)
        )
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.counts, self.step_seconds = Counter[str](), 0.0
        self.adapters: dict[str, Adapter] = {}
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._step_took: dict[tuple[int, int], float] = {}
        self._followed: Tensor | None = None
        if base.drawn_by_with_control is not None:
            self.denoiser.conv_in.register_forward_hook(self._follow)
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def bank(self) -> AdapterBank:
        """The adapters of the denoiser, where rows each take their own."""
        assert isinstance(self._models, MixedAdapters)
        return self._models.banks["unet"]

    @cached_property
    def fingerprint(self) -> str | None:
        """The short name of the base's weights."""
        return fingerprint_of(self.denoiser)

    def add_adapter(self, name: str, adapter: Adapter) -> Match:
        """Take an adapter by a name, in its place where there was one; say how its base compares.

        Raises:
            ValueError: it does not fit the base, or is of a method that is not served.
        """
        with self._changed:
            if adapter.encoder is not None:
                if self.base.drawn_by_with_control is None:
                    raise ValueError(
                        f"{adapter.name} follows control images, and {self.base.name} is of a family "
                        "without; use Stable Diffusion or SDXL"
                    )
                check_encoder(self.denoiser, adapter.encoder, self.base.vae_scale_factor)
                adapter.encoder.to(self.device)
            if name in self.adapters:
                self._forget(name)
            match = self._models.add(name, adapter) if adapter.parts else "unknown"
            self.adapters[name] = adapter
            return match

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it fail.

        Raises:
            KeyError: there is none of the name.
        """
        with self._changed:
            self._forget(name)

    def submit(self, request: Request, on_step: Callable[[Job], None] | None = None) -> Job:
        """Take a request; its picture comes as `job.picture`.

        Raises:
            ValueError: an adapter is not there, or the request does not fit the base.
            QueueFullError: too many wait.
        """
        with self._changed:
            job = self._job(request, on_step=on_step)
            if self._is_closed:
                raise CancelledError("the server ends")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(max(1.0, self.seconds_to_wait()))
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def draw(
        self,
        requests: Iterable[Request],
        *,
        on_step: Callable[[Job], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Iterator[Image.Image]:
        """Draw requests in the caller's thread, and yield their pictures in order.

        `check` may raise at any operation, which ends the drawing.

        Raises:
            ValueError: as `submit`, before anything is drawn.
        """
        assert self._thread is None, "its own thread draws"
        jobs = [self._job(request, on_step=on_step, check=check) for request in requests]
        self._waiting.extend(jobs)
        try:
            for job in jobs:
                while not job.picture.done():
                    self._turn(self._admitted())
                yield job.picture.result()
        finally:
            self._waiting.clear()
            self._running.clear()

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def is_working(self) -> bool:
        """Whether its thread has not ended."""
        return not self._is_closed if self._thread is None else self._thread.is_alive()

    def seconds_to_wait(self) -> float:
        """Return about how long those that wait will take, by the mean step until now."""
        steps = sum(
            (job.num_steps or job.request.num_steps) - job.step for job in (*self._waiting, *self._running)
        )
        rows = max(1, self.counts["rows"])
        return steps * self.step_seconds / rows

    def close(self, timeout: float = 10.0) -> None:
        """End, and cancel what is not drawn yet."""
        with self._changed:
            self._is_closed = True
            self._fail_all()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)

    def _fail_all(self) -> None:
        for job in (*self._waiting, *self._running):
            job.fail(CancelledError("the server ends"))

    def _job(self, request: Request, **how: Any) -> Job:
        """Return a request that fits the base and its adapters, with its control image at its size."""
        base, given, other, start = self.base, request.adapters, request.negative_adapters, request.start
        other = given if other is None else other
        size = request.size(base)
        if any(side % base.size_multiple for side in size):
            raise ValueError(f"sides must be multiples of {base.size_multiple} px; found {size[1]}x{size[0]}")
        if request.negative_prompt and not base.takes_negative_prompts:
            raise ValueError(f"{base.name} takes no negative prompt; leave it out")
        if request.scheduler is not None:
            make_scheduler(request.scheduler, self.pipeline.scheduler)
        for prompt in (request.prompt, request.negative_prompt or ""):
            if base.takes_weights:
                weighted_fragments(prompt)
            else:
                check_unweighted(prompt, base.name)
        unknown = listed(sorted({*given, *other} - self.adapters.keys()))
        if unknown:
            raise ValueError(f"no adapter named {printable(unknown)}; GET /v1/models lists those there are")
        check_strengths(self.adapters, [given, other])
        rows = [given]
        if base.is_guided(self.denoiser, request.guidance_scale):
            rows.insert(0, other)
        self._models.check(rows)
        if base.is_inpainting and (start is None or start.mask is None):
            raise ValueError(f"{base.name} is a base for inpainting; give a start picture and a mask")
        job = Job(request, size, rows, **how)
        if start is not None:
            job.beginning = self._beginning(start, request.steps, size)
        if request.control is not None and request.control.strength:
            kind, (height, width) = self._encoder(request.control).config.control_type, size
            job.control = control_batch(request.control.image, height=height, width=width, control_type=kind)
        return job

    def _beginning(self, start: Start, steps: int, size: tuple[int, int]) -> Beginning:
        if self.base.first_step(steps, start.strength) == steps:
            least = f"use {1 / steps:.2g} or more, or more steps"
            raise ValueError(f"strength {start.strength:g} leaves none of {steps} steps; {least}")
        fitted = start.fitted(*size)
        found = Beginning(self.pipeline.vae, fitted.image, start.strength, fitted.mask)
        step = self.base.vae_scale_factor
        if found.hole is not None and not found.hole[..., ::step, ::step].any():
            raise ValueError(f"what is white in the mask is narrower than {step} px; paint more of it")
        return found

    def _encoder(self, control: ControlUse) -> ControlEncoder:
        following = {name: each.encoder for name, each in self.adapters.items() if each.encoder is not None}
        if control.control not in following:
            names = listed(following) or "none"
            raise ValueError(f"{control.control!r} follows no control image; name one of {names}")
        return following[control.control]

    def _forget(self, name: str) -> None:
        for job in (*self._waiting, *self._running):
            if any(name in row for row in job.rows):
                job.fail(ValueError(f"the adapter {printable(name)} was removed"))
        if self.adapters.pop(name).parts:
            self._models.remove(name)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    self._fail_all()
                    return
                joining = self._admitted()
            self._turn(joining)

    def _turn(self, joining: Sequence[Job]) -> None:
        for job in joining:
            self._guarded(job, self._begin)
        if self._running:
            self._step_once()

    def _admitted(self) -> list[Job]:
        """Take waiting requests, in order, while there are rows and their adapters go with the others'."""
        joining: list[Job] = []
        while self._waiting and len(self._running) + len(joining) < self.max_rows:
            if not self._models.takes([job.rows for job in (*self._running, *joining, self._waiting[0])]):
                break
            joining.append(self._waiting.popleft())
        return joining

    def _stopping(self, *jobs: Job) -> Any:
        """Return what breaks a computation off when all of these are over, where waiting would be long."""

        def check() -> None:
            if all(job.is_over for job in jobs):
                assert jobs[0].failure is not None
                raise jobs[0].failure

        is_long = self._thread is not None and self._step_took.get(jobs[0].size, math.inf) > LONG_SECONDS
        return StopInside(check) if is_long or any(job.check for job in jobs) else nullcontext()

    @torch.no_grad()
    def _begin(self, job: Job) -> None:
        """Embed the prompts, each with its own adapters of the text encoders, and draw the first noise."""
        request, base = job.request, self.base
        with self._stopping(job):
            if job.is_over:
                raise job.failure  # type: ignore[misc]
            *without, given = job.rows
            self._use_for_texts(given)
            texts = self._encoded(request.prompt)
            negative = None
            if without:
                self._use_for_texts(without[0])
                negative = self._encoded(request.negative_prompt, is_negative=True)
            own = self.pipeline.scheduler
            job.denoising = Denoising(
                base,
                self.denoiser,
                copy.deepcopy(own) if request.scheduler is None else make_scheduler(request.scheduler, own),
                (texts, negative),
                size=job.size,
                num_steps=request.steps,
                guidance_scale=request.guidance_scale,
                seed=request.seed,
                beginning=job.beginning,
            )
            if job.control is not None and request.control is not None:
                job.control = features_of(
                    self._encoder(request.control), job.control, request.control.strength
                )
        job.num_steps = job.denoising.num_steps
        self._running.append(job)

    def _encoded(self, prompt: str | None, *, is_negative: bool = False) -> PromptEmbeddings:
        """Embed a prompt, whose words may have weights where the base takes any."""
        if prompt and self.base.takes_weights:
            fragments = weighted_fragments(prompt)
            if any(weight != 1 for _, weight in fragments):
                return self.base.encode_weighted(self.pipeline, fragments)
            prompt = fragments[0][0]
        if is_negative:
            return self.base.encode_negative(self.pipeline, prompt)
        return self.base.encode(self.pipeline, [prompt or ""])

    def _use_for_texts(self, choice: Choice) -> None:
        with self._changed:
            self._models.use_for_texts(choice)

    @torch.no_grad()
    def _step_once(self) -> None:
        """Do one step of the rows of one size: of those that wait longest for theirs."""
        for job in list(self._running):
            if job.is_over:
                self._end(job, job.failure)
        if not self._running:
            return
        size = self._running[0].size
        jobs = [job for job in self._running if job.size == size]
        began = time.perf_counter()
        try:
            with self._stopping(*jobs):
                predictions = self._predict(jobs)
        except Exception as error:  # the server outlives what a batch raises
            for job in jobs:
                self._end(job, job.failure or error)
            return
        for job, rows in zip(jobs, predictions, strict=True):
            self._guarded(job, partial(self._advance, rows=rows))
        self._step_took[size] = time.perf_counter() - began
        self.step_seconds += self._step_took[size]
        self.counts.update(steps=1, rows=len(jobs))
        others = [job for job in self._running if job not in jobs]
        self._running = others + [job for job in self._running if job in jobs]

    def _predict(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Return what the denoiser predicts for each job's rows (1 or 2, c, h, w)."""
        choices = [row for job in jobs for row in job.rows]
        features = [job.control for job in jobs for _ in job.rows]

        def before(rows: Sequence[int]) -> None:
            with self._changed:
                self._models.use([choices[row] for row in rows])
            found = [features[row] for row in rows]
            known = next((each for each in found if each is not None), None)
            zeros = None if known is None else torch.zeros_like(known)
            self._followed = None if zeros is None else torch.cat([zeros if f is None else f for f in found])

        try:
            kinds = [self._models.kind(choice) for choice in choices]
            return predict_together(self.base, self.denoiser, [_begun(job) for job in jobs], before, kinds)
        finally:
            self._followed = None

    def _follow(self, first: Any, inputs: Any, output: Tensor) -> Tensor:
        """Add the features of control images to what the UNet's first convolution gives."""
        return output if self._followed is None else output + self._followed.to(output)

    def _advance(self, job: Job, rows: Tensor) -> None:
        """Take a step of a job's scheduler; after the last one its latents become the picture."""
        denoising = _begun(job)
        denoising.advance(rows)
        job.step = denoising.step
        if job.on_step is not None:
            job.on_step(job)
        if job.step == denoising.num_steps:
            check = self.base.checks(self.pipeline)
            with self._stopping(job):
                (picture,) = self.base.decode_latents(self.pipeline.vae, denoising.latents, check)
            fault = fault_of(picture)
            if job.beginning is not None:
                picture = job.beginning.put_around(picture)
            if fault is not None:
                logger.warning("the picture of seed %s %s", job.request.seed, fault)
            try:
                attach_metadata(picture, self._metadata(job))
            except ValueError as error:  # a finished picture is worth more than what it says
                logger.warning("%s", error)
            self._end(job, picture)

    def preview(self, job: Job) -> Image.Image | None:
        """Return what a job's latents show now, small; only from within its `on_step`."""
        return None if job.denoising is None else look_at(self.base, self.pipeline.vae, job.denoising.aimed())

    def _metadata(self, job: Job) -> ImageMetadata:
        request, base, scheduler = job.request, self.base, _begun(job).scheduler
        options: dict[str, Fact] = {}
        if request.negative_adapters is not None:
            options["negative_adapters"] = json.dumps(dict(request.negative_adapters))
        if request.control is not None:
            options |= {
                "control": str(request.control.control),
                "control_strength": request.control.strength,
                "control_encoder_sha256": content_hash(self._encoder(request.control).state_dict()),
                "control_image_sha256": control_image_sha256(request.control.image),
            }
        if request.template is not None:
            options["template"] = request.template
        if request.start is not None:
            start = request.start
            options |= {
                "start_image": start.name,
                "start_strength": start.strength,
                "start_image_sha256": control_image_sha256(start.image),
            }
            if start.mask is not None:
                options["start_mask_sha256"] = control_image_sha256(start.mask)
        told = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale")
        uses = [(name, s, self.adapters[name].hashes) for name, s in request.adapters.items() if s]
        return ImageMetadata(
            width=job.size[1],
            height=job.size[0],
            pipeline=str(base.drawn_by if request.control is None else base.drawn_by_with_control),
            adapters=tuple(
                AdapterUse(name, s, {part.replace("unet", base.denoiser): h for part, h in hashes.items()})
                for name, s, hashes in uses
                if hashes
            ),
            options=options,
            **{name: getattr(request, name) for name in told},
            **base_facts(self.pipeline, scheduler, self.fingerprint),
        )

    def _guarded(self, job: Job, work: Callable[[Job], None]) -> None:
        try:
            work(job)
        except Exception as error:  # it is told to who asked; the others go on
            # where it was stopped inside a library, that may say another
            self._end(job, job.failure or error)

    def _end(self, job: Job, result: Image.Image | Exception | None) -> None:
        self._running = [each for each in self._running if each is not job]
        job.denoising = job.control = job.beginning = None
        if isinstance(result, Image.Image):
            self.counts["done"] += 1
            with suppress(InvalidStateError):  # it was cancelled meanwhile
                job.picture.set_result(result)
        elif result is not None:
            self.counts["cancelled" if isinstance(result, CancelledError) else "failed"] += 1
            job.fail(result)


def check_strengths(adapters: Mapping[str, Adapter], choices: Iterable[Choice]) -> None:
    """Refuse strengths that methods do not have.

    Raises:
        ValueError: as said.
    """
    for name, strength in (pair for choice in choices for pair in choice.items()):
        adapter = adapters[name]
        if adapter.parts and not method_of(adapter.config).has_strengths and strength not in (0, 1):
            what = f"{name} is an adapter of {adapter.method}, which has no strengths"
            raise ValueError(f"{what} between or beyond; found {strength:g}, use 1 as trained or 0 the base")


@torch.no_grad()
def look_at(base: Base, vae: Any, latents: Tensor) -> Image.Image:
    """Return what latents (1, c, h, w) show, shrunk where they are large."""
    shrink = MAX_SIDE_LATENTS / max(latents.shape[-2:])
    if shrink < 1:  # some latents are of patches of 2 × 2
        sides = [max(2, int(side * shrink) // 2 * 2) for side in latents.shape[-2:]]
        latents = F.interpolate(latents.float(), size=sides, mode="area")
    return base.decode_latents(vae, latents)[0]


def _begun(job: Job) -> Denoising:
    assert job.denoising is not None
    return job.denoising
