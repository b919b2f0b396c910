"""What sessions, pictures and strange files leave behind: not much memory, and never a broken list."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from browser import running_studio
from photo_files import photo
from studio_folders import make_adapters

from ether_diffusion.ui.labels import LABEL_NAME, read_label
from ether_diffusion.ui.studio import Studio

pytest.importorskip("gradio", reason="the extra ui is not installed; with it, and in CI, this runs")
MANY_SIZES = """
import sys
from pathlib import Path
import psutil
from ether_diffusion.ui.events import StopToken
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio

def draw(width, height):
    list(studio.engine.draw(GenerateRequest("a fox", width=width, height=height, steps=1), StopToken()))

studio, process = Studio(Path(sys.argv[1])), psutil.Process()
draw(64, 64)
before = process.memory_info().rss
for number in range(40):
    draw(64 + 8 * (7 * number % 23), 64 + 8 * (5 * number % 19))
print(process.memory_info().rss - before)
"""


def test_pictures_of_many_sizes_leave_little_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MANY_SIZES, str(tmp_path / "studio")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 100 << 20


def test_sessions_leave_little_behind(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio") as running:
        process, url = psutil.Process(running.process.pid), f"{running.url}/gradio_api"

        def visit(number: int) -> None:
            question = json.dumps({"data": [], "session_hash": f"visitor{number}"}).encode()
            request = urllib.request.Request(
                f"{url}/call/adapters", question, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                event = json.load(answer)["event_id"]
            with urllib.request.urlopen(f"{url}/call/adapters/{event}", timeout=30) as answer:
                assert b"complete" in answer.read()

        for number in range(130):
            visit(number)
        before = process.memory_info().rss
        for number in range(130, 430):
            visit(number)
        assert process.memory_info().rss - before < 60 << 20  # of 145 MB if all were kept


def test_uploaded_photos_go_with_the_server(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio") as running:
        (own,) = (running.folder / "temp").glob("server-*")
        (own / "photos").mkdir()
        (own / "photos" / "mine.png").write_bytes(photo())
        running.process.kill()
        running.process.wait()
    assert own.exists()
    with running_studio(tmp_path / "studio"):
        assert not own.exists()


CREATED = [
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-01-01T00:00:00+00:00",
    "2026-01-01T00:00:00", "not a time", "", "1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("created", CREATED)
def test_one_strange_date_does_not_break_the_library(tmp_path: Path, created: str) -> None:
    make_adapters(tmp_path / "made")
    studio = Studio(tmp_path / "studio")
    for name in ("one", "other"):
        shutil.copytree(tmp_path / "made" / "fox", studio.folder / "adapters" / name)
    strange = studio.folder / "adapters" / "one"
    (strange / LABEL_NAME).write_text(json.dumps({"name": "Strange", "created": created}))
    cards = studio.library.cards()
    assert {card.id for card in cards} == {"one", "other"}
    for card in cards:
        assert 1970 <= card.created.astimezone().year < 9999


@pytest.mark.parametrize("seconds", [-(2**40), 2**40, 2**33])
def test_strange_times_of_files_do_not_break_the_library(tmp_path: Path, seconds: int) -> None:
    make_adapters(tmp_path / "made")
    studio = Studio(tmp_path / "studio")
    folder = studio.folder / "adapters" / "one"
    shutil.copytree(tmp_path / "made" / "fox", folder)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (seconds, seconds))
    (card,) = studio.library.cards()
    assert 1970 <= card.created.astimezone().year < 9999


def test_a_pipe_in_place_of_a_label_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LABEL_NAME)
    assert read_label(tmp_path).name == tmp_path.name


def test_two_servers_of_one_folder_have_photos_of_their_own(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio") as one, running_studio(tmp_path / "studio") as other:
        owns = list((one.folder / "temp").glob("server-*"))
        assert len(owns) == 2
        assert other.stop() == 0
        assert len(list((one.folder / "temp").glob("server-*"))) == 1
