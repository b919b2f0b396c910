"""Serving the studio: on this machine alone unless asked for, behind a login then, telling nobody outside."""

import contextlib
import hmac
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.wording import printable

if TYPE_CHECKING:
    import gradio as gr

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
MAX_UPLOAD = "64mb"
MAX_WAITING = 64
"""Requests in Gradio's queue; the next visitor is told that it is full."""
MAX_SESSIONS = 128
"""Pages and scripts whose state is kept, the last ones used; each costs half a MB."""
MIN_PASSWORD_LENGTH = 8
LOG = "studio.log"
_OWN_FOLDER = "server-"
_UNPROXIED = {"NO_PROXY": "*", "no_proxy": "*"}
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TORCH_HOME")
"""Variables that name folders, perhaps from the working directory."""


@dataclass(frozen=True)
class Login:
    """Answers whether a name and password are the right ones; `ui.gate` slows down who guesses.

    Raises:
        ValueError: there is no name, or the password is shorter than 8 characters.
    """

    name: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.name or len(self.password) < MIN_PASSWORD_LENGTH:
            raise ValueError(
                f"auth needs a name and a password of {MIN_PASSWORD_LENGTH} characters or more; "
                "give it as NAME:PASSWORD"
            )

    def __call__(self, name: str, password: str) -> bool:
        """Say whether to let them in."""
        right = hmac.compare_digest(name.encode(), self.name.encode())
        return right & hmac.compare_digest(password.encode(), self.password.encode())


def read_login(text: str) -> Login:
    """Read NAME:PASSWORD, or @FILE that holds it, which no list of processes shows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no colon, no name, or the password is short.
    """
    if text.startswith("@"):
        file = Path(text[1:]).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {printable(file)}; auth is NAME:PASSWORD or @FILE")
        text = file.read_text(encoding="utf-8").partition("\n")[0]
    name, _, password = text.partition(":")
    return Login(name.strip(), password)


@dataclass(frozen=True)
class ServerSettings:
    """Where the studio keeps its things and whom it serves.

    Raises:
        ValueError: it would listen to the network without a login, or the port is none.
    """

    folder: Path
    base: str = "tiny_world"
    port: int | None = None
    listen: bool = False
    login: Login | None = None
    open_browser: bool = False

    def __post_init__(self) -> None:
        if self.listen and self.login is None:
            raise ValueError(
                "--listen lets the whole network in; add --auth NAME:PASSWORD, or leave --listen out"
            )
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port} is none; choose one from 1 to 65535")


def serve(settings: ServerSettings) -> None:
    """Serve the studio until Ctrl-C or a TERM signal; what was uploaded and cached is deleted at the end.

    Raises:
        ValueError: the folder or the base cannot be used.
        OSError: the port is taken.
    """
    folder, base = settings.folder.expanduser().resolve(), settings.base
    if base != ALIAS and Path(base).is_dir():  # the working directory will be another
        base = str(Path(base).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    with _log_file(folder / LOG), _private_folder(folder / "temp") as private, _environment(private):
        with _variables(_UNPROXIED):  # Gradio reads its environment when it is imported
            from ether_diffusion.ui.app import build_app
        from ether_diffusion.ui.studio import ADAPTERS, Studio

        is_new = not (folder / ADAPTERS).exists()
        studio = Studio(folder, base=base, temp=private)
        if is_new:
            studio.add_shipped()
        try:
            app = build_app(studio)
            end = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: end.set())
            launch(app, settings, folder)
            print(f"Ether studio: http://{LOOPBACK}:{app.server_port} (Ctrl-C stops it)", flush=True)
            while not end.wait(0.5):
                pass
            app.close(verbose=False)
        finally:
            studio.close()


def launch(app: "gr.Blocks", settings: ServerSettings, folder: Path) -> None:
    """Start serving and return; only the pictures of the studio are readable through the browser.

    Raises:
        ValueError: the port is taken.
        OSError: so are all of Gradio's own.
    """
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware

    from ether_diffusion.ui.gate import Gate
    from ether_diffusion.ui.theme import studio_theme

    here = Path(__file__).parent
    host = EVERYWHERE if settings.listen else LOOPBACK
    if settings.port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, settings.port))
            except OSError:
                raise ValueError(
                    f"port {settings.port} is taken; choose another with --port, or leave it out"
                ) from None
    gate = Middleware(Gate, has_login=settings.login is not None, uploads=Path(get_upload_folder()))
    app.queue(max_size=MAX_WAITING, api_open=False)
    with _variables(_UNPROXIED):  # it asks itself whether it is there
        app.launch(
            server_name=host,
            server_port=settings.port,
            auth=settings.login,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            strict_cors=True,
            max_file_size=MAX_UPLOAD,
            allowed_paths=[str(folder / "outputs")],
            blocked_paths=[str(folder / name) for name in ("adapters", "runs")],
            footer_links=["api"],
            state_session_capacity=MAX_SESSIONS,
            app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None, "middleware": [gate]},
            theme=studio_theme(),
            css_paths=here / "style.css",
            js=(here / "page.js").read_text(encoding="utf-8"),
        )
    if settings.open_browser:
        webbrowser.open(f"http://{LOOPBACK}:{app.server_port}")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Write what is logged to a file, too; one MB of it and the one before are kept."""
    file = RotatingFileHandler(path, maxBytes=1 << 20, backupCount=1, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.setLevel(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(file)
    try:
        yield
    finally:
        root.removeHandler(file)
        file.close()


@contextlib.contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """A folder that only this user reads, gone afterwards, and so are those of servers that were killed."""
    parent.mkdir(mode=0o700, exist_ok=True)
    parent.chmod(0o700)
    for left in parent.glob(f"{_OWN_FOLDER}*"):
        number = left.name.removeprefix(_OWN_FOLDER)
        if not number.isdecimal() or not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    own = parent / f"{_OWN_FOLDER}{os.getpid()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def _environment(private: Path) -> Iterator[None]:
    """No telemetry, temporary files in the private folder, and a working directory that holds nothing else.

    Gradio hands out any file of the working and the temporary directory that a handler names. TMPDIR is left
    alone and the working directory stays, as runs of train-dreambooth inherit them and outlive the server.
    """
    wanted = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": str(private / "cache"),
    }
    for name in _FOLDERS:
        if os.environ.get(name):
            wanted[name] = str(Path(os.environ[name]).expanduser().absolute())
    empty, temporary = private.parent / "empty", tempfile.tempdir
    empty.mkdir(mode=0o700, exist_ok=True)
    with _variables(wanted), contextlib.chdir(empty):
        tempfile.tempdir = str(private.parent)
        try:
            yield
        finally:
            tempfile.tempdir = temporary


@contextlib.contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, and put back what was there."""
    before = {name: os.environ[name] for name in wanted if name in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)
        os.environ.update(before)
