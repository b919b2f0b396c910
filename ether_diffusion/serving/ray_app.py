"""The server on a Ray cluster: `serve run ether_diffusion.serving.ray_app:app base=BASE adapters=FOLDER`.

A front speaks HTTP and knows the keys; behind it are replicas, each with an engine. The adapters of a request
are data: as ids of multiplexed models, which Ray splits batches by, they would be drawn one by one. They are
also the session of a request, by which Ray's ConsistentHashRouter finds the replica that drew with them
before, and the next one on its ring where that has no room.
"""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Gauge

from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import open_base
from ether_diffusion.options import declared
from ether_diffusion.serving.api import make_app
from ether_diffusion.serving.keys import Keys
from ether_diffusion.serving.options import Serve
from ether_diffusion.serving.replica import Figures, Generation, RefusedError, Replica, Step, refusal

TRIES = 4
"""Of a request whose replica dies; its seed is known, so that the next one draws the same."""
SOON = {"Retry-After": "1"}
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Drawing:
    """A replica; what is refused is an answer, too: what Ray raises it also logs."""

    def __init__(self, options: Serve) -> None:
        self._replica = Replica.open(options)
        self._gauges: dict[str, Gauge] = {}

    async def ask(self, what: str, *arguments: Any) -> Any:
        """Return what a method of the replica does."""
        try:
            return await getattr(self._replica, what)(*arguments)
        except Exception as error:
            return refusal(error)

    async def draw(self, asked: Generation, index: int) -> AsyncGenerator[Step | RefusedError]:
        """Draw a picture, as `Replica.draw`."""
        async with aclosing(self._replica.draw(asked, index)) as steps:
            try:
                async for step in steps:
                    yield step
            except Exception as error:
                yield refusal(error)

    async def check_health(self) -> None:
        """Tell Ray's metrics what is measured; where the engine has ended, Ray starts another replica."""
        if not self._replica.engine.is_working:
            raise RuntimeError("the engine has ended")
        for name, (what, values) in (await self._replica.figures()).items():
            for label, value in values.items():
                key, _, tag = label.partition("=")
                tags = {key: tag.strip('"')} if key else {}
                if name not in self._gauges:
                    self._gauges[name] = Gauge(f"ether_diffusion_{name}", what, tuple(tags))
                self._gauges[name].set(value, tags)


class Replicas:
    """Many replicas, asked as one."""

    def __init__(self, handle: DeploymentHandle[Any], base: str) -> None:
        self._handle, self._base_name = handle, shareable_name(base) or base

    async def health(self) -> dict[str, Any]:
        """Say what a replica says, or that all of them are busy."""
        try:
            return await asyncio.wait_for(self._ask("health"), 5)
        except TimeoutError:
            return {"status": "ok", "base": None, "running": None}

    async def models(self) -> dict[str, str]:
        """Return the base and the adapters, by name: whose kind each is."""
        found: dict[str, str] = await self._ask("models")
        return found

    async def put(self, name: str, data: bytes) -> None:
        """Take an adapter as a zip of its folder."""
        await self._ask("put", name, data, session=name)

    async def delete(self, name: str) -> None:
        """Delete an adapter."""
        await self._ask("delete", name, session=name)

    async def draw(self, asked: Generation, index: int) -> AsyncGenerator[Step]:
        """Draw a picture; where its replica dies another one begins again, and steps are told once."""
        named = min(asked.adapters or [asked.model or self._base_name])
        session = None if named == self._base_name else named  # all replicas hold the base
        handle, told = self._of(session).options(stream=True), -1
        for left in reversed(range(TRIES)):
            steps = handle.draw.remote(asked, index)
            try:
                async for step in steps:
                    if isinstance(step, RefusedError):
                        raise step
                    if step.done > told or step.is_picture:
                        told = step.done
                        yield step
                return
            except BackPressureError:
                raise RefusedError(429, "the queue is full; ask again in 1 s", SOON) from None
            except RayActorError:
                if not left:
                    raise RefusedError(503, "all that drew this ended; ask again", SOON) from None
            finally:
                steps.cancel()

    async def figures(self) -> Figures:
        """Return nothing: Ray's metrics tell what each replica measures."""
        return {}

    def _of(self, session: str | None) -> DeploymentHandle[Any]:
        return self._handle.options(session_id=session) if session else self._handle

    async def _ask(self, what: str, *arguments: Any, session: str | None = None) -> Any:
        try:
            answer = await self._of(session).ask.remote(what, *arguments)
        except (BackPressureError, RayActorError):
            raise RefusedError(503, "what should answer is full or ended; ask again", SOON) from None
        if isinstance(answer, RefusedError):
            raise answer
        return answer


def app(args: dict[str, Any]) -> serve.Application:
    """Return the application of Ray Serve; the arguments are named as the flags of `ether serve`.

    Raises:
        ValueError: one cannot be used.
    """
    kinds, given = declared(Serve), dict(args)
    for name, value in args.items():
        if isinstance(value, str) and name in kinds:  # from a command line
            with suppress(ValueError):
                given[name] = kinds[name].kind.base(value)
    options = Serve(**given | {"ray": True})
    if options.adapters is None:
        raise ValueError("found no adapters; name a folder of adapter folders, which may be empty")
    check_base(options)
    keys = Keys(None) if options.api_keys is None else Keys.read(options.api_keys, options.max_per_key)
    device = options.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    drawing = serve.deployment(Drawing).options(
        ray_actor_options={"num_gpus": int(device.startswith("cuda"))},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.max_rows,
        ),
        max_ongoing_requests=2 * options.max_rows,  # a batch that is drawn, and one that waits
        max_queued_requests=options.max_waiting * options.max_replicas,
        graceful_shutdown_timeout_s=120,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )

    def front() -> FastAPI:
        return make_app(Replicas(serve.get_deployment_handle(Drawing.__name__), options.base), keys)

    made = serve.deployment(serve.ingress(front)(), name="Front", max_ongoing_requests=10_000)
    return made.options(ray_actor_options={"num_cpus": 0}).bind(drawing.bind(options))


def check_base(options: Serve) -> None:
    """Refuse a base that cannot be opened before anything starts; one of the Hub is for replicas to get."""
    if len(Path(options.base).parts) != 2 or Path(options.base).exists():
        open_base(options.base)


def run(options: Serve, said: str) -> None:
    """Serve on the cluster of RAY_ADDRESS, or one that is started on this machine, until interrupted."""
    check_base(options)
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(app(vars(options)), route_prefix="/")
    print(said, flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would print a trace
    try:
        threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()
