"""Continuous batching: requests join and leave a batch between steps, each row with its own of everything."""

import copy
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ether_diffusion.adapters import Adapter
from ether_diffusion.bases import Base, PromptEmbeddings, stack_embeddings
from ether_diffusion.pipelines.metadata import MAX_SEED
from ether_diffusion.pipelines.opening import default_device, default_dtype, make_scheduler
from ether_diffusion.pipelines.sampling import Settings, Strength
from ether_diffusion.serving.bank import AdapterBank
from ether_diffusion.strict_json import Within, checked
from ether_diffusion.wording import listed, printable

MAX_ADAPTERS = 4
"""Of one request."""


class QueueFullError(RuntimeError):
    """No more requests are taken now; `seconds` is when to ask again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; ask again in {seconds:.0f} s")
        self.seconds = seconds


class CancelledError(RuntimeError):
    """The request was cancelled."""


@checked(kw_only=True)
class Request(Settings):
    """One picture: its prompt, adapters with strengths, seed and how it is drawn.

    `negative_adapters` are those of the unconditional row, where it takes others than `adapters`.
    """

    prompt: str
    seed: Annotated[int, Within(0, MAX_SEED)] = 0
    adapters: Mapping[str, Strength] = Field(default_factory=dict)
    negative_adapters: Mapping[str, Strength] | None = None
    scheduler: str | None = None


@dataclass(eq=False)
class Job:
    """A request on its way: how far it is, and at last its picture.

    Attributes:
        picture: becomes the picture, or raises what went wrong, or CancelledError.
        on_step: hears of every step that was done.
        step: how many are done.
    """

    request: Request
    size: tuple[int, int]
    on_step: Callable[["Job"], None] | None = None
    picture: "Future[Image.Image]" = field(default_factory=Future)
    step: int = 0
    failure: Exception | None = None
    """Why it is not drawn any further: set by anybody, and told at the next step."""
    generator: torch.Generator = field(default_factory=torch.Generator)
    latents: Tensor | None = None
    scheduler: Any = None
    embeddings: PromptEmbeddings | None = None
    """Of the prompt, then of what it should not show where guidance asks for that."""

    @property
    def rows(self) -> list[Mapping[str, float]]:
        """The adapters of its rows: the prompt's, then the unconditional one's if there is one."""
        given, other = self.request.adapters, self.request.negative_adapters
        return [given, *([given if other is None else other] if self.has_guidance else [])]

    @property
    def has_guidance(self) -> bool:
        """Whether there is an unconditional row (classifier-free guidance)."""
        return self.request.guidance_scale > 1

    def cancel(self) -> None:
        """Free its row at the next step."""
        self.failure = CancelledError("the request was cancelled")


class Engine:
    """Draws requests with one base: at every step the rows of one size go through the denoiser together.

    What a request draws does not depend on who else is in the batch: it is the same bit for bit in a batch
    of as many rows, and equal to rounding in one of another size.

    Attributes:
        bank: the adapters of the denoiser.
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
        num_slots: int = 16,
    ) -> None:
        """Load a base.

        Args:
            max_rows: requests that are drawn together at most.
            max_waiting: further ones that wait; beyond, they are refused.
            num_slots: adapters whose factors are kept.

        Raises:
            ValueError: it is not a base that draws by noise prediction from text alone.
        """
        if base.is_inpainting or base.prediction_type == "flow":
            raise ValueError(f"{base.name} is not served yet; use Stable Diffusion 1.x, 2.x or SDXL")
        self.base, self.device = base, device or default_device()
        dtype = dtype or default_dtype(self.device)
        self.denoiser: Any = base.load_denoiser(dtype).to(self.device)
        self.texts = base.load_text_encoders(dtype).to(self.device)
        self.pipeline: Any = base.pipeline_around(self.denoiser)
        self.bank = AdapterBank(self.denoiser, num_slots=num_slots)
        self._of_texts = {n: AdapterBank(m, num_slots=num_slots) for n, m in self.texts.models.items()}
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.counts, self.step_seconds = Counter[str](), 0.0
        self.adapters: dict[str, Adapter] = {}
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._used: list[Mapping[str, float]] | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Take an adapter by a name; in its place where there was one.

        Raises:
            ValueError: it does not fit the base, or is of a method or with a control encoder not served.
        """
        banks = {"unet": self.bank, **self._of_texts}
        lacking = listed(part for part in adapter.parts if part not in banks)
        if lacking or not adapter.parts or adapter.encoder is not None:
            what = f"an adapter of {lacking}" if lacking else "a control encoder"
            raise ValueError(f"{adapter.name} holds {what}, which is not served")
        with self._changed:
            if name in self.adapters:
                self._forget(name)
            for part, own in adapter.parts.items():
                banks[part].add(name, own)
            self.adapters[name], self._used = adapter, None

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
            ValueError: an adapter is not there, or the size does not fit the base.
            QueueFullError: too many wait.
        """
        size = (request.height or self.base.native_size, request.width or self.base.native_size)
        if any(side % self.base.size_multiple for side in size):
            raise ValueError(
                f"sides must be multiples of {self.base.size_multiple} px; found {size[1]}x{size[0]}"
            )
        make_scheduler(request.scheduler or "", self.pipeline.scheduler) if request.scheduler else None
        job = Job(request, size, on_step)
        with self._changed:
            self._check_adapters(request)
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(max(1.0, self.seconds_to_wait()))
            self._waiting.append(job)
            self._changed.notify_all()
        return job

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
        return self._thread.is_alive()

    def seconds_to_wait(self) -> float:
        """Return about how long those that wait will take, by the mean step until now."""
        steps = sum(job.request.steps - job.step for job in (*self._waiting, *self._running))
        rows = max(1, self.counts["rows"])
        return steps * self.step_seconds / rows

    def close(self, timeout: float = 10.0) -> None:
        """End, and cancel what is not drawn yet; a longer step than `timeout` (s) is left alone."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _check_adapters(self, request: Request) -> None:
        named = {*request.adapters, *(request.negative_adapters or {})}
        unknown = listed(sorted(named - self.adapters.keys()))
        if unknown:
            raise ValueError(f"no adapter named {printable(unknown)}; GET /v1/models lists those there are")
        if len(named) > min(MAX_ADAPTERS, self.bank.num_slots):
            raise ValueError(f"found {len(named)} adapters for one picture; at most {MAX_ADAPTERS} are taken")

    def _scheduler(self, request: Request) -> Any:
        own = self.pipeline.scheduler
        return copy.deepcopy(own) if request.scheduler is None else make_scheduler(request.scheduler, own)

    def _forget(self, name: str) -> None:
        for job in (*self._waiting, *self._running):
            if any(name in row for row in job.rows):
                job.failure = ValueError(f"the adapter {printable(name)} was removed")
        for part in self.adapters.pop(name).parts:
            (self.bank if part == "unet" else self._of_texts[part]).remove(name)
        self._used = None  # the name may come to stand for another

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    break
                joining = self._admitted()
            for job in joining:
                self._guarded(job, self._begin)
            if self._running:
                self._step_once()
        for job in (*self._waiting, *self._running):
            job.picture.set_exception(CancelledError("the server ends"))

    def _admitted(self) -> list[Job]:
        """Take waiting requests, in order, while there are rows and slots for their adapters."""
        joining: list[Job] = []
        while self._waiting and len(self._running) + len(joining) < self.max_rows:
            job = self._waiting[0]
            there = {n for each in (*self._running, *joining, job) for row in each.rows for n in row}
            if len(there) > self.bank.num_slots:
                break
            joining.append(self._waiting.popleft())
        return joining

    @torch.no_grad()
    def _begin(self, job: Job) -> None:
        """Embed the prompts, each with its own adapters of the text encoders, and draw the first noise."""
        if job.failure is not None:
            raise job.failure
        request, found = job.request, []
        prompts = [request.prompt, *([request.negative_prompt or ""] if job.has_guidance else [])]
        for prompt, choice in zip(prompts, job.rows, strict=True):
            with self._changed:
                for bank in self._of_texts.values():
                    bank.use([choice])
            found.append(self.texts.encode([prompt]))
        if request.negative_prompt is None and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            found[1:] = [each.zeros_like() for each in found[1:]]  # as SDXL was trained
        job.embeddings = stack_embeddings(found)
        own = self.pipeline.scheduler
        job.scheduler = (
            copy.deepcopy(own) if request.scheduler is None else make_scheduler(request.scheduler, own)
        )
        job.scheduler.set_timesteps(request.steps, device=self.device)
        sides = (side // self.base.vae_scale_factor for side in job.size)
        shape = (1, self.denoiser.config.in_channels, *sides)
        job.generator.manual_seed(request.seed)
        noise = torch.randn(shape, generator=job.generator, dtype=self.denoiser.dtype)
        job.latents = noise.to(self.device) * job.scheduler.init_noise_sigma
        self._running.append(job)

    @torch.no_grad()
    def _step_once(self) -> None:
        """Do one step of the rows of one size: of those that wait longest for theirs."""
        for job in list(self._running):
            if job.failure is not None:
                self._end(job, job.failure)
        if not self._running:
            return
        size = self._running[0].size
        jobs = [job for job in self._running if job.size == size]
        began = time.perf_counter()
        try:
            predictions = self._predict(jobs)
        except Exception as error:  # the server outlives what a batch raises
            for job in jobs:
                self._end(job, error)
            return
        for job, rows in zip(jobs, predictions, strict=True):
            self._guarded(job, partial(self._advance, rows=rows))
        self.step_seconds += time.perf_counter() - began
        self.counts.update(steps=1, rows=len(jobs))
        others = [job for job in self._running if job not in jobs]
        self._running = others + [job for job in self._running if job in jobs]

    def _predict(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Return what the denoiser predicts for each job's rows (1 or 2, c, h, w)."""
        choices = [row for job in jobs for row in job.rows]
        if choices != self._used:
            with self._changed:
                self.bank.use(choices)
            self._used = choices
        noisy, timesteps, sizes = [], [], []
        for job in jobs:
            timestep = job.scheduler.timesteps[job.step]
            scaled = job.scheduler.scale_model_input(job.latents, timestep)
            for _ in job.rows:
                noisy.append(scaled)
                timesteps.append(timestep.float())
                sizes.append(torch.tensor([*job.size, 0, 0, *job.size]))
        found = self.base.predict(
            self.denoiser,
            torch.cat(noisy),
            torch.stack(timesteps),
            stack_embeddings([job.embeddings for job in jobs if job.embeddings is not None]),
            size_ids=torch.stack(sizes) if self.base.has_size_ids else None,
        )
        return list(torch.split(found, [len(job.rows) for job in jobs]))

    def _advance(self, job: Job, rows: Tensor) -> None:
        """Take a step of a job's scheduler; after the last one its latents become the picture."""
        predicted = rows[:1]
        if job.has_guidance:
            predicted = rows[1:] + job.request.guidance_scale * (rows[:1] - rows[1:])
        timestep = job.scheduler.timesteps[job.step]
        drawn = (
            {"generator": job.generator} if "generator" in signature(job.scheduler.step).parameters else {}
        )
        job.latents = job.scheduler.step(predicted, timestep, job.latents, **drawn).prev_sample
        job.step += 1
        if job.on_step is not None:
            job.on_step(job)
        if job.step == len(job.scheduler.timesteps):
            (picture,) = self.base.decode_latents(self.pipeline.vae, job.latents)
            self._end(job, picture)

    def preview(self, job: Job) -> Image.Image | None:
        """Return what a job's latents show now; only from within its `on_step`."""
        if job.latents is None:
            return None
        return self.base.decode_latents(self.pipeline.vae, job.latents)[0]

    def _guarded(self, job: Job, work: Callable[[Job], None]) -> None:
        try:
            work(job)
        except Exception as error:  # it is told to who asked; the others go on
            self._end(job, error)

    def _end(self, job: Job, result: Image.Image | BaseException) -> None:
        self._running = [each for each in self._running if each is not job]
        if isinstance(result, BaseException):
            self.counts["cancelled" if isinstance(result, CancelledError) else "failed"] += 1
            job.picture.set_exception(result)
        else:
            self.counts["done"] += 1
            job.picture.set_result(result)
