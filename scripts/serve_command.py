"""The command `ether serve`: one base for many people, over HTTP."""

import ipaddress
import os
import socket
from importlib.util import find_spec

from ether_diffusion.scripts import command_options as told


def serve(options: told.Serve) -> None:
    """Serve until interrupted, or make a key."""
    if options.new_key is not None:
        if options.api_keys is None:
            raise ValueError("--new_key writes to a file; name it with --api_keys")
        from ether_diffusion.serving.keys import new_key

        print(new_key(options.api_keys, options.new_key))
        return
    if options.adapters is None:
        raise ValueError("found no --adapters; name a folder of adapter folders, which may be empty")
    if options.api_keys is None and not _is_loopback(options.host):
        raise ValueError(f"--host {options.host} lets other machines ask; give --api_keys, see --new_key")
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError('this needs FastAPI and uvicorn: pip install "ether-diffusion[serve]"')
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((options.host, options.port))
        except OSError as error:
            found = f"{options.host}:{options.port} cannot be listened at ({error.strerror})"
            raise ValueError(f"{found}; choose another --port or --host") from None
    import torch

    from ether_diffusion.bases import open_base
    from ether_diffusion.scripts.drawing import find_device, hush_libraries
    from ether_diffusion.serving.api import Limits
    from ether_diffusion.serving.api import serve as run
    from ether_diffusion.serving.engine import Engine
    from ether_diffusion.serving.keys import Keys
    from ether_diffusion.serving.library import check_folder

    hush_libraries()
    check_folder(options.adapters)
    keys = Keys(None) if options.api_keys is None else Keys.read(options.api_keys, options.max_per_key)
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
    print(f"serving {options.base} at http://{options.host}:{options.port}/v1", flush=True)
    run(engine, options.adapters, keys, host=options.host, port=options.port, limits=limits)
    if engine.is_working:  # in a step that no process waits for
        os._exit(0)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
