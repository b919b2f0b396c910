"""What answers the requests of a server: an engine and its adapters, alone or as one of many of Ray's."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from ether_diffusion.bases import open_base
from ether_diffusion.pipelines.metadata import MAX_SEED, png_bytes
from ether_diffusion.pipelines.opening import find_device
from ether_diffusion.pipelines.sampling import ControlUse, Settings, Start
from ether_diffusion.serving.engine import CancelledError, Engine, Job, QueueFullError, Request
from ether_diffusion.serving.library import Library, open_place
from ether_diffusion.serving.options import Serve
from ether_diffusion.strict_json import StrictModel
from ether_diffusion.training.decoding import BLACK, WHITE, decode_base64
from ether_diffusion.training.plain_files import UnusableFileError
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

MAX_CONTROL_PIXELS = 2**24
MAX_PICTURES = 8
"""Of one request."""
Figures = dict[str, tuple[str, dict[str, float]]]
"""What is measured, by name: what it is, and its value by the label that it has, "" for none."""


class Generation(StrictModel):
    """The body of POST /v1/images/generations: OpenAI's, and what its clients send as extra_body.

    `model` is the base or one adapter; `adapters` several with their strengths. `control_image` is a picture
    in base64, and `control` names the adapter that follows it, where that is not `model`. `image` is one to
    begin with, `strength` how far to go from it, and `mask` is white where it is drawn anew.
    """

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    user: str | None = None
    adapters: dict[str, float] | None = None
    negative_adapters: dict[str, float] | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    steps: int = 20
    guidance_scale: float | None = None
    scheduler: str | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    control_image: str | None = None
    control: str | None = None
    control_strength: float = 1.0


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_side: int
    max_steps: int = 100


class Step(NamedTuple):
    """How far a picture is: no step when it is taken in, then each, some with a preview; at last itself."""

    done: int
    of: int
    png: bytes | None = None
    is_picture: bool = False


class RefusedError(Exception):
    """What is answered with a status and one sentence."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, sentence, headers)  # its arguments, or it could not be pickled
        self.status, self.sentence, self.headers = status, sentence, dict(headers or {})


def refusal(error: BaseException) -> RefusedError:
    """Say an error as it is answered."""
    match error:
        case RefusedError():
            return error
        case QueueFullError():
            return RefusedError(429, str(error), {"Retry-After": f"{error.seconds:.0f}"})
        case KeyError():
            return RefusedError(404, f"there is no model or adapter {printable(error.args[0])}")
        case FileExistsError():
            return RefusedError(409, str(error))
        case ValueError():
            return RefusedError(400, printable(" ".join(str(error).split()), 450))
        case CancelledError():
            return RefusedError(503, f"{error}; ask again", {"Retry-After": "1"})
    logger.error("a request failed", exc_info=error)
    said = printable(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
    return RefusedError(500, f"the server failed at this ({said})")


class Replica:
    """One engine with its adapters; what goes wrong is told as `refusal` takes it."""

    def __init__(self, engine: Engine, library: Library, limits: Limits) -> None:
        self.engine, self.library, self.limits = engine, library, limits
        _ = engine.fingerprint  # is looked for once, not at the first picture

    @classmethod
    def open(cls, options: Serve) -> "Replica":
        """Load a base, and find the adapters."""
        assert options.adapters is not None
        open_place(options.adapters)  # before what takes long
        base = open_base(options.base)
        engine = Engine(
            base,
            device=find_device(options.device),
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_rows=options.max_rows,
            max_waiting=options.max_waiting,
            num_slots=options.num_slots,
        )
        limits = Limits(options.max_side or 2 * base.native_size, options.max_steps)
        return cls(engine, Library(options.adapters, engine), limits)

    async def health(self) -> dict[str, Any]:
        """Say that the engine works, and on what."""
        if not self.engine.is_working:
            raise RefusedError(503, "the engine has ended; start the server again")
        return {"status": "ok", "base": self.library.base_name, "running": self.engine.num_running}

    async def models(self) -> dict[str, str]:
        """Return the base and the adapters that can be drawn, by name: whose kind each is."""
        names = await run_in_threadpool(self.library.names)
        return {self.library.base_name: "base"} | dict.fromkeys(names, "adapter")

    async def put(self, name: str, data: bytes) -> None:
        """Take an adapter as a zip of its folder."""
        await run_in_threadpool(self.library.put, name, data)

    async def delete(self, name: str) -> None:
        """Delete an adapter."""
        await run_in_threadpool(self.library.delete, name)

    async def draw(self, asked: Generation, index: int) -> AsyncGenerator[Step]:
        """Draw one of the pictures that are asked for; it is cancelled where this ends before it does."""
        request = await run_in_threadpool(self._request, asked, index)
        following = [] if request.control is None else [request.control.control]
        for name in {*request.adapters, *(request.negative_adapters or {}), *following}:
            await run_in_threadpool(self.library.ready, name)
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Image.Image | None] | None]()
        parts = asked.partial_images + 1
        shown = {request.num_steps * part // parts for part in range(1, parts)}

        def tell(event: tuple[int, Image.Image | None] | None) -> None:  # in the engine's thread
            with suppress(RuntimeError):  # the loop ends with the server
                loop.call_soon_threadsafe(heard.put_nowait, event)

        def on_step(job: Job) -> None:
            tell((job.step, self.engine.preview(job) if job.step in shown else None))

        job = self.engine.submit(request, on_step if asked.stream else None)
        job.picture.add_done_callback(lambda _: tell(None))
        try:
            yield Step(0, request.num_steps)
            while (event := await heard.get()) is not None:
                done, preview = event
                png = None if preview is None else await run_in_threadpool(png_bytes, preview)
                yield Step(done, job.num_steps, png)
            picture = job.picture.result()
            yield Step(job.step, job.step, await run_in_threadpool(png_bytes, picture), is_picture=True)
        finally:
            if not job.picture.done():
                job.cancel()

    def _request(self, asked: Generation, index: int) -> Request:
        base, is_base = self.engine.base, asked.model in (None, self.library.base_name)
        if asked.adapters is not None and not is_base:
            raise ValueError("model names an adapter, and adapters others; give one of them")
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", asked.size)
        if found is None and asked.size != "auto":
            raise ValueError(f"size is WIDTHxHEIGHT in px, or auto; found {printable(asked.size)}")
        start, sides = _start(asked), dict[str, Any]()
        if found is None:
            height, width = Settings(start=start).size(base)
        else:
            sides["width"], sides["height"] = width, height = int(found[1]), int(found[2])
        if max(width, height) > self.limits.max_side:
            most = f"over {self.limits.max_side} px, the most that is drawn here"
            raise ValueError(f"size {width}x{height} is {most}")
        if not 1 <= asked.steps <= self.limits.max_steps:
            raise ValueError(f"steps are from 1 to {self.limits.max_steps} here; found {asked.steps}")
        return Request(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            adapters=asked.adapters or {} if is_base else {str(asked.model): 1.0},
            negative_adapters=asked.negative_adapters,
            seed=(asked.seed or 0) + index,
            steps=asked.steps,
            guidance_scale=base.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
            **sides,
            start=start,
            scheduler=asked.scheduler,
            control=_control(asked),
        )

    async def figures(self) -> Figures:
        """Return what is measured."""
        engine, bank = self.engine, self.engine.bank
        results: dict[str, float] = {
            f'result="{name}"': engine.counts[name] for name in ("done", "failed", "cancelled")
        }
        return {
            "waiting": ("Requests that have not begun.", {"": engine.num_waiting}),
            "running": ("Requests in the batch, rows of its next step.", {"": engine.num_running}),
            "steps_total": ("Steps of the batch.", {"": engine.counts["steps"]}),
            "rows_total": ("Rows of all steps; by steps_total, the mean batch.", {"": engine.counts["rows"]}),
            "step_seconds_total": ("Time spent on steps.", {"": engine.step_seconds}),
            "requests_total": ("Pictures by how they ended.", results),
            "adapters_read": ("Adapters whose vectors are in memory.", {"": len(engine.adapters)}),
            "slots": ("Adapters whose factors can be kept.", {"": bank.num_slots}),
            "slot_hits_total": ("Adapters of a batch whose factors were there.", {"": bank.counts["hits"]}),
            "slot_fills_total": ("Adapters whose factors were computed.", {"": bank.counts["fills"]}),
            "slot_evictions_total": ("Adapters whose factors made room.", {"": bank.counts["evictions"]}),
            "slot_fill_seconds_total": ("Time spent on computing factors.", {"": bank.fill_seconds}),
        }


def _control(asked: Generation) -> ControlUse | None:
    """Return the control image of a request."""
    if asked.control_image is None:
        if asked.control is not None or asked.control_strength != 1:
            raise ValueError("control and control_strength need a control_image; send one, or leave them out")
        return None
    named = asked.control or (None if asked.adapters else asked.model)
    if named is None:
        raise ValueError("control_image needs control, the name of the adapter that follows it")
    return ControlUse(_decoded("control_image", asked.control_image), named, asked.control_strength)


def _start(asked: Generation) -> Start | None:
    """Return the picture to begin with."""
    if asked.image is None:
        if asked.strength is not None or asked.mask is not None:
            raise ValueError("strength and mask need an image; send one, or leave them out")
        return None
    mask = None if asked.mask is None else _decoded("mask", asked.mask, BLACK)
    strength = 0.6 if asked.strength is None else asked.strength
    return Start(_decoded("image", asked.image), strength=strength, mask=mask)


def _decoded(name: str, text: str, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Return a picture that comes as data: nothing is fetched."""
    try:
        return decode_base64(text, background, max_pixels=MAX_CONTROL_PIXELS)
    except UnusableFileError as error:
        raise ValueError(f"{name} {error}") from None
