"""The command `ether serve`: one base for many people, over HTTP, on this machine or on a Ray cluster."""

import os
import socket
import threading
from importlib.util import find_spec
from types import FrameType

from ether_diffusion.serving.keys import Keys, is_loopback, new_key
from ether_diffusion.serving.options import Serve

GRACE_SECONDS = 5.0
"""For pictures when the server is told to stop; those that are not done by then are refused."""


def serve(options: Serve) -> None:
    """Serve until interrupted, or make a key."""
    if options.new_key is not None:
        if options.api_keys is None:
            raise ValueError("--new_key writes to a file; name it with --api_keys")
        print(new_key(options.api_keys, options.new_key))
        return
    if options.adapters is None:
        raise ValueError("found no --adapters; name a folder of adapter folders, which may be empty")
    if options.api_keys is None and not is_loopback(options.host):
        raise ValueError(f"--host {options.host} lets other machines ask; give --api_keys, see --new_key")
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError('this needs FastAPI and uvicorn: pip install "ether-diffusion[serve]"')
    if options.ray:
        try:
            from ether_diffusion.serving import ray_app
        except ImportError:
            install = 'pip install "ether-diffusion[ray]"'
            raise ValueError(f"--ray needs Ray: {install}; without it one process draws") from None
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((options.host, options.port))
        except OSError as error:
            found = f"{options.host}:{options.port} cannot be listened at ({error.strerror})"
            raise ValueError(f"{found}; choose another --port or --host") from None
    keys = Keys(None) if options.api_keys is None else Keys.read(options.api_keys, options.max_per_key)
    said = f"serving {options.base} at http://{options.host}:{options.port}/v1"
    if options.ray:
        ray_app.run(options, said)
        return
    import uvicorn

    from ether_diffusion.scripts.drawing import hush_libraries
    from ether_diffusion.serving.api import make_app
    from ether_diffusion.serving.replica import Replica

    hush_libraries()
    replica = Replica.open(options)
    print(said, flush=True)
    app = make_app(replica, keys, replica.engine.close)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            ending = threading.Timer(GRACE_SECONDS, replica.engine.close)
            ending.daemon = True
            ending.start()

    config = uvicorn.Config(app, options.host, options.port, log_level="warning")
    config.timeout_graceful_shutdown = int(2 * GRACE_SECONDS)
    Server(config).run()
    if replica.engine.is_working:  # in a step that no process waits for
        os._exit(0)
