"""Drawing over HTTP: OpenAI's images API, adapters, health, and figures for Prometheus."""

import asyncio
import base64
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from ether_diffusion.pipelines.metadata import MAX_SEED
from ether_diffusion.serving.keys import Caller, Keys, is_from_page_of_another, is_loopback
from ether_diffusion.serving.library import MAX_UPLOAD_BYTES
from ether_diffusion.serving.replica import Figures, Generation, RefusedError, Step, refusal
from ether_diffusion.strict_json import read_json
from ether_diffusion.wording import printable

T = TypeVar("T")

MAX_BODY_BYTES = 2**23
MAX_HELD_BYTES = 2 * MAX_UPLOAD_BYTES
"""Of all bodies that are read at a time."""
SOON = {"Retry-After": "1"}
LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1"]


class Drawing(Protocol):
    """What draws: a `Replica`, or many of them that are asked as one."""

    async def health(self) -> dict[str, Any]: ...
    async def models(self) -> dict[str, str]: ...
    async def put(self, name: str, data: bytes) -> None: ...
    async def delete(self, name: str) -> None: ...
    def draw(self, asked: Generation, index: int) -> AsyncGenerator[Step]: ...
    async def figures(self) -> Figures: ...


def make_app(drawing: Drawing, keys: Keys, at_end: Callable[[], None] = lambda: None) -> FastAPI:
    """Return the application; `at_end` is called when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(at_end)

    app = FastAPI(title="ether-diffusion", lifespan=lifespan, openapi_url=None)
    server = _Server(drawing, keys)
    if keys.callers is None:  # or a page that a name was pointed here for could ask (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    for method, path, answer in (
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name:path}", server.model),
        ("POST", "/v1/images/generations", server.generate),
        ("GET", "/v1/adapters", server.models),
        ("PUT", "/v1/adapters/{name}", server.put),
        ("DELETE", "/v1/adapters/{name}", server.delete),
        ("GET", "/metrics", server.metrics),
    ):
        app.add_api_route(path, server.guarded(answer), methods=[method])
    app.add_api_route("/health", server.guarded(server.health, is_open=True), methods=["GET"])
    app.add_exception_handler(HTTPException, server.unknown)
    return app


class _Server:
    def __init__(self, drawing: Drawing, keys: Keys) -> None:
        self.drawing, self.keys, self.began = drawing, keys, int(time.time())
        self.errors, self.held_bytes = Counter[int](), 0

    def guarded(
        self, answer: Callable[[Call, Caller], Awaitable[Response]], *, is_open: bool = False
    ) -> Callable[..., Any]:
        """Return an answer for those who have a key, with errors as OpenAI's clients read them."""

        async def respond(call: Call) -> Response:
            try:
                self._check_site(call)
                caller = self.keys.caller(call.headers.get("authorization"))
                if caller is None and not is_open:
                    raise RefusedError(401, "a key of this server is needed: Authorization: Bearer KEY")
                return await answer(call, caller or self.keys.anybody)
            except Exception as error:
                refused = refusal(error)
                return JSONResponse({"error": self._told(refused)}, refused.status, refused.headers)

        return respond

    def _told(self, refused: RefusedError) -> dict[str, str]:
        self.errors[refused.status] += 1
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
        return {"message": refused.sentence, "type": kind}

    def _check_site(self, call: Call) -> None:
        """Without keys, refuse other machines, and what the page of another site sends from this one."""
        if self.keys.callers is not None:
            return
        if call.client is not None and not is_loopback(call.client.host):
            raise RefusedError(403, "without --api_keys this machine alone may ask")
        if is_from_page_of_another(call.headers):
            raise RefusedError(403, "this comes from the page of another site; ask from a program")

    async def unknown(self, call: Call, error: Exception) -> Response:
        """Answer where there is nothing, as everywhere."""
        path = printable(call.url.path)
        refused = RefusedError(
            getattr(error, "status_code", 404), f"there is no {call.method} {path}; see docs/serve.md"
        )
        return JSONResponse({"error": self._told(refused)}, refused.status)

    async def health(self, call: Call, caller: Caller) -> Response:
        """Say that the server works, and on what."""
        return JSONResponse(await self.drawing.health())

    def _model(self, name: str, kind: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.began, "owned_by": kind}

    async def models(self, call: Call, caller: Caller) -> Response:
        """List the base and the adapters."""
        data = [self._model(*each) for each in (await self.drawing.models()).items()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, call: Call, caller: Caller) -> Response:
        """Tell of one of them."""
        name = str(call.path_params["name"])
        return JSONResponse(self._model(name, (await self.drawing.models())[name]))

    async def put(self, call: Call, caller: Caller) -> Response:
        """Take an adapter as a zip of its folder."""
        name = str(call.path_params["name"])
        async with self._body(call, MAX_UPLOAD_BYTES) as data:
            await self.drawing.put(name, data)
        return JSONResponse(self._model(name, "adapter"), 201)

    async def delete(self, call: Call, caller: Caller) -> Response:
        """Delete an adapter."""
        name = str(call.path_params["name"])
        await self.drawing.delete(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def generate(self, call: Call, caller: Caller) -> Response:
        """Draw pictures, and answer with all of them, or with events while they are drawn."""
        async with self._body(call, MAX_BODY_BYTES) as body:
            asked = _asked(body)
        if caller.num_open + asked.n > caller.limit:
            said = f"at most {caller.limit} pictures of a key are drawn at a time"
            raise RefusedError(429, said, SOON)
        caller.num_open += asked.n
        drawn = [self.drawing.draw(asked, index) for index in range(asked.n)]

        async def let_go() -> None:
            caller.num_open -= asked.n
            for steps in drawn:
                await steps.aclose()

        try:
            for steps in drawn:
                await anext(steps)  # it is taken in; or it is refused, and all of them are
            if not asked.stream:
                pictures = await _unless_gone(call.receive, [_picture(steps) for steps in drawn])
        except BaseException:
            await let_go()
            raise
        if asked.stream:
            return _Events(asked, drawn, self._told, let_go)
        await let_go()
        data = [{"b64_json": png, "seed": _seed(asked, index)} for index, png in enumerate(pictures)]
        return JSONResponse({"created": int(time.time()), "data": data})

    @asynccontextmanager
    async def _body(self, call: Call, most: int) -> AsyncIterator[bytes]:
        """Yield a body of bounded size, one of several that are."""
        data = bytearray()
        try:
            async for part in call.stream():
                data += part
                self.held_bytes += len(part)
                if len(data) > most:
                    raise RefusedError(413, f"the body has over {most >> 20} MiB; send less")
                if self.held_bytes > MAX_HELD_BYTES:
                    raise RefusedError(429, "too much is sent here at a time; ask again", SOON)
            yield bytes(data)
        finally:
            self.held_bytes -= len(data)

    async def metrics(self, call: Call, caller: Caller) -> Response:
        """Tell figures in Prometheus' text form."""
        errors = {f'status="{status}"': count for status, count in sorted(self.errors.items())}
        figures = await self.drawing.figures() | {"errors_total": ("Answers other than a success.", errors)}
        lines = []
        for name, (what, values) in figures.items():
            full = f"ether_diffusion_{name}"
            lines += [
                f"# HELP {full} {what}",
                f"# TYPE {full} {'counter' if name.endswith('_total') else 'gauge'}",
            ]
            lines += [f"{full}{{{at}}} {value}" if at else f"{full} {value}" for at, value in values.items()]
        return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")


class _Events(StreamingResponse):
    """OpenAI's events of pictures, and one of ours for every step."""

    def __init__(
        self,
        asked: Generation,
        drawn: Sequence[AsyncGenerator[Step]],
        told: Callable[[RefusedError], dict[str, str]],
        at_end: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__((), media_type="text/event-stream")
        self._asked, self._drawn, self._told, self._at_end = asked, drawn, told, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(kind: str, **facts: Any) -> None:
            text = f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            follow = [self._follow(index, steps, tell) for index, steps in enumerate(self._drawn)]
            with suppress(RefusedError):  # nobody is there to be told
                await _unless_gone(receive, follow)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._at_end()

    async def _follow(
        self, index: int, steps: AsyncGenerator[Step], tell: Callable[..., Awaitable[None]]
    ) -> None:
        num_previews, seed = 0, _seed(self._asked, index)
        about = {"output_format": "png", "quality": "auto", "background": "opaque", "size": self._asked.size}
        try:
            async for step in steps:
                picture = {} if step.png is None else {"b64_json": _encoded(step.png), **about}
                at = {"image_index": index, "created_at": int(time.time())}
                if step.is_picture:
                    await tell("image_generation.completed", **at, seed=seed, **picture)
                    continue
                await tell("image_generation.progress", **at, step=step.done, steps=step.of)
                if picture:
                    at["partial_image_index"] = num_previews
                    num_previews += 1
                    await tell("image_generation.partial_image", **at, **picture)
        except Exception as error:
            told = self._told(refusal(error))
            await tell("error", image_index=index, message=told["message"], error=told)


async def _picture(steps: AsyncGenerator[Step]) -> str:
    return [_encoded(step.png) async for step in steps if step.is_picture and step.png is not None][-1]


async def _unless_gone(receive: Receive, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Do all of it at once; the first that fails ends the rest, and so does a client that goes."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        raise RefusedError(499, "the client has gone")

    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            tasks = [group.create_task(each) for each in work]
            results = [await task for task in tasks]
            watching.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return results


def _seed(asked: Generation, index: int) -> int:
    assert asked.seed is not None
    return asked.seed + index


def _asked(body: bytes) -> Generation:
    """Read a request, and give it a seed; what is said of files is said of it in its own words."""
    try:
        asked = read_json(body, Generation, "the request")
    except ValueError as error:
        said = str(error).replace("is missing; save it again", "is missing")
        said = said.replace("; fetch or save it again", "")
        unknown = "is not a key that is known; take it out, or use the version that wrote it"
        raise ValueError(said.replace(unknown, "is not known here; leave it out")) from None
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    if seed + asked.n - 1 > MAX_SEED:
        raise ValueError(f"n={asked.n} pictures from seed {seed} go beyond the last seed, {MAX_SEED}")
    return asked.model_copy(update={"seed": seed})


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
