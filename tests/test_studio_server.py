"""The studio is safe by default: who may come in, what it tells outside, and what it never hands out."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from browser import RunningStudio, free_port, running_studio
from photo_files import photo

from ether_diffusion.scripts import ether
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.ui.errors import handler, without_paths
from ether_diffusion.ui.jobs import RunningJobs
from ether_diffusion.ui.server import ServerSettings, read_login

NO_UI = "the extra ui is not installed; with it, and in CI, this runs"
gr = pytest.importorskip("gradio", reason=NO_UI)
gradio_client = pytest.importorskip("gradio_client", reason=NO_UI)

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("ether_diffusion", "pipelines", "scripts", "ui", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
OUTSIDE = """
import json, sys, tempfile
from pathlib import Path
asked = []
def hook(event, arguments):
    if event == "socket.getaddrinfo":
        asked.append(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        asked.append(str(arguments[1][0]))
sys.addaudithook(hook)
from ether_diffusion.ui import server
folder = Path(sys.argv[1])
settings = server.ServerSettings(folder, port=int(sys.argv[2]))
folder.mkdir()
with server._private_folder(folder / "temp") as private, server._environment(private):
    from ether_diffusion.ui.app import build_app
    from ether_diffusion.ui.studio import Studio
    studio = Studio(folder)
    app = build_app(studio)
    server.launch(app, settings, folder)
    import time; time.sleep(1)
    app.close(verbose=False)
print(json.dumps(asked))
"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    with running_studio(tmp_path_factory.mktemp("server") / "studio") as running:
        yield running


def answer(url: str, data: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": kind} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_nothing_outside_is_asked_while_the_studio_is_imported_built_and_launched(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUTSIDE, str(tmp_path / "studio"), str(free_port())]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    asked = set(json.loads(done.stdout.splitlines()[-1]))
    assert asked <= {"127.0.0.1", "localhost", "None", "::1", "0.0.0.0"}, asked


def test_listening_without_a_login_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "studio"
    assert ether.main(["ui", "--folder", str(folder), "--listen"]) == 2
    assert re.fullmatch(r"ether ui: --listen .*--auth.*\n", capsys.readouterr().err)
    assert not folder.exists()


@pytest.mark.parametrize("login", ["nobody", "name:", ":long-enough", "name:short", "@/no/such/file"])
def test_a_login_or_port_that_is_none_is_refused(login: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="NAME:PASSWORD"):
        read_login(login)
    with pytest.raises(ValueError, match="port=70000"):
        ServerSettings(tmp_path, port=70000)


def test_a_login_is_right_or_wrong_and_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "login").write_text("anna:correct horse\nnot this\n")
    door = read_login(f"@{tmp_path / 'login'}")
    assert door("anna", "correct horse")
    assert not door("anna", "correct horsf")
    assert not door("Anna", "correct horse")
    assert "horse" not in repr(door)


def test_a_taken_port_is_said_in_one_sentence(studio: RunningStudio, tmp_path: Path) -> None:
    port = studio.url.rpartition(":")[2]
    command = [sys.executable, "-m", "ether_diffusion.scripts.ether", "ui", "--port", port]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "other")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_listens_on_this_machine_alone_and_offers_no_share(studio: RunningStudio) -> None:
    process = psutil.Process(studio.process.pid)
    listening = {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    config = json.loads(answer(f"{studio.url}/config")[1])
    assert not config.get("is_space")
    assert not config.get("run_history")
    assert config["analytics_enabled"] is False


@pytest.mark.parametrize("path", ["/etc/passwd", "studio.log", "..", "adapters", "http://127.0.0.1:1/"])
def test_no_file_but_pictures_is_read_through_the_page(studio: RunningStudio, path: str) -> None:
    inside = studio.folder / path if not path.startswith(("/", "http")) else path
    assert answer(f"{studio.url}/gradio_api/file={inside}")[0] in (403, 404)


def test_an_upload_has_a_cap(studio: RunningStudio) -> None:
    line = b"--x\r\n"
    head = b'Content-Disposition: form-data; name="files"; filename="big.png"\r\n\r\n'
    body = line + head + bytes(65 << 20) + b"\r\n--x--\r\n"
    status, _ = answer(f"{studio.url}/gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert status == 413


@pytest.mark.parametrize("place", ["the drop field", "/generate"])
def test_what_a_visitor_names_is_never_handed_out(studio: RunningStudio, place: str) -> None:
    """A handler is given a path by hand: it must lie among the visitor's uploads."""
    config = json.loads(answer(f"{studio.url}/config")[1])
    if place == "/generate":
        (asked,) = [each for each in config["dependencies"] if each["api_name"] == "generate"]
    else:
        (drop,) = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "create-drop"]
        (asked,) = [each for each in config["dependencies"] if [drop, "upload"] in each["targets"]]
    values = {c["id"]: c["props"].get("value") for c in config["components"]}
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    data = [*(values[widget] for widget in asked["inputs"][:-1]), file]  # the file is the last of all
    body = json.dumps({"data": data, "fn_index": asked["id"], "session_hash": "abc"}).encode()
    status, said = answer(f"{studio.url}/gradio_api/queue/join", body)
    assert status == 422
    assert b"upload the file first" in said  # it was not even read


def test_two_servers_of_one_folder_have_private_uploads_that_go_with_each(tmp_path: Path) -> None:
    temp = tmp_path / "studio" / "temp"
    with running_studio(tmp_path / "studio") as one:
        (first,) = temp.glob("server-*")
        assert temp.stat().st_mode & 0o777 == first.stat().st_mode & 0o777 == 0o700
        (first / "photos").mkdir()
        (first / "photos" / "mine.png").write_bytes(photo())
        one.process.kill()
        one.process.wait()
        assert first.exists()
        with running_studio(tmp_path / "studio") as other, running_studio(tmp_path / "studio") as third:
            assert not first.exists()
            assert len(list(temp.glob("server-*"))) == 2
            assert (other.stop(), len(list(temp.glob("server-*")))) == (0, 1)
            assert third.stop() == 0
    assert not list(temp.glob("server-*"))


def test_a_login_is_asked_for_where_one_is_set(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio", "--auth", "anna:correct horse") as running:
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=x"):
            assert answer(f"{running.url}{path}")[0] == 401
        assert answer(f"{running.url}/openapi.json")[0] in (401, 404)
        with pytest.raises(Exception, match=r"(?i)auth|login|401"):
            gradio_client.Client(running.url, verbose=False, analytics_enabled=False)
        script = gradio_client.Client(
            running.url, auth=("anna", "correct horse"), verbose=False, analytics_enabled=False
        )
        assert [card["name"] for card in script.predict(api_name="/adapters")] == ["Shapes"]


def test_an_error_of_ours_is_a_sentence_without_a_path() -> None:
    from ether_diffusion.ui.requests import GenerateRequest

    with pytest.raises(gr.Error) as caught:
        handler(lambda: GenerateRequest("a fox", num_images=0))()
    assert re.fullmatch(r"[A-Z].* from 1 to 32; found 0\.", str(caught.value.message))
    assert without_paths("there is no /home/anna/studio/x.png here") == "there is no x.png here"


def test_any_other_error_is_an_id_whose_traceback_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("secret at /home/anna")

    with pytest.raises(gr.Error) as caught:
        handler(fail)()
    found = re.fullmatch(
        r"Something went wrong \(id ([0-9a-f]{4})\)\. Details are in the log\.", str(caught.value.message)
    )
    assert found
    assert found[1] in caplog.text
    assert "secret at /home/anna" in caplog.text


def test_stop_reaches_the_jobs_of_one_visitor_only() -> None:
    jobs = RunningJobs()
    with jobs.hold("me") as mine, jobs.hold("you") as theirs:
        jobs.stop("me")
        assert (mine.stopped, theirs.stopped) == (True, False)
    assert theirs.stopped  # whose page was closed


def test_no_source_blocks_the_server_runs_a_shell_or_unpickles() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AsyncFunctionDef):
                waits = (ast.Await, ast.AsyncFor, ast.AsyncWith)
                assert any(isinstance(n, waits) for n in ast.walk(node)), f"{path}: {node.name}"
            if isinstance(node, ast.keyword) and node.arg == "shell":
                assert ast.unparse(node.value) == "False", f"{path} runs a shell"
            if path.parent.name == "tests":
                continue  # they write pickles to see them refused
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "shelve"}, path


MANY_SIZES = """
import sys
from pathlib import Path
import psutil
from ether_diffusion.ui.jobs import StopToken
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


def test_sessions_leave_little_behind(studio: RunningStudio) -> None:
    process, url = psutil.Process(studio.process.pid), f"{studio.url}/gradio_api"

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


def drawn_by(url: str, folder: Path) -> str:
    script = gradio_client.Client(url, download_files=folder, verbose=False, analytics_enabled=False)
    pictures, _, _ = script.predict("a fox", steps=1, compare_with_base=False, api_name="/generate")
    return str(pictures[0]["caption"])


def test_it_starts_behind_proxies_on_a_base_and_a_folder_that_are_relative(tmp_path: Path) -> None:
    proxies = {
        "HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "a.example",
        "ALL_PROXY": "socks5://127.0.0.1:9",
    }  # fmt: skip
    place = tmp_path / "here"
    shutil.copytree(tiny_world_path(), place / "models" / "base")
    options = ("--base", "models/../models/base/", "--folder", "mine")
    variables = {"HF_HOME": "cache", **proxies}
    with running_studio(tmp_path / "studio", *options, cwd=place, variables=variables) as running:
        inside = psutil.Process(running.process.pid).environ()
        assert {name: inside[name] for name in proxies} == proxies
        assert drawn_by(running.url, tmp_path)
        assert not list((place / "mine" / "temp" / "empty").iterdir())
    assert list((place / "mine" / "outputs").rglob("*.png"))


def test_without_a_home_a_folder_must_be_named(tmp_path: Path) -> None:
    """~nobody… stands for a user without a home, and so does ~ where neither HOME nor passwd say it."""
    command = [sys.executable, "-m", "ether_diffusion.scripts.ether", "ui"]
    command += ["--folder", "~no-such-user/studio"]
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
