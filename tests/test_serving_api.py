"""`ether serve` as its clients see it: OpenAI's images API, events, adapters, keys, limits and figures."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from control_encoders import random_encoder
from fastapi.testclient import TestClient
from PIL import Image
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import read_adapter
from ether_diffusion.adapters.control_encoder import control_files
from ether_diffusion.bases import open_base
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.pipelines.metadata import png_bytes
from ether_diffusion.pipelines.sampling import ControlUse, Start
from ether_diffusion.scripts import ether
from ether_diffusion.serving.api import make_app
from ether_diffusion.serving.engine import Engine, Job, Request
from ether_diffusion.serving.keys import Keys, new_key
from ether_diffusion.serving.library import Library
from ether_diffusion.serving.replica import Limits, Replica

ROOT = Path(__file__).parent.parent
DRAW = "/v1/images/generations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a folder of two adapters."""
    made = tmp_path_factory.mktemp("served")
    tiny_sd().save_pretrained(made / "base")
    for seed, name in enumerate(("fox", "cat")):
        pipe = tiny_sd()
        torch.manual_seed(seed)
        pipe.unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), "default")
        save_ether(pipe, made / "adapters" / name)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    opened = Engine(open_base(folder / "base"), max_rows=4, num_slots=4, max_waiting=6)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(folder: Path, engine: Engine) -> TestClient:
    """A client of a server on this machine alone; its end does not close the shared engine."""
    return client_of(engine, folder / "adapters", Keys(None))


def client_of(engine: Engine, adapters: Path | str, keys: Keys) -> TestClient:
    app = make_app(Replica(engine, Library(str(adapters), engine), Limits(128, 50)), keys)
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))


def held(gate: threading.Event) -> Callable[[Job], None]:
    def wait(_: Job) -> None:
        gate.wait(60)

    return wait


def picture(answer: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))))


def test_it_draws_what_the_engine_draws_and_pictures_say_how(client: TestClient, engine: Engine) -> None:
    body = {"model": "fox", "prompt": "a b", "n": 2, "size": "32x64", "seed": 7, "steps": 3}
    answer = client.post(DRAW, json=body)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["seed"] for each in data] == [7, 8]
    own: dict[str, Any] = {"guidance_scale": engine.base.guidance_scale, "adapters": {"fox": 1.0}}
    request = Request(prompt="a b", seed=8, steps=3, width=32, height=64, **own)
    expected = np.asarray(engine.submit(request).picture.result(60)).astype(int)
    assert np.abs(picture(data[1]) - expected).max() <= 1
    said = read_image_metadata(base64.b64decode(data[1]["b64_json"]))
    assert said is not None
    assert (said.prompt, said.seed, said.steps, said.width) == ("a b", 8, 3, 32)
    assert [(use.name, use.strength) for use in said.adapters] == [("fox", 1.0)]
    assert said.base == "base"


def test_several_adapters_the_base_and_the_list_of_models(client: TestClient) -> None:
    named = [each["id"] for each in client.get("/v1/models").json()["data"]]
    assert named == ["base", "cat", "fox"]
    bodies: list[dict[str, Any]] = [
        {"adapters": {"fox": 0.5, "cat": 1.0}},
        {"adapters": {"fox": 1.0}, "negative_adapters": {}},
        {"model": "base"},
        {"model": "fox"},
    ]
    drawn = [
        picture(client.post(DRAW, json={"prompt": "a", "seed": 1, "steps": 2, **body}).json()["data"][0])
        for body in bodies
    ]
    assert not any(np.array_equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])


def test_events_tell_every_step_previews_and_the_picture(client: TestClient) -> None:
    body = {"prompt": "a", "seed": 1, "steps": 4, "n": 2, "stream": True, "partial_images": 1}
    text = client.post(DRAW, json=body).text
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data")
    ]
    for index in (0, 1):
        mine = [each for each in events if each["image_index"] == index]
        kinds = [each["type"].removeprefix("image_generation.") for each in mine]
        assert kinds == ["progress", "progress", "partial_image", "progress", "progress", "completed"]
        assert [each["step"] for each in mine if "step" in each] == [1, 2, 3, 4]
    plain = client.post(DRAW, json={"prompt": "a", "seed": 1, "steps": 4, "n": 2}).json()["data"]
    assert np.array_equal(picture(events[-1]), picture(plain[events[-1]["image_index"]]))


BAD: dict[str, tuple[object, int, str]] = {
    "not JSON": (b"{", 400, "is not valid JSON"),
    "no prompt": ({}, 400, "prompt is missing"),
    "unknown key": ({"prompt": "a", "style": "vivid"}, 400, "style is not known here; leave it out"),
    "text for a number": ({"prompt": "a", "steps": "9"}, 400, "steps"),
    "too many steps": ({"prompt": "a", "steps": 51}, 400, "steps are from 1 to 50 here; found 51"),
    "too large": ({"prompt": "a", "size": "256x64"}, 400, "over 128 px"),
    "a side that does not fit": ({"prompt": "a", "size": "33x64"}, 400, "multiple"),
    "no size": ({"prompt": "a", "size": "x"}, 400, "size is WIDTHxHEIGHT in px, or auto; found x"),
    "no steps": ({"prompt": "a", "steps": 0}, 400, "from 1 to 50"),
    "too many pictures": ({"prompt": "a", "n": 9}, 400, "n"),
    "an unknown model": ({"prompt": "a", "model": "nobody"}, 404, "nobody"),
    "a path": ({"prompt": "a", "model": "../base"}, 404, "base"),
    "a URL": ({"prompt": "a", "model": "http://127.0.0.1/x"}, 404, "http"),
    "beyond the last seed": ({"prompt": "a", "n": 2, "seed": 2**63 - 1}, 400, "beyond the last seed"),
    "NaN": (b'{"prompt": "a", "guidance_scale": NaN}', 400, "NaN"),
    "a strength without bounds": ({"prompt": "a", "adapters": {"fox": 1e9}}, 400, "from -10 to 10"),
    "an answer by URL": ({"prompt": "a", "response_format": "url"}, 400, "response_format"),
    "an unknown scheduler": ({"prompt": "a", "scheduler": "x"}, 400, "no scheduler"),
    "two ways to name adapters": (
        {"prompt": "a", "model": "fox", "adapters": {"cat": 1.0}},
        400,
        "one of them",
    ),
    "too much": (b" " * (2**23 + 1), 413, "over 8 MiB"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_requests_get_one_sentence(client: TestClient, fault: str) -> None:
    body, status, words = BAD[fault]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(DRAW, content=content)
    message = answer.json()["error"]["message"]
    assert (answer.status_code, "\n" in message) == (status, False), message
    assert words in message
    assert str(ROOT) not in message


def test_bodies_that_are_sent_at_a_time_are_bounded(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = zipped(folder / "adapters" / "fox")
    with monkeypatch.context() as patch:
        patch.setattr("ether_diffusion.serving.api.MAX_HELD_BYTES", len(data) - 1)
        answer = client.put("/v1/adapters/bird", content=data)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        assert (
            client.post(DRAW, json={"prompt": "a", "steps": 1}).status_code == 200
        )  # what was refused is let go
    assert client.put("/v1/adapters/bird", content=data).status_code == 201
    assert client.delete("/v1/adapters/bird").status_code == 200


def test_two_hundred_malformed_requests_each_get_one_sentence(client: TestClient) -> None:
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1e999,
        2**70,
        "",
        "\0",
        "../../etc/passwd",
        "http://127.0.0.1:1/x",
    ]
    values += ["file:///etc/passwd", "x" * 3000, -0.5, [], ["a"], {}, {"fox": "1"}, {"fox": None}]
    values += [{"../fox": 1.0}, {"fox": 11.0}, {str(index): 1.0 for index in range(9)}]
    good, accepted = {"prompt": "a", "steps": 1, "size": "8x8"}, 0
    names = ["prompt", "model", "n", "size", "response_format", "output_format", "stream", "partial_images"]
    names += [
        "adapters",
        "negative_adapters",
        "negative_prompt",
        "seed",
        "steps",
        "guidance_scale",
        "scheduler",
    ]
    bodies = [json.dumps(good | {name: value}) for name in names for value in values]
    bodies = [text.replace("Infinity", "1e999") for text in bodies]
    for cut in range(1, 40):
        bodies.append(json.dumps(good)[:-cut])
    for text in bodies:
        answer = client.post(DRAW, content=text.encode())
        if answer.status_code == 200:  # some of them are as they should be: seed 0, no adapters
            accepted += 1
            continue
        message = answer.json()["error"]["message"]
        assert answer.status_code in (400, 404), (text, message)
        assert message.strip(), text
        assert "\n" not in message, text
        assert len(message) < 500, text
        assert "Traceback" not in message
        assert str(ROOT) not in message
    assert len(bodies) - accepted >= 200
    assert client.get("/health").json()["status"] == "ok"


def zipped(folder: Path, around: str = "") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as packed:
        for path in folder.rglob("*"):
            if path.is_file():
                packed.write(path, f"{around}{path.relative_to(folder)}")
    return data.getvalue()


def test_an_uploaded_adapter_draws_and_is_deleted(client: TestClient, folder: Path) -> None:
    answer = client.put("/v1/adapters/dog", content=zipped(folder / "adapters" / "fox", "my-adapter/"))
    assert answer.status_code == 201, answer.text
    body = {"prompt": "a", "seed": 3, "steps": 2}
    ours, other = (
        picture(client.post(DRAW, json=body | {"model": name}).json()["data"][0]) for name in ("dog", "fox")
    )
    assert np.array_equal(ours, other)
    assert read_adapter(folder / "adapters" / "dog").parts.keys() == {"unet"}
    client.delete("/v1/adapters/dog")
    client.put("/v1/adapters/dog", content=zipped(folder / "adapters" / "cat"))
    replaced, cat = (
        picture(client.post(DRAW, json=body | {"model": name}).json()["data"][0]) for name in ("dog", "cat")
    )
    assert np.array_equal(replaced, cat)
    assert not np.array_equal(replaced, ours)
    again = client.put("/v1/adapters/dog", content=zipped(folder / "adapters" / "fox"))
    assert again.status_code == 409
    assert client.delete("/v1/adapters/dog").json()["deleted"] is True
    assert client.post(DRAW, json=body | {"model": "dog"}).status_code == 404
    assert not (folder / "adapters" / "dog").exists()
    assert client.delete("/v1/adapters/dog").status_code == 404


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x", b"PK", "no zip"),
        ("x", "empty", "has no adapter_config.json"),
        (".hidden", "fox", "is no name"),
        ("x", "slip", "holds ../../../notes.txt"),
        ("x", "damaged", "adapter_model.safetensors"),
    ],
)
def test_bad_uploads_leave_nothing(
    client: TestClient, folder: Path, tmp_path: Path, name: str, data: bytes | str, words: str
) -> None:
    before = sorted((folder / "adapters").rglob("*"))
    if isinstance(data, str):
        made = tmp_path / "made"
        made.mkdir()
        for file in (folder / "adapters" / "fox").iterdir():
            if data in ("fox", "damaged"):
                (made / file.name).write_bytes(file.read_bytes())
        if data == "damaged":
            (made / "adapter_model.safetensors").write_bytes(b"\xff" * 99)
        (made / "notes.txt").write_text("x")
        data = zipped(made, "../../../" if data == "slip" else "")
    answer = client.put(f"/v1/adapters/{name}", content=data)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert sorted((folder / "adapters").rglob("*")) == before


def test_keys_are_asked_for_limited_and_never_kept(folder: Path, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key, other = new_key(file, "anna"), new_key(file, "ben")
    assert key not in file.read_text()
    file.write_text(file.read_text().replace("\n", " 2\n", 1))
    client = client_of(engine, folder / "adapters", Keys.read(file, 16))
    paths = [("GET", "/v1/models"), ("POST", DRAW), ("GET", "/metrics"), ("DELETE", "/v1/adapters/fox")]
    for method, path in paths:
        for given in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Bearer {key}x"}):
            assert client.request(method, path, headers=given, json={"prompt": "a"}).status_code == 401
    assert client.get("/health").json()["status"] == "ok"
    body = {"prompt": "a", "n": 3, "steps": 1}
    statuses = [client.post(DRAW, json=body, headers={"Authorization": f"Bearer {k}"}) for k in (key, other)]
    assert [each.status_code for each in statuses] == [429, 200]
    assert "at most 2 pictures of a key" in statuses[0].json()["error"]["message"]
    with pytest.raises(ValueError, match="anna has a key"):
        new_key(file, "anna")
    file.write_text("anna secret\n")
    with pytest.raises(ValueError, match=r"line 1 .* is not NAME SHA256"):
        Keys.read(file, 16)


def test_without_keys_no_other_name_of_this_machine_is_answered(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Host": "rebound.example"}).status_code == 400


def test_a_full_queue_is_429_and_says_when_to_ask_again(client: TestClient, engine: Engine) -> None:
    gate = threading.Event()
    waiting = [engine.submit(Request(prompt="a", steps=2), on_step=held(gate))]
    while engine.num_running == 0:
        time.sleep(0.01)
    waiting += [engine.submit(Request(prompt="a", steps=1)) for _ in range(engine.max_waiting)]
    try:
        answer = client.post(DRAW, json={"prompt": "a"})
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
    finally:
        gate.set()
    for job in waiting:
        job.picture.result(60)


def test_what_breaks_while_drawing_is_500_in_a_sentence_and_the_server_goes_on(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of the device")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipeline.vae, "decode", spoil)
        answer = client.post(DRAW, json={"prompt": "a", "steps": 1})
        events = client.post(DRAW, json={"prompt": "a", "steps": 1, "stream": True}).text
    told = json.loads(events.split("data: ")[-1])
    assert "ZeroDivisionError: of the device" in told["error"]["message"]  # where OpenAI's client looks
    assert answer.status_code == 500
    assert "ZeroDivisionError: of the device" in answer.json()["error"]["message"]
    assert client.post(DRAW, json={"prompt": "a", "steps": 1}).status_code == 200


def test_other_sites_draw_nothing_and_what_is_not_there_is_said_alike(client: TestClient) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = client.post(DRAW, content=b'{"prompt": "a", "steps": 1}', headers=headers)
        assert answer.status_code == 403
        assert "another site" in answer.json()["error"]["message"]
    assert client.get("/v1/models/fox").json()["id"] == "fox"
    for method, path in (("GET", "/v1/models/nobody"), ("GET", "/"), ("POST", "/v1/images/edits")):
        answer = client.request(method, path)
        assert answer.status_code == 404
        assert "there is no" in answer.json()["error"]["message"]
    assert client.delete(DRAW).status_code == 405


def test_a_control_adapter_and_the_bases_name_are_refused(
    client: TestClient, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "adapters" / "fox", tmp_path / "trace")
    encoder = random_encoder(tiny_sd().unet, factor=1)
    for name, data in control_files(encoder, None).items():
        (tmp_path / "trace" / name).write_bytes(data)
    answer = client.put("/v1/adapters/trace", content=zipped(tmp_path / "trace"))
    assert answer.status_code == 400
    assert not (folder / "adapters" / "trace").exists()
    answer = client.put("/v1/adapters/base", content=zipped(folder / "adapters" / "fox"))
    assert answer.status_code == 409


def test_control_images_come_as_data(
    client: TestClient, engine: Engine, folder: Path, tmp_path: Path
) -> None:
    encoder = random_encoder(tiny_sd().unet, factor=engine.base.vae_scale_factor)
    for name, data in control_files(encoder, None).items():
        (tmp_path / name).write_bytes(data)
    answer = client.put("/v1/adapters/trace", content=zipped(tmp_path))
    assert answer.status_code == 201, answer.text
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    text = base64.b64encode(png_bytes(image)).decode()
    body = {"prompt": "a b", "seed": 1, "steps": 2, "adapters": {"fox": 1.0}, "size": "16x16"}
    control = {"control_image": text, "control": "trace", "control_strength": 0.5}
    drawn = picture(client.post(DRAW, json=body | control).json()["data"][0])
    own: dict[str, Any] = {"guidance_scale": engine.base.guidance_scale, "adapters": {"fox": 1.0}}
    request = Request(prompt="a b", seed=1, steps=2, width=16, height=16, **own)
    for use, is_like in ((ControlUse(image, "trace", 0.5), True), (None, False)):
        expected = engine.submit(replace(request, control=use)).picture.result(60)
        assert (np.abs(drawn - np.asarray(expected).astype(int)).max() <= 1) == is_like
    alone = {"prompt": "a", "steps": 1, "model": "trace", "control_image": f"data:image/png;base64,{text}"}
    assert client.post(DRAW, json=alone).status_code == 200
    for wrong, status, words in (
        ({"control_image": "http://127.0.0.1:1/x.png"}, 400, "is no base64; send a picture's bytes"),
        ({"control_image": base64.b64encode(b"x" * 99).decode()}, 400, "control_image "),
        ({"control_image": None}, 400, "need a control_image"),
        ({"control": None}, 400, "control_image needs control"),
        ({"control": "fox"}, 400, "follows no control image"),
        ({"control": "nobody"}, 404, "nobody"),
    ):
        answer = client.post(DRAW, json=body | control | wrong)
        assert answer.status_code == status, answer.text
        assert words in answer.json()["error"]["message"]
    assert client.delete("/v1/adapters/trace").status_code == 200


def test_start_pictures_and_masks_come_as_data(client: TestClient, engine: Engine) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    texts = {n: base64.b64encode(png_bytes(each)).decode() for n, each in (("image", image), ("mask", mask))}
    body = {"prompt": "a b", "seed": 1, "steps": 4, "size": "16x16", "strength": 0.5, **texts}
    drawn = picture(client.post(DRAW, json=body).json()["data"][0])
    assert (drawn[:, 8:] == np.asarray(image)[:, 8:]).all()
    own: dict[str, Any] = {"guidance_scale": engine.base.guidance_scale, "width": 16, "height": 16}
    request = Request(prompt="a b", seed=1, steps=4, start=Start(image, 0.5, mask), **own)
    expected = engine.submit(request).picture.result(60)
    assert np.abs(drawn - np.asarray(expected).astype(int)).max() <= 1
    for wrong, words in (
        ({"image": "https://127.0.0.1:1/x.png"}, "image is no base64; send a picture's bytes"),
        ({"mask": base64.b64encode(b"x" * 99).decode()}, "mask "),
        ({"image": None}, "strength and mask need an image"),
        ({"strength": 2.0}, "strength must be from 0 to 1"),
    ):
        answer = client.post(DRAW, json=body | wrong)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_pictures_say_the_adapters_of_the_unconditional_row(client: TestClient) -> None:
    body = {"prompt": "a", "steps": 1, "adapters": {"fox": 1.0}, "negative_adapters": {"cat": 0.5}}
    (found,) = client.post(DRAW, json=body).json()["data"]
    said = read_image_metadata(base64.b64decode(found["b64_json"]))
    assert said is not None
    assert json.loads(str(said.options["negative_adapters"])) == {"cat": 0.5}


def test_figures_for_prometheus(client: TestClient) -> None:
    client.get("/v1/models/nobody")
    client.post(DRAW, json={"prompt": "a", "steps": 1, "model": "fox"})
    text, figures, told = client.get("/metrics").text, dict[str, float](), dict[str, str]()
    for line in text.splitlines():
        if found := re.fullmatch(r"# (HELP|TYPE) (ether_diffusion_[a-z_]+) (.+)", line):
            told[found[1] + found[2]] = found[3]
            continue
        found = re.fullmatch(r'((ether_diffusion_[a-z_]+)(?:\{\w+="\w+"\})?) ([\d.e+-]+)', line)
        assert found is not None, line
        kind = "counter" if found[2].endswith("_total") else "gauge"
        assert told[f"TYPE{found[2]}"] == kind  # which stands before its values
        assert len(told[f"HELP{found[2]}"]) > 10
        figures[found[1]] = float(found[3])
    assert figures['ether_diffusion_requests_total{result="done"}'] > 0
    assert figures["ether_diffusion_slot_fills_total"] > 0
    assert figures['ether_diffusion_errors_total{status="404"}'] > 0
    engine_steps = figures["ether_diffusion_steps_total"]
    assert engine_steps == int(engine_steps) > 0


async def asked_at_once(address: str, count: int) -> list[int]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

        async def ask(seed: int) -> int:
            body = {"prompt": "a", "steps": 2, "seed": seed, "model": ("fox", "cat")[seed % 2]}
            answer = await client.post(DRAW, json=body)
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
            elif answer.status_code == 200:
                picture(answer.json()["data"][0])
            return answer.status_code

        return await asyncio.gather(*map(ask, range(count)))


def test_the_command_serves_and_frees_rows_of_clients_that_left(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ether_diffusion.scripts.ether", "serve", "--base", str(folder / "base")]
    command += ["--adapters", str(folder / "adapters"), "--port", str(port), "--max_steps", "1000"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(f"{address}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}{DRAW}", json={"prompt": "a", "steps": 900, "n": 8}, timeout=1.0)
        for _ in range(100):
            if httpx.get(f"{address}/health").json()["running"] == 0:
                break
            time.sleep(0.1)
        assert 'result="cancelled"} 8' in httpx.get(f"{address}/metrics").text
        done = httpx.post(f"{address}{DRAW}", json={"prompt": "a", "steps": 1, "model": "fox"}, timeout=60)
        assert done.status_code == 200
        before = psutil.Process(process.pid).memory_info().rss
        statuses = asyncio.run(asked_at_once(address, 500))
        assert len(statuses) == 500
        assert set(statuses) == {200, 429}
        assert psutil.Process(process.pid).memory_info().rss - before < 300 * 2**20
        assert httpx.get(f"{address}/health").json()["status"] == "ok"
        with ThreadPoolExecutor(1) as pool:
            left = pool.submit(
                httpx.post, f"{address}{DRAW}", json={"prompt": "a", "steps": 999, "n": 8}, timeout=60
            )
            while httpx.get(f"{address}/health").json()["running"] == 0:
                time.sleep(0.05)
            process.terminate()
        assert left.result().status_code == 503
        assert "the server ends; ask again" in left.result().json()["error"]["message"]
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[0].decode()
    assert f"serving {folder / 'base'} at {address}/v1" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no --adapters"),
        (["--adapters", "nowhere"], "nowhere is no folder"),
        (["--adapters", ".", "--host", "0.0.0.0"], "give --api_keys"),
        (["--new_key", "anna"], "name it with --api_keys"),
        (["--new_key", "a b", "--api_keys", "keys"], "is no name of a key"),
        (["--adapters", ".", "--api_keys", "nowhere"], "nowhere"),
        (["--adapters", ".", "--port", "99999"], "port=99999 is out of range"),
        (["--adapters", ".", "--max_rows", "0"], "max_rows=0 is out of range"),
        (["--adapters", ".", "--max_replicas", "2"], "no effect without --ray"),
        (["--adapters", ".", "--ray", "--min_replicas", "2"], "above max_replicas=1"),
        (["--adapters", "s3:/x:y", "--port", "1"], "no folder"),
        (["--adapters", ".", "--base", "v1.ckpt"], "v1.ckpt is not the folder of a base model"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ether.main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_said_before_a_base_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert ether.main(["serve", "--adapters", str(tmp_path), "--port", port]) == 2
    said = capsys.readouterr()
    assert f"127.0.0.1:{port} cannot be listened at" in said.err
    assert not said.out
