"""The studio is safe by default: who may come in, what it tells outside, and what it never hands out."""

import ast
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import RunningStudio, free_port, running_studio

from ether_diffusion.scripts import ether
from ether_diffusion.ui.errors import handler, without_paths
from ether_diffusion.ui.jobs import RunningJobs
from ether_diffusion.ui.server import EVERYWHERE, LOOPBACK, ServerSettings, read_login

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
def test_a_login_that_is_none_is_refused(login: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="NAME:PASSWORD"):
        read_login(login)


def test_a_login_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "login").write_text("anna:correct horse\nnot this\n")
    assert read_login(f"@{tmp_path / 'login'}")("anna", "correct horse")


def test_a_port_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="port=70000"):
        ServerSettings(tmp_path, port=70000)
    assert ServerSettings(tmp_path).listen is False
    assert LOOPBACK != EVERYWHERE


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
    import psutil

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


def test_folders_are_private_and_uploads_go_with_the_server(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio") as running:
        temp = running.folder / "temp"
        assert temp.stat().st_mode & 0o777 == 0o700
        (own,) = temp.glob("server-*")
        assert running.stop() == 0
        assert not own.exists()


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
    assert caught.value.message == "The number of images is from 1 to 32; found 0."
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
    class Job:
        stopped = False

        def stop(self) -> None:
            self.stopped = True

    jobs, mine, theirs = RunningJobs(), Job(), Job()
    with jobs.hold("me", mine), jobs.hold("you", theirs):
        assert jobs.stop("me") == 1
        assert (mine.stopped, theirs.stopped) == (True, False)
    assert jobs.stop("you") == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_blocks_the_server_runs_a_shell_or_unpickles(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            waits = (ast.Await, ast.AsyncFor, ast.AsyncWith)
            assert any(isinstance(inner, waits) for inner in ast.walk(node)), f"{node.name} awaits nothing"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert ast.unparse(node.value) == "False", "a shell is run"
        if path.parent.name == "tests":
            continue  # they write pickles to see them refused
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"pickle", "dill", "shelve"}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in {"pickle", "dill", "shelve"}
