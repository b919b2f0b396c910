"""The engine over HTTP: OpenAI's images API, adapters, health, and figures for Prometheus."""

import asyncio
import base64
import io
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ether_diffusion.pipelines.metadata import (
    MAX_SEED,
    AdapterUse,
    ImageMetadata,
    attach_metadata,
    fingerprint_of,
    library_versions,
    png_bytes,
    scheduler_settings,
)
from ether_diffusion.serving.engine import CancelledError, Engine, Job, QueueFullError, Request
from ether_diffusion.serving.keys import Caller, Keys
from ether_diffusion.serving.library import MAX_UPLOAD_BYTES, Library
from ether_diffusion.strict_json import StrictModel, read_json
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2**20
MAX_PICTURES = 8
"""Of one request."""
POLL_SECONDS = 0.25
LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1", "testserver"]


class Generation(StrictModel):
    """The body of POST /v1/images/generations: OpenAI's, and what its clients send as extra_body.

    `model` is the base or one adapter; `adapters` several with their strengths.
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


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_side: int
    max_steps: int = 100


class RefusedError(Exception):
    """What is answered with a status and one sentence."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


def make_app(engine: Engine, library: Library, keys: Keys, limits: Limits) -> FastAPI:
    """Return the application; the engine ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="ether-diffusion", lifespan=lifespan, openapi_url=None)
    server = _Server(engine, library, keys, limits)
    if keys.callers is None:  # or a page that a name was pointed here for could ask (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    for method, path, answer in (
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name}", server.model),
        ("POST", "/v1/images/generations", server.generate),
        ("GET", "/v1/adapters", server.models),
        ("PUT", "/v1/adapters/{name}", server.put),
        ("DELETE", "/v1/adapters/{name}", server.delete),
        ("GET", "/metrics", server.metrics),
    ):
        app.add_api_route(path, server.guarded(answer), methods=[method])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_exception_handler(HTTPException, server.unknown)
    return app


class _Server:
    def __init__(self, engine: Engine, library: Library, keys: Keys, limits: Limits) -> None:
        self.engine, self.library, self.keys, self.limits = engine, library, keys, limits
        self.base_name = library.base_name
        self.fingerprint = fingerprint_of(engine.denoiser)
        self.errors: dict[int, int] = {}

    def guarded(self, answer: Callable[[Call, Caller], Awaitable[Response]]) -> Callable[..., Any]:
        """Return an answer for those who have a key, with errors as OpenAI's clients read them."""

        async def respond(call: Call) -> Response:
            try:
                self._check_site(call)
                caller = self.keys.caller(call.headers.get("authorization"))
                if caller is None:
                    raise RefusedError(401, "a key of this server is needed: Authorization: Bearer KEY")
                return await answer(call, caller)
            except RefusedError as refused:
                return self._refusal(refused.status, str(refused), refused.headers)
            except QueueFullError as error:
                return self._refusal(429, str(error), {"Retry-After": f"{error.seconds:.0f}"})
            except KeyError as error:
                return self._refusal(404, f"there is no model or adapter {printable(error.args[0])}")
            except FileExistsError as error:
                return self._refusal(409, str(error))
            except (ValueError, OSError) as error:
                return self._refusal(400, " ".join(str(error).split()))
            except CancelledError as error:
                return self._refusal(503, str(error))
            except Exception as error:
                logger.exception("a request failed")
                return self._refusal(500, f"the picture could not be drawn ({_said(error)})")

        return respond

    def _refusal(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
        self.errors[status] = self.errors.get(status, 0) + 1
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": sentence, "type": kind}}, status, headers)

    def _check_site(self, call: Call) -> None:
        """Refuse what the page of another site sends: without keys a browser would let it draw here."""
        site, origin = call.headers.get("sec-fetch-site"), call.headers.get("origin")
        is_own = origin is None or urlsplit(origin).netloc == call.headers.get("host")
        if self.keys.callers is None and not (is_own if site is None else site in ("same-origin", "none")):
            raise RefusedError(403, "this comes from the page of another site; ask from a program")

    async def unknown(self, call: Call, error: Exception) -> Response:
        """Answer where there is nothing, as everywhere."""
        status = getattr(error, "status_code", 404)
        return self._refusal(
            status, f"there is no {call.method} {printable(call.url.path)}; see docs/serve.md"
        )

    async def health(self) -> dict[str, Any]:
        """Say that the server works, and on what."""
        return {"status": "ok", "base": self.base_name, "running": self.engine.num_running}

    async def models(self, call: Call, caller: Caller) -> Response:
        """List the base and the adapters."""
        names = await run_in_threadpool(self.library.names)
        owned = [(self.base_name, "base"), *((name, "adapter") for name in names)]
        data = [{"id": name, "object": "model", "owned_by": kind} for name, kind in owned]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, call: Call, caller: Caller) -> Response:
        """Tell of one of them."""
        name = str(call.path_params["name"])
        if name != self.base_name and name not in await run_in_threadpool(self.library.names):
            raise KeyError(name)
        kind = "base" if name == self.base_name else "adapter"
        return JSONResponse({"id": name, "object": "model", "owned_by": kind})

    async def put(self, call: Call, caller: Caller) -> Response:
        """Take an adapter as a zip of its folder."""
        data, name = await _body(call, MAX_UPLOAD_BYTES), str(call.path_params["name"])
        await run_in_threadpool(self.library.put, name, data)
        return JSONResponse({"id": name, "object": "model", "owned_by": "adapter"}, 201)

    async def delete(self, call: Call, caller: Caller) -> Response:
        """Delete an adapter."""
        name = str(call.path_params["name"])
        await run_in_threadpool(self.library.delete, name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def generate(self, call: Call, caller: Caller) -> Response:
        """Draw pictures, and answer with all of them, or with events while they are drawn."""
        asked = _asked(await _body(call, MAX_BODY_BYTES))
        requests = self._requests(asked)
        for name in {n for each in requests for n in (*each.adapters, *(each.negative_adapters or {}))}:
            await run_in_threadpool(self.library.ready, name)
        if caller.num_open + len(requests) > caller.limit:
            raise RefusedError(429, f"at most {caller.limit} pictures of a key are drawn at a time", **_SOON)
        events: asyncio.Queue[tuple[int, Job, str | None]] = asyncio.Queue()
        jobs = self._submitted(requests, asked, events, caller)
        if asked.stream:
            return StreamingResponse(self._streamed(jobs, events, caller), media_type="text/event-stream")
        try:
            pictures = [await self._picture(job, call) for job in jobs]
        finally:
            self._let_go(jobs, caller)
        pairs = zip(jobs, pictures, strict=True)
        data = [{"b64_json": found, "seed": job.request.seed} for job, found in pairs]
        return JSONResponse({"created": int(time.time()), "data": data})

    def _requests(self, asked: Generation) -> list[Request]:
        if asked.adapters is not None and asked.model not in (None, self.base_name):
            raise ValueError("model names an adapter, and adapters others; give one of them")
        named = asked.model not in (None, self.base_name) and asked.model is not None
        adapters = {str(asked.model): 1.0} if named else asked.adapters or {}
        side = self.engine.base.native_size
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", asked.size)
        if found is None and asked.size != "auto":
            raise ValueError(f"size is WIDTHxHEIGHT in px, or auto; found {printable(asked.size)}")
        width, height = (side, side) if found is None else (int(found[1]), int(found[2]))
        if max(width, height) > self.limits.max_side:
            raise ValueError(
                f"size {asked.size} is over {self.limits.max_side} px, the most that is drawn here"
            )
        if not 1 <= asked.steps <= self.limits.max_steps:
            raise ValueError(f"steps are from 1 to {self.limits.max_steps} here; found {asked.steps}")
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        if seed + asked.n - 1 > MAX_SEED:
            raise ValueError(f"n={asked.n} pictures from seed {seed} go beyond the last seed, {MAX_SEED}")
        guidance = self.engine.base.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
        return [
            Request(
                prompt=asked.prompt,
                negative_prompt=asked.negative_prompt,
                adapters=adapters,
                negative_adapters=asked.negative_adapters,
                seed=seed + index,
                steps=asked.steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                scheduler=asked.scheduler,
            )
            for index in range(asked.n)
        ]

    def _submitted(
        self, requests: list[Request], asked: Generation, events: "asyncio.Queue[Any]", caller: Caller
    ) -> list[Job]:
        loop, jobs = asyncio.get_running_loop(), list[Job]()
        parts = asked.partial_images + 1
        shown = {asked.steps * part // parts for part in range(1, parts)}

        def listener(index: int) -> Callable[[Job], None]:
            def on_step(job: Job) -> None:  # in the engine's thread
                preview = self.engine.preview(job) if job.step in shown else None
                found = None if preview is None else _encoded(_png(preview))
                with suppress(RuntimeError):  # the loop ends with the server
                    loop.call_soon_threadsafe(events.put_nowait, (index, job, found))

            return on_step

        try:
            for index, request in enumerate(requests):
                jobs.append(self.engine.submit(request, listener(index) if asked.stream else None))
        except (ValueError, QueueFullError):
            for job in jobs:
                job.cancel()
            raise
        caller.num_open += len(jobs)
        return jobs

    def _let_go(self, jobs: list[Job], caller: Caller) -> None:
        caller.num_open -= len(jobs)
        for job in jobs:
            if not job.picture.done():
                job.cancel()

    async def _picture(self, job: Job, call: Call | None) -> str:
        """Return a job's PNG in base64; it is cancelled when the client has gone."""
        waited = asyncio.ensure_future(asyncio.wrap_future(job.picture))
        while call is not None and not waited.done():
            await asyncio.wait([waited], timeout=POLL_SECONDS)
            if not waited.done() and await call.is_disconnected():
                job.cancel()
        image = await waited
        attach_metadata(image, self._metadata(job))
        return _encoded(await run_in_threadpool(png_bytes, image))

    async def _streamed(
        self, jobs: list[Job], events: "asyncio.Queue[tuple[int, Job, str | None]]", caller: Caller
    ) -> AsyncIterator[str]:
        """Yield OpenAI's events of images, and one of ours for every step."""
        partial = dict.fromkeys(range(len(jobs)), 0)
        left = {index: asyncio.ensure_future(self._picture(job, None)) for index, job in enumerate(jobs)}
        try:
            while left or not events.empty():
                heard = asyncio.ensure_future(events.get())
                await asyncio.wait([heard, *left.values()], return_when=asyncio.FIRST_COMPLETED)
                if heard.done():
                    index, job, preview = heard.result()
                    at = {"image_index": index, "step": job.step, "steps": job.request.steps}
                    yield _event("image_generation.progress", **at)
                    if preview is not None:
                        shown = {"partial_image_index": partial[index], "b64_json": preview}
                        partial[index] += 1
                        yield _event("image_generation.partial_image", image_index=index, **shown)
                    continue
                heard.cancel()
                for index, done in list(left.items()):
                    if done.done() and events.empty():
                        del left[index]
                        yield self._ended(index, jobs[index], done)
        finally:
            self._let_go(jobs, caller)
            for task in left.values():
                task.cancel()

    def _ended(self, index: int, job: Job, done: "asyncio.Future[str]") -> str:
        error = done.exception()
        if error is not None:
            self.errors[500] = self.errors.get(500, 0) + 1
            return _event("error", image_index=index, message=_said(error))
        seed = job.request.seed
        return _event("image_generation.completed", image_index=index, seed=seed, b64_json=done.result())

    def _metadata(self, job: Job) -> ImageMetadata:
        request, (height, width) = job.request, job.size
        uses = (
            AdapterUse(name, strength, dict(self.engine.adapters[name].hashes))
            for name, strength in request.adapters.items()
            if name in self.engine.adapters
        )
        without = request.negative_adapters
        options = {} if without is None else {"negative_adapters": json.dumps(dict(without))}
        return ImageMetadata(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            width=width,
            height=height,
            pipeline=self.engine.base.drawn_by,
            scheduler=type(job.scheduler).__name__,
            scheduler_config=scheduler_settings(job.scheduler),
            base=self.base_name,
            base_fingerprint=self.fingerprint,
            adapters=tuple(uses),
            options=options,
            versions=library_versions(),
        )

    async def metrics(self, call: Call, caller: Caller) -> Response:
        """Tell figures in Prometheus' text form."""
        engine, bank = self.engine, self.engine.bank
        figures: dict[str, float] = {
            "waiting": engine.num_waiting,
            "running": engine.num_running,
            "steps_total": engine.counts["steps"],
            "rows_total": engine.counts["rows"],
            "step_seconds_total": engine.step_seconds,
            **{f'requests_total{{result="{r}"}}': engine.counts[r] for r in ("done", "failed", "cancelled")},
            "adapters_read": len(engine.adapters),
            "slots": bank.num_slots,
            **{f"slot_{name}_total": bank.counts[name] for name in ("hits", "fills", "evictions")},
            "slot_fill_seconds_total": bank.fill_seconds,
            **{f'errors_total{{status="{s}"}}': n for s, n in sorted(self.errors.items())},
        }
        lines = (f"ether_diffusion_{name} {value:g}" for name, value in figures.items())
        return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")


_SOON = {"Retry-After": "1"}


def _asked(body: bytes) -> Generation:
    """Read a request; what is said of files is said of it in its own words."""
    try:
        return read_json(body, Generation, "the request")
    except ValueError as error:
        said = str(error).replace("is missing; save it again", "is missing")
        said = said.replace("; fetch or save it again", "")
        unknown = "is not a key that is known; take it out, or use the version that wrote it"
        raise ValueError(said.replace(unknown, "is not known here; leave it out")) from None


async def _body(call: Call, most: int) -> bytes:
    """Return a body of bounded size."""
    data = bytearray()
    async for part in call.stream():
        data += part
        if len(data) > most:
            raise RefusedError(413, f"the body has over {most >> 20} MiB; send less")
    return bytes(data)


def _event(kind: str, **facts: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n"


def _said(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def serve(engine: Engine, adapters: Path, keys: Keys, *, host: str, port: int, limits: Limits) -> None:
    """Serve until interrupted."""
    import uvicorn

    app = make_app(engine, Library(adapters, engine), keys, limits)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
