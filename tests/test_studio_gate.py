"""What never gets as far as Gradio: other names and sites, addresses to fetch, too much, and guesses."""

import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import psutil
import pytest
from browser import RunningStudio, running_studio

pytest.importorskip("gradio", reason="the extra ui is not installed; with it, and in CI, this runs")
from ether_diffusion.ui.gate import FREE_FAILURES, MAX_QUESTION, PAUSE

LOGIN = "anna:correct horse"


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    with running_studio(tmp_path_factory.mktemp("gate") / "studio") as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    with running_studio(tmp_path_factory.mktemp("locked") / "studio", "--auth", LOGIN) as running:
        yield running


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        named.setdefault("Content-Type", "application/json")
    request = urllib.request.Request(url, data=data, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def log_in(studio: RunningStudio, password: str, **headers: str) -> int:
    form = urllib.parse.urlencode({"username": "anna", "password": password}).encode()
    return ask(f"{studio.url}/login", form, Content_Type="application/x-www-form-urlencoded", **headers)[0]


class Listener:
    """A server that notes whether anybody comes."""

    def __init__(self, server: socket.socket) -> None:
        server.settimeout(0.5)
        self._server = server
        self.address = f"127.0.0.1:{server.getsockname()[1]}"

    def was_asked(self) -> bool:
        try:
            self._server.accept()[0].close()
        except TimeoutError:
            return False
        return True


@pytest.fixture
def listener() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Listener(server)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "localhost.evil:1", "", "192.168.1.7"]
)
def test_another_name_for_this_machine_is_not_answered(studio: RunningStudio, host: str) -> None:
    for path in ("/", "/config", "/gradio_api/info"):
        status, said, _ = ask(studio.url + path, Host=host)
        assert status == 403
        assert b"--auth" in said


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99"])
def test_names_of_this_machine_are_answered(studio: RunningStudio, host: str) -> None:
    assert ask(f"{studio.url}/config", Host=host)[0] == 200


def test_behind_a_login_any_name_will_do(locked: RunningStudio) -> None:
    assert ask(f"{locked.url}/config", Host="studio.example")[0] == 401
    assert log_in(locked, "correct horse", Host="studio.example") == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Origin": "http://127.0.0.1:1"},
    ],
)
def test_the_page_of_another_site_uploads_and_starts_nothing(
    studio: RunningStudio, headers: dict[str, str]
) -> None:
    line = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nhello\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    assert ask(f"{studio.url}/gradio_api/upload", line, Content_Type=kind, **headers)[0] == 403
    question = json.dumps({"data": ["a fox"]}).encode()
    assert (
        ask(f"{studio.url}/gradio_api/call/generate", question, Content_Type="text/plain", **headers)[0]
        == 403
    )
    assert ask(f"{studio.url}/gradio_api/upload", line, Content_Type=kind, Origin=studio.url)[0] == 200
    assert (
        ask(f"{studio.url}/gradio_api/upload", line, Content_Type=kind, Sec_Fetch_Site="same-origin")[0]
        == 200
    )


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/file=/etc/passwd", "/nowhere"])
def test_no_other_site_shows_the_studio_in_a_frame(studio: RunningStudio, path: str) -> None:
    headers = ask(studio.url + path)[2]
    named = {name.lower(): value for name, value in headers.items()}
    assert named["x-frame-options"] == "SAMEORIGIN"
    assert "frame-ancestors 'self'" in named["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "file=http://{}/x.png",
        "file=HTTP://{}/x.png",
        "file=http%3A//{}/x",
        "file/https://{}/x",
        "proxy=http://{}/x",
        "file=ftp://{}/x",
    ],
)
def test_no_address_is_fetched_for_a_visitor(studio: RunningStudio, listener: Listener, path: str) -> None:
    for place in (listener.address, "a-name-to-look-up.example"):
        started = time.monotonic()
        status, said, _ = ask(f"{studio.url}/gradio_api/{path.format(place)}")
        assert (status, b"fetches nothing" in said) == (403, True)
        assert time.monotonic() - started < 5
    assert not listener.was_asked()


@pytest.mark.parametrize("address", ["http://{}/x.png", "https://{}/x.png", " hTTp://{}/x"])
@pytest.mark.parametrize("endpoint", ["call/generate", "queue/join"])
def test_no_file_of_a_question_is_fetched(
    studio: RunningStudio, listener: Listener, address: str, endpoint: str
) -> None:
    file = {"path": address.format(listener.address), "meta": {"_type": "gradio.FileData"}}
    for data in ([file], ["a fox", {"x": [file]}], [[[file]]]):
        question = json.dumps({"data": data, "fn_index": 0, "session_hash": "abc"}).encode()
        hidden = question.replace(b"http", b"\\u0068ttp")
        for each in (question, hidden):
            status, said, _ = ask(f"{studio.url}/gradio_api/{endpoint}", each)
            assert (status, b"fetches nothing" in said) == (422, True)
    assert not listener.was_asked()


def test_an_address_in_a_prompt_is_a_prompt(studio: RunningStudio) -> None:
    question = json.dumps({"data": ["http://a.example", {}, 0, 1], "session_hash": "abc"}).encode()
    assert ask(f"{studio.url}/gradio_api/call/adapters", question)[0] == 200


def test_a_question_has_a_cap(studio: RunningStudio) -> None:
    with socket.create_connection(("127.0.0.1", int(studio.url.rpartition(":")[2])), timeout=10) as line:
        head = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {MAX_QUESTION + 1}\r\n\r\n".encode())
        assert b"413" in line.recv(100)


def test_what_needs_a_login_is_not_read_without_one(locked: RunningStudio) -> None:
    process = psutil.Process(locked.process.pid)
    before = process.memory_info().rss
    port = int(locked.url.rpartition(":")[2])
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/generate"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: {200 << 20}\r\n\r\n".encode() + b" " * 1000)
            assert line.recv(100).startswith(b"HTTP/1.1 401")  # before anything more is sent
    assert process.memory_info().rss - before < 50 << 20
    assert ask(f"{locked.url}/login", b"x" * 70_000)[0] == 413


def test_a_login_is_known_by_its_cookie(locked: RunningStudio) -> None:
    form = urllib.parse.urlencode({"username": "anna", "password": "correct horse"}).encode()
    _, _, headers = ask(f"{locked.url}/login", form, Content_Type="application/x-www-form-urlencoded")
    cookie = headers["set-cookie"] if "set-cookie" in headers else headers["Set-Cookie"]
    question = json.dumps({"data": [], "session_hash": "abc"}).encode()
    url = f"{locked.url}/gradio_api/call/adapters"
    assert ask(url, question)[0] == 401
    assert ask(url, question, Cookie="access-token-unsecure-x=y")[0] == 401
    assert ask(url, question, Cookie=cookie.partition(";")[0])[0] == 200


def test_guessing_is_slow_for_who_guesses_and_for_nobody_else(locked: RunningStudio) -> None:
    guesser, owner = {"X_Forwarded_For": "10.1.1.1"}, {"X_Forwarded_For": "10.2.2.2"}
    assert [log_in(locked, f"guess {number}", **guesser) for number in range(FREE_FAILURES)] == [400] * 5
    started = time.monotonic()
    assert log_in(locked, "correct horse", **owner) == 200
    assert time.monotonic() - started < PAUSE
    started = time.monotonic()
    assert log_in(locked, "one more guess", **guesser) == 400
    assert time.monotonic() - started >= PAUSE
    assert log_in(locked, "correct horse", **guesser) == 200  # is never refused
    started = time.monotonic()
    assert log_in(locked, "wrong again", **guesser) == 400
    assert time.monotonic() - started < PAUSE


def test_uploads_have_a_quota(studio: RunningStudio) -> None:
    (cache,) = (studio.folder / "temp").glob("server-*/cache")
    with (cache / "full").open("wb") as file:
        file.truncate((2 << 30) - 100)
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    body += bytes(200) + b"\r\n--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    status, said, _ = ask(f"{studio.url}/gradio_api/upload", body, Content_Type=kind)
    assert (status, b"older uploads are deleted" in said) == (413, True)
    (cache / "full").unlink()
    assert ask(f"{studio.url}/gradio_api/upload", body, Content_Type=kind)[0] == 200
