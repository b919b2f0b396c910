"""The studio is safe by default: who may come in, what it tells outside, what it never fetches or gives."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import RunningStudio, free_port, running_studio
from conftest import Capture, Log, Patch
from photo_files import photo

from ether_diffusion.scripts import ether
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.ui.server import read_login
from ether_diffusion.ui.words import handler, without_paths

NO_UI = "the extra ui is not installed; with it, and in CI, this runs"
gr = pytest.importorskip("gradio", reason=NO_UI)
gradio_client = pytest.importorskip("gradio_client", reason=NO_UI)
gate = pytest.importorskip("ether_diffusion.ui.gate", reason=NO_UI)

ROOT = Path(__file__).parent.parent
FOLDERS = ("ether_diffusion", "pipelines", "scripts", "ui", "tests")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
USER, PASSWORD = "anna", "correct horse"
FORM = "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    with running_studio(tmp_path_factory.mktemp("server") / "studio") as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    folder = tmp_path_factory.mktemp("locked") / "studio"
    with running_studio(folder, "--auth", f"{USER}:{PASSWORD}", base=None) as running:
        yield running


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        named.setdefault("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, named), timeout=60) as response:
            status, said, found = response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        status, said, found = error.code, error.read(), error.headers
    return status, said, {name.lower(): value for name, value in found.items()}


def question(*data: Any, **more: Any) -> bytes:
    return json.dumps({"data": data, "session_hash": "abc", **more}).encode()


def upload(studio: RunningStudio, content: bytes, **headers: str) -> tuple[int, bytes]:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + content + b"\r\n--x--\r\n"
    return ask(f"{studio.url}/gradio_api/upload", body, Content_Type=FORM, **headers)[:2]


def log_in(studio: RunningStudio, password: str, **headers: str) -> tuple[int, dict[str, str]]:
    form = urllib.parse.urlencode({"username": USER, "password": password}).encode()
    kind = "application/x-www-form-urlencoded"
    status, _, found = ask(f"{studio.url}/login", form, Content_Type=kind, **headers)
    return status, found


def posted(studio: RunningStudio, path: str, declared: int, sent: bytes = b"") -> bytes:
    """Return the beginning of the answer to a body that is said to come, and of which this is sent."""
    with socket.create_connection(("127.0.0.1", int(studio.url.rpartition(":")[2])), timeout=10) as line:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {declared}\r\n\r\n".encode() + sent)
        return line.recv(100)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "localhost.evil:1", ""])
def test_another_name_for_this_machine_is_not_answered(studio: RunningStudio, host: str) -> None:
    for path in ("/", "/config", "/gradio_api/info"):
        status, said, headers = ask(studio.url + path, Host=host)
        assert (status, b"--auth" in said) == (403, True)
        assert (
            headers["x-frame-options"],
            "frame-ancestors 'self'" in headers["content-security-policy"],
        ) == (
            "SAMEORIGIN",
            True,
        )
    for own in ("localhost", "LOCALHOST:1", "127.0.0.1:99"):
        assert ask(f"{studio.url}/config", Host=own)[0] == 200


OTHER_SITES = [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:3000"},
    {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site", "Origin": "http://127.0.0.1:1"},
]  # fmt: skip


@pytest.mark.parametrize("headers", OTHER_SITES)
def test_the_page_of_another_site_uploads_and_starts_nothing(
    studio: RunningStudio, headers: dict[str, str]
) -> None:
    assert upload(studio, b"hello", **headers)[0] == 403
    generate = f"{studio.url}/gradio_api/call/generate"
    assert ask(generate, question("a fox"), Content_Type="text/plain", **headers)[0] == 403
    for own in ({"Origin": studio.url}, {"Sec_Fetch_Site": "same-origin"}):
        assert upload(studio, b"hello", **own)[0] == 200


def was_asked(server: socket.socket) -> bool:
    server.settimeout(0.5)
    try:
        server.accept()[0].close()
    except TimeoutError:
        return False
    return True


def test_no_address_is_fetched_for_a_visitor(studio: RunningStudio) -> None:
    paths = (
        "file=http://{}/x.png", "file=HTTP://{}/x.png", "file=http%3A//{}/x", "file/https://{}/x",
        "proxy=http://{}/x", "file=ftp://{}/x",
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        for path in paths:
            for place in (here, "a-name-to-look-up.example"):
                started = time.monotonic()
                status, said, _ = ask(f"{studio.url}/gradio_api/{path.format(place)}")
                assert (status, b"fetches nothing" in said) == (403, True)
                assert time.monotonic() - started < 5
        for address in ("http://{}/x.png", "https://{}/x.png", " hTTp://{}/x"):
            file = {"path": address.format(here), "meta": {"_type": "gradio.FileData"}}
            for data in ([file], ["a fox", {"x": [file]}], [[[file]]]):
                plain = question(*data, fn_index=0)
                for each in (plain, plain.replace(b"http", b"\\u0068ttp")):
                    for endpoint in ("call/generate", "queue/join"):
                        status, said, _ = ask(f"{studio.url}/gradio_api/{endpoint}", each)
                        assert (status, b"fetches nothing" in said) == (422, True)
        assert not was_asked(listener)
    prompt = question("http://a.example", {}, 0, 1, 3, 64, 64, 1, "", False, True, 1, "", None)
    assert ask(f"{studio.url}/gradio_api/call/generate", prompt)[0] == 200


def test_uploads_and_questions_have_caps_and_a_quota(studio: RunningStudio) -> None:
    assert b"413" in posted(studio, "/gradio_api/queue/join", gate.MAX_QUESTION + 1)
    assert upload(studio, bytes(65 << 20))[0] == 413
    (cache,) = (studio.folder / "temp").glob("server-*/cache")
    with (cache / "full").open("wb") as file:
        file.truncate((2 << 30) - 100)
    status, said = upload(studio, bytes(200))
    assert (status, b"older uploads are deleted" in said) == (413, True)
    (cache / "full").unlink()
    assert upload(studio, bytes(200))[0] == 200


def test_what_needs_a_login_is_not_read_without_one(locked: RunningStudio) -> None:
    process = psutil.Process(locked.process.pid)
    before = process.memory_info().rss
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/generate"):
        answer = posted(locked, path, 200 << 20, b" " * 1000)
        assert answer.startswith(b"HTTP/1.1 401")  # before anything more is sent
    assert process.memory_info().rss - before < 50 << 20
    assert ask(f"{locked.url}/login", b"x" * 70_000)[0] == 413
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=x"):
        assert ask(f"{locked.url}{path}", Host="studio.example")[0] == 401
    assert ask(f"{locked.url}/openapi.json")[0] in (401, 404)


def test_a_login_is_known_by_its_cookie_under_any_name(locked: RunningStudio) -> None:
    status, headers = log_in(locked, PASSWORD, Host="studio.example")
    assert status == 200
    cookie, url = headers["set-cookie"].partition(";")[0], f"{locked.url}/gradio_api/call/adapters"
    for given, expected in (("", 401), ("access-token-unsecure-x=y", 401), (cookie, 200)):
        assert ask(url, question(), Cookie=given)[0] == expected
    quiet: dict[str, Any] = {"verbose": False, "analytics_enabled": False}
    with pytest.raises(Exception, match=r"(?i)auth|login|401"):
        gradio_client.Client(locked.url, **quiet)
    script = gradio_client.Client(locked.url, auth=(USER, PASSWORD), **quiet)
    assert [card["name"] for card in script.predict(api_name="/adapters")] == ["Example fox", "Shapes"]
    assert ask(f"{locked.url}/logout", Cookie=cookie)[0] in (
        200,
        401,
    )  # it leads to the page, which asks again
    assert ask(url, question(), Cookie=cookie)[0] == 401


def test_guessing_is_slow_for_who_guesses_and_for_nobody_else(locked: RunningStudio) -> None:
    def timed(password: str, client: str) -> tuple[int, bool]:
        started = time.monotonic()
        status, _ = log_in(locked, password, X_Forwarded_For=client)
        return status, time.monotonic() - started >= gate.PAUSE

    guesses = [log_in(locked, f"guess {n}", X_Forwarded_For="10.1.1.1")[0] for n in range(gate.FREE_FAILURES)]
    assert guesses == [400] * gate.FREE_FAILURES
    assert timed(PASSWORD, "10.2.2.2") == (200, False)
    assert timed("one more guess", "10.1.1.1") == (400, True)
    assert timed(PASSWORD, "10.1.1.1")[0] == 200  # is never refused
    assert timed("wrong again", "10.1.1.1") == (400, False)


def test_a_login_or_port_that_is_none_is_refused_in_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    for text in ("nobody", "name:", ":long-enough", "name:short", "@/no/such/file"):
        with pytest.raises((ValueError, FileNotFoundError), match="NAME:PASSWORD"):
            read_login(text)
    assert ether.main(["ui", "--folder", str(tmp_path / "studio"), "--port", "70000"]) == 2
    assert "70000" in capsys.readouterr().err
    (tmp_path / "login").write_text(f"{USER}:{PASSWORD}\nnot this\n")
    login = read_login(f"@{tmp_path / 'login'}")
    answers = [login(USER, PASSWORD), login(USER, "correct horsf"), login("Anna", PASSWORD)]
    assert answers == [True, False, False]
    assert "horse" not in repr(login)
    assert ether.main(["ui", "--folder", str(tmp_path / "studio"), "--listen"]) == 2
    assert re.fullmatch(r"ether ui: --listen .*--auth.*\n", capsys.readouterr().err)
    assert not (tmp_path / "studio").exists()


def test_what_keeps_it_from_starting_is_one_sentence(
    studio: RunningStudio, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """~no-such-user stands for a user without a home, and so does ~ where neither HOME nor passwd say it."""
    monkeypatch.chdir(tmp_path)
    port = studio.url.rpartition(":")[2]
    for options, words in (
        (["--port", port, "--folder", "other"], f"port {port} is taken"),
        (["--folder", "~no-such-user/studio"], "for ~no-such-user/studio; say with --folder"),
    ):
        assert ether.main(["ui", *options]) == 2
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1]
        assert "Traceback" not in said
        assert not list(tmp_path.iterdir())


OUTSIDE = """
import json, os, signal, sys, threading, time, urllib.request
from pathlib import Path
asked = []
def hook(event, arguments):
    if event == "socket.getaddrinfo":
        asked.append(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        asked.append(str(arguments[1][0]))
sys.addaudithook(hook)
def end(url):
    while True:
        time.sleep(1)
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            continue
        os.kill(os.getpid(), signal.SIGTERM)
        return
from ether_diffusion.scripts.command_options import Ui
from ether_diffusion.ui.server import ui
threading.Thread(target=end, args=(f"http://127.0.0.1:{sys.argv[2]}/",), daemon=True).start()
ui(Ui(folder=Path(sys.argv[1]), port=int(sys.argv[2])))
print(json.dumps(asked))
"""


def test_nothing_outside_is_asked_while_the_studio_is_imported_built_and_launched(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUTSIDE, str(tmp_path / "studio"), str(free_port())]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    asked = set(json.loads(done.stdout.splitlines()[-1]))
    assert asked <= {"127.0.0.1", "localhost", "None", "::1", "0.0.0.0"}, asked


def test_it_listens_on_this_machine_alone_and_hands_out_no_file_but_pictures(studio: RunningStudio) -> None:
    connections = psutil.Process(studio.process.pid).net_connections("tcp")
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    config = json.loads(ask(f"{studio.url}/config")[1])
    assert not config.get("is_space")
    assert not config.get("run_history")
    assert config["analytics_enabled"] is False
    for path in ("/etc/passwd", *(studio.folder / name for name in ("studio.log", "..", "adapters"))):
        assert ask(f"{studio.url}/gradio_api/file={path}")[0] in (403, 404)
    # a handler is given a path by hand: it must lie among the visitor's uploads
    (generate,) = [each for each in config["dependencies"] if each["api_name"] == "generate"]
    (drop,) = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "create-drop"]
    (dropped,) = [each for each in config["dependencies"] if [drop, "upload"] in each["targets"]]
    values = {c["id"]: c["props"].get("value") for c in config["components"]}
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for asked in (generate, dropped):
        given = [values[widget] for widget in asked["inputs"][:-1]]  # the file is the last of all
        join = question(*given, file, fn_index=asked["id"])
        status, said, _ = ask(f"{studio.url}/gradio_api/queue/join", join)
        assert (status, b"upload the file first" in said) == (422, True)  # it was not even read


def test_two_servers_of_one_folder_have_private_uploads_that_go_with_each(studio: RunningStudio) -> None:
    temp = studio.folder / "temp"
    (its,) = temp.glob("server-*")
    with running_studio(studio.folder) as killed:
        (first,) = set(temp.glob("server-*")) - {its}
        assert temp.stat().st_mode & 0o777 == first.stat().st_mode & 0o777 == 0o700
        (first / "photos").mkdir()
        (first / "photos" / "mine.png").write_bytes(photo())
        killed.process.kill()
        killed.process.wait()
        assert first.exists()
    with running_studio(studio.folder) as other:
        assert not first.exists()
        assert len(list(temp.glob("server-*"))) == 2
        assert (other.stop(), list(temp.glob("server-*"))) == (0, [its])


def test_an_error_of_ours_is_a_sentence_and_any_other_an_id_in_the_log(
    caplog: Log,
) -> None:
    from ether_diffusion.ui.requests import GenerateRequest

    def fail() -> None:
        raise RuntimeError("secret at /home/anna")

    with pytest.raises(gr.Error) as caught:
        handler(lambda: GenerateRequest("a fox", num_images=0))()
    assert re.fullmatch(r"[A-Z].* from 1 to 32; found 0\.", str(caught.value.message))
    assert without_paths("there is no /home/anna/studio/x.png here") == "there is no x.png here"
    with pytest.raises(gr.Error) as caught:
        handler(fail)()
    found = re.fullmatch(r"Something went wrong \(id ([0-9a-f]{4})\)\..*", str(caught.value.message))
    assert found
    assert found[1] in caplog.text
    assert "secret at /home/anna" in caplog.text


def test_no_source_blocks_the_server_runs_a_shell_or_unpickles() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AsyncFunctionDef) and path.parent.name != "serving":
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
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio

def draw(width, height):
    studio.engine.start(GenerateRequest("a fox", width=width, height=height, steps=1)).ended.result()

studio, process = Studio(Path(sys.argv[1]), base="tiny_world"), psutil.Process()
draw(64, 64)
before = process.memory_info().rss
for number in range(int(sys.argv[2])):  # 200 MB more after 12, were none given back
    draw(64 + 8 * (7 * number % 23), 64 + 8 * (5 * number % 19))
print(process.memory_info().rss - before)
"""


@pytest.mark.parametrize(
    ("number", "most"), [(12, 100), pytest.param(50, 200, marks=pytest.mark.slow, id="fifty")]
)
def test_pictures_of_many_sizes_leave_little_behind(tmp_path: Path, number: int, most: int) -> None:
    command = [sys.executable, "-c", MANY_SIZES, str(tmp_path / "studio"), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < most << 20


def test_it_says_one_line_and_nothing_while_it_draws(tmp_path: Path) -> None:
    with running_studio(tmp_path / "studio", base=None) as running:
        script = gradio_client.Client(
            running.url, download_files=tmp_path, verbose=False, analytics_enabled=False
        )
        script.predict("a fox", steps=1, compare_with_base=False, api_name="/generate")  # loads the base
        assert running.log.read_text() == f"Ether studio: {running.url} (Ctrl-C stops it)\n"


def test_sessions_leave_little_behind(studio: RunningStudio) -> None:
    process, url = psutil.Process(studio.process.pid), f"{studio.url}/gradio_api/call/adapters"
    for number in range(430):
        if number == 130:
            before = process.memory_info().rss
        event = json.loads(ask(url, question(session_hash=f"visitor{number}"))[1])["event_id"]
        assert b"complete" in ask(f"{url}/{event}")[1]
    assert process.memory_info().rss - before < 60 << 20  # of 145 MB if all were kept


def test_it_starts_behind_proxies_on_relative_folders_and_ends_within_seconds_while_it_draws(
    tmp_path: Path,
) -> None:
    proxies = {
        "HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "a.example",
        "ALL_PROXY": "socks5://127.0.0.1:9",
    }  # fmt: skip
    place = tmp_path / "here"
    shutil.copytree(tiny_world_path(), place / "models" / "base")
    options = ("--base", "models/../models/base/", "--folder", "mine")
    variables = {"HF_HOME": "cache", **proxies}
    with running_studio(tmp_path / "studio", *options, base=None, cwd=place, variables=variables) as running:
        inside = psutil.Process(running.process.pid).environ()
        assert {name: inside[name] for name in proxies} == proxies
        script = gradio_client.Client(
            running.url, download_files=tmp_path, verbose=False, analytics_enabled=False
        )
        script.predict("a fox", steps=1, compare_with_base=False, api_name="/generate")
        assert not list((place / "mine" / "temp" / "empty").iterdir())
        drawing = script.submit("a fox", width=512, height=512, api_name="/generate")
        time.sleep(2)
        assert not drawing.done()
        started = time.monotonic()
        assert running.stop(signal.SIGINT) == 0
        assert time.monotonic() - started < 10
        assert not list((place / "mine" / "temp").glob("server-*"))
    assert list((place / "mine" / "outputs").rglob("*.png"))
