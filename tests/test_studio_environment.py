"""The studio starts where people start it: behind proxies, from any folder, without a home."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from browser import running_studio

from ether_diffusion.tiny_world import tiny_world_path

gradio_client = pytest.importorskip(
    "gradio_client", reason="the extra ui is not installed; with it, and in CI, this runs"
)


def drawn_by(url: str, folder: Path) -> str:
    script = gradio_client.Client(url, download_files=folder, verbose=False, analytics_enabled=False)
    pictures, _, _ = script.predict("a fox", steps=1, compare_with_base=False, api_name="/generate")
    return str(pictures[0]["caption"])


@pytest.mark.parametrize(
    "proxies",
    [
        {"http_proxy": "http://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "a.example"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
    ],
)
def test_it_starts_behind_a_proxy(tmp_path: Path, proxies: dict[str, str]) -> None:
    with running_studio(tmp_path / "studio", variables=proxies) as running:
        assert "Ether studio: http" in _said(running.log)
        inside = psutil.Process(running.process.pid).environ()
        assert {name: inside[name] for name in proxies} == proxies


def _said(log: Path) -> str:
    for _ in range(100):
        if "Ether studio" in log.read_text():
            break
        time.sleep(0.1)
    return log.read_text()


@pytest.mark.parametrize("base", ["./base", "base", "models/base", "models/../models/base/"])
def test_a_base_is_found_from_the_folder_that_the_command_was_given_in(tmp_path: Path, base: str) -> None:
    place = tmp_path / "here"
    shutil.copytree(tiny_world_path(), place / Path(os.path.normpath(base)))
    with running_studio(
        tmp_path / "studio", "--base", base, cwd=place, variables={"HF_HOME": "cache"}
    ) as running:
        assert drawn_by(running.url, tmp_path)
        assert not list((running.folder / "temp" / "empty").iterdir())


def test_a_relative_folder_is_where_the_command_was_given(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio", "--folder", "mine", cwd=tmp_path) as running:
        assert drawn_by(running.url, tmp_path)
    assert list((tmp_path / "mine" / "outputs").rglob("*.png"))


def test_without_a_home_a_folder_must_be_named(tmp_path: Path) -> None:
    """~nobody… stands for a user without a home, and so does ~ where neither HOME nor passwd say it."""
    command = [
        sys.executable,
        "-m",
        "ether_diffusion.scripts.ether",
        "ui",
        "--folder",
        "~no-such-user/studio",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert "there is no home folder here for ~no-such-user/studio; say with --folder" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_within_seconds_while_it_draws(tmp_path: Path, number: signal.Signals) -> None:
    with running_studio(tmp_path / "studio") as running:
        script = gradio_client.Client(running.url, verbose=False, analytics_enabled=False)
        drawing = script.submit("a fox", width=512, height=512, api_name="/generate")
        time.sleep(6)
        assert not drawing.done()
        started = time.monotonic()
        assert running.stop(number) == 0
        assert time.monotonic() - started < 10
        assert not list((running.folder / "temp").glob("server-*"))
