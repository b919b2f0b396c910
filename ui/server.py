"""Serving the studio: on this machine alone unless asked for, behind a login then, telling nobody outside."""

import hmac
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from importlib.util import find_spec
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.wording import printable

if TYPE_CHECKING:
    import gradio as gr

    from ether_diffusion.scripts import command_options as told

Login = Callable[[str, str], bool]
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
MAX_UPLOAD = "64mb"
MAX_WAITING = 64  # requests in Gradio's queue; the next visitor is told that it is full
MAX_SESSIONS = 128  # pages and scripts whose state is kept, the last ones used; each costs half a MB
MIN_PASSWORD_LENGTH = 8
_UNPROXIED = {"NO_PROXY": "*", "no_proxy": "*"}
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TORCH_HOME")
"""Variables that name folders, perhaps from the working directory."""


def read_login(text: str) -> Login:
    """Return what answers whether a name and password are those of NAME:PASSWORD; `ui.gate` slows guessing.

    @FILE reads them from the first line of a file, which no list of processes shows.
    """
    if text.startswith("@"):
        file = Path(text[1:]).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {printable(file)}; auth is NAME:PASSWORD or @FILE")
        text = file.read_text(encoding="utf-8").partition("\n")[0]
    own_name, _, own_password = text.partition(":")
    if not own_name.strip() or len(own_password) < MIN_PASSWORD_LENGTH:
        needed = f"a name and a password of {MIN_PASSWORD_LENGTH} characters or more"
        raise ValueError(f"auth needs {needed}; give it as NAME:PASSWORD")

    def is_right(name: str, password: str) -> bool:
        right = hmac.compare_digest(name.encode(), own_name.strip().encode())
        return right & hmac.compare_digest(password.encode(), own_password.encode())

    return is_right


def ui(options: "told.Ui") -> None:
    """Carry out the command `ether ui`: serve a studio until Ctrl-C or a TERM signal.

    What was uploaded and cached is deleted at the end. What would let the network in without a login, a port
    that is taken and what cannot be used are refused.
    """
    if find_spec("gradio") is None:
        raise ValueError('the studio needs Gradio; install it with pip install "ether-diffusion[ui]"')
    try:
        folder = options.folder.expanduser().resolve()
    except RuntimeError:
        none = f"there is no home folder here for {options.folder}"
        raise ValueError(f"{none}; say with --folder where to keep all") from None
    login = None if options.auth is None else read_login(options.auth)
    if options.listen and login is None:
        remedy = "add --auth NAME:PASSWORD, or leave --listen out"
        raise ValueError(f"--listen lets the whole network in; {remedy}")
    host, base = EVERYWHERE if options.listen else LOOPBACK, options.base
    if options.port is not None:
        _check_port(host, options.port)
    if base not in EMBEDDED and Path(base).exists():  # the working directory will be another
        base = str(Path(base).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    with _surroundings(folder) as private:
        with _variables(_UNPROXIED):  # Gradio reads its environment when it is imported
            from ether_diffusion.ui.app import build_app
        from ether_diffusion.scripts.drawing import hush_libraries
        from ether_diffusion.ui.studio import ADAPTERS, Studio

        hush_libraries()
        is_new = not (folder / ADAPTERS).exists()
        studio = Studio(folder, base=base, temp=private, is_shared=login is not None)
        if is_new:
            studio.add_shipped()
        try:
            app, end = build_app(studio), threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: end.set())
            _launch(app, folder, server_name=host, server_port=options.port, auth=login)
            if options.open:
                webbrowser.open(f"http://{LOOPBACK}:{app.server_port}")
            print(f"Ether studio: http://{LOOPBACK}:{app.server_port} (Ctrl-C stops it)", flush=True)
            while not end.wait(0.5):
                pass
            app.server.config.timeout_graceful_shutdown = 2  # s that open pages are waited for
            app.close(verbose=False)
        finally:
            studio.close()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise ValueError(f"port {port} is taken; choose another with --port, or leave it out") from None


def _launch(app: "gr.Blocks", folder: Path, **options: Any) -> None:
    """Start serving and return; only the pictures of the studio are readable through the browser."""
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware

    from ether_diffusion.ui.app import studio_theme
    from ether_diffusion.ui.gate import Gate

    here, uploads = Path(__file__).parent, Path(get_upload_folder())
    gate = Middleware(Gate, has_login=options["auth"] is not None, uploads=uploads, folder=folder)
    app.queue(max_size=MAX_WAITING, api_open=False)
    with _variables(_UNPROXIED):  # it asks itself whether it is there
        app.launch(
            **options, strict_cors=True, share=False, inbrowser=False, quiet=True, show_error=False,
            run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False,
            prevent_thread_lock=True, footer_links=["api"],
            max_file_size=MAX_UPLOAD, state_session_capacity=MAX_SESSIONS,
            allowed_paths=[str(folder / "outputs")],
            blocked_paths=[str(folder / name) for name in ("adapters", "runs")],
            app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None, "middleware": [gate]},
            theme=studio_theme(), css_paths=here / "style.css",
            js=(here / "page.js").read_text(encoding="utf-8"),
        )  # fmt: skip


@contextmanager
def _surroundings(folder: Path) -> Iterator[Path]:
    """Give a folder for uploads that only this user reads, gone afterwards; with a log, and no telemetry.

    Gradio hands out any file of the working and the temporary directory that a handler names, so both hold
    nothing else. TMPDIR is left alone, as runs of train-dreambooth inherit it and outlive the server.
    """
    temp = folder / "temp"
    own, empty = temp / f"server-{os.getpid()}", temp / "empty"
    temp.mkdir(mode=0o700, exist_ok=True)
    temp.chmod(0o700)
    for left in temp.glob("server-*"):  # by servers that were killed
        number = left.name.removeprefix("server-")
        if left == own or not (number.isdecimal() and psutil.pid_exists(int(number))):
            shutil.rmtree(left, ignore_errors=True)
    own.mkdir(mode=0o700)
    empty.mkdir(mode=0o700, exist_ok=True)
    given = {name: Path(os.environ[name]) for name in _FOLDERS if os.environ.get(name)}
    wanted = {name: str(path.expanduser().absolute()) for name, path in given.items()}
    wanted |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    wanted["GRADIO_TEMP_DIR"] = str(own / "cache")
    root = logging.getLogger()
    log = RotatingFileHandler(folder / "studio.log", "a", 1 << 20, 1, "utf-8", True)
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.setLevel(logging.WARNING)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        stack.callback(log.close)
        stack.callback(root.removeHandler, log)
        root.addHandler(log)
        stack.enter_context(_variables(wanted))
        stack.enter_context(chdir(empty))
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = str(temp)
        yield own


@contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, and put back what was there."""
    before = {name: os.environ.pop(name) for name in wanted if name in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)
        os.environ.update(before)
