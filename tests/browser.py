"""The studio as a process of its own, and a real browser on it that watches for what must never happen."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
START_SECONDS = 120.0
WAIT_MS = 30_000
expect.set_options(timeout=WAIT_MS)  # a page that was loaded anew takes long where much else is done
LONG_MS = 4 * WAIT_MS
"""As long as drawing may take on a machine that does much else."""
CUT_OFF = ("signal is aborted", "Connection errored out")
"""What Gradio prints where a reload cuts off what was on its way."""
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}

needs_browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ,
    reason="there is no chromium on this machine; with one, or where CI is set, this test runs",
)
"""In CI a missing browser is a failure."""
PATIENT = pytest.mark.flaky(reruns=2)
"""A page beside other tests on the same cores may miss an update of Gradio's; what fails thrice is broken."""


@dataclass
class RunningStudio:
    """A studio that serves in a process of its own."""

    url: str
    folder: Path
    process: subprocess.Popen[str]
    log: Path
    ids: dict[str, str] = field(default_factory=dict)
    """Of the adapters in its library, by name."""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_studio(
    folder: Path, *options: str, base: str | None = "tiny_world", cwd: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}), port: int | None = None,
) -> Iterator[RunningStudio]:  # fmt: skip
    """Start `ether ui` on a free port and a folder, ready when it answers, ended with the block.

    Its base is the one of 64 px, which draws fastest; None leaves it to the command.
    """
    port, log = port or free_port(), folder.parent / f"{folder.name}.log"
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "ether_diffusion.scripts.ether", "ui"]
    command += ["--folder", str(folder), "--port", str(port), *(["--base", base] if base else []), *options]
    environment = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, text=True, env=environment, start_new_session=True, cwd=cwd
        )
    studio = RunningStudio(f"http://127.0.0.1:{port}", folder, process, log)
    try:
        _wait_until_it_answers(studio)
        yield studio
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_it_answers(studio: RunningStudio) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert studio.process.poll() is None, studio.log.read_text()
        try:
            urllib.request.urlopen(f"{studio.url}/", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"no answer within {START_SECONDS:.0f} s: {studio.log.read_text()}")


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Start Chromium without its own look-ups."""
    assert CHROMIUM, "there is no chromium; .ci/run installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@dataclass
class Offences:
    """What a page did that no page of ours may do."""

    found: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Listen to requests, errors and the console of a page."""
        page.on("request", self._request)
        page.on("pageerror", lambda error: self.found.append(f"error: {error}"))
        page.on("console", self._console)

    def _request(self, request: Request) -> None:
        host = urlsplit(request.url)
        if host.scheme in ("http", "https", "ws", "wss") and host.hostname not in ("127.0.0.1", "localhost"):
            self.found.append(f"request: {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.found.append(f"console: {message.text}")


@contextmanager
def open_page(
    browser: Browser,
    url: str,
    *,
    phone: bool = False,
    scheme: Literal["light", "dark"] = "light",
    allowed: tuple[str, ...] = (),
) -> Iterator[Page]:
    """Open the studio in a fresh profile; at the end no request went outside, and no error was printed.

    `allowed` are parts of console lines that the test provokes.
    """
    context = browser.new_context(
        viewport=PHONE if phone else DESKTOP,  # type: ignore[arg-type]
        is_mobile=phone,
        has_touch=phone,
        color_scheme=scheme,
        accept_downloads=True,
    )
    context.set_default_timeout(WAIT_MS)
    page, offences = context.new_page(), Offences()
    offences.watch(page)
    try:
        page.goto(url)
        page.get_by_role("button", name="Generate", exact=True).first.wait_for()
        yield page
        assert_no_sideways_scroll(page)
        left = [line for line in offences.found if not any(part in line for part in allowed)]
        assert not left, left
    finally:
        context.close()


def set_number(page: Page, name: str, value: float) -> None:
    """Type into a field or beside a slider, and leave it."""
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.blur()


def download(page: Page, name: str, target: Path) -> Path:
    """Press a button that downloads, and return the file."""
    with page.expect_download() as caught:
        page.locator(f"#{name}").click()
    caught.value.save_as(target)
    return target


def assert_same_pixels(one: Path, other: Path) -> None:
    """Two files show the same picture, bit for bit."""
    with Image.open(one) as first, Image.open(other) as second:
        assert first.size == second.size
        assert ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getbbox() is None


def assert_no_sideways_scroll(page: Page) -> None:
    """Nothing is wider than the window."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"the page is {wide} px wider than the window"


def serious_findings(page: Page) -> list[str]:
    """Return what axe-core calls serious or critical, by WCAG 2 A and AA."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found: dict[str, Any] = page.evaluate(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
    )
    return [
        f"{violation['id']}: {json.dumps(node['target'])} {node['html'][:160]} {node['failureSummary'][:200]}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
