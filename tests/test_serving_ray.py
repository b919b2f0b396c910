"""The server on a local Ray, by the file in docs/serve.md: two replicas, one killed while it draws."""

import base64
import io
import os
import re
import secrets
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.serving.keys import new_key
from ether_diffusion.serving.options import Serve

pytest.importorskip("ray", reason='Ray is not installed: pip install "ether-diffusion[ray]"')
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of what Ray does

ROOT = Path(__file__).parent.parent
DRAW = "/v1/images/generations"


def settings() -> dict[str, Any]:
    """Return the serve.yaml of the page."""
    (text,) = re.findall(r"```yaml\n(# serve.yaml.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.S)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def deploy(made: Path, port: int, **changes: Any) -> None:
    """Do as `serve run serve.yaml` does, or `serve deploy` where it runs, with a file of other values."""
    told = settings()
    told["http_options"]["port"] = port
    (application,) = told["applications"]
    own = {"base": made / "base", "adapters": made / "adapters", "api_keys": made / "keys"}
    own |= {"min_replicas": 2, "max_replicas": 2, "max_rows": 4, "max_steps": 1000} | changes
    application["args"] |= {name: str(each) if isinstance(each, Path) else each for name, each in own.items()}
    (made / "serve.yaml").write_text(yaml.safe_dump(told))
    cli.main(["run", str(made / "serve.yaml"), "--non-blocking"], standalone_mode=False)


def test_the_file_on_the_page_is_one_of_ray_serve() -> None:
    (application,) = ServeDeploySchema.model_validate(settings()).applications
    assert application.import_path == "ether_diffusion.serving.ray_app:app"
    assert {each.name for each in application.deployments} <= {"Drawing", "Front"}
    assert Serve(**application.args, ray=True).adapters == "/shared/adapters"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """Two replicas behind a front that asks for a key."""
    made = tmp_path_factory.mktemp("served")
    tiny_sd().save_pretrained(made / "base")
    (made / "adapters").mkdir()
    for seed, name in enumerate(("fox", "cat", "dog")):
        pipe = tiny_sd()
        torch.manual_seed(seed)
        pipe.unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), "default")
        save_ether(pipe, made / "adapters" / name)
    key = new_key(made / "keys", "anna")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray would keep one in the home folder
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            runtime_env={"env_vars": {**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}},
        )
        try:
            deploy(made, port)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                client.headers["Authorization"] = f"Bearer {key}"
                until = time.monotonic() + 240
                while replica_states() != {"RUNNING": 2} or client.get("/health").status_code != 200:
                    assert time.monotonic() < until
                    time.sleep(0.2)
                yield client, made
        finally:
            serve.shutdown()
            ray.shutdown()


def body(name: str, steps: int, seed: int = 1) -> dict[str, Any]:
    return {"prompt": "a b", "model": name, "steps": steps, "seed": seed}


def drawing_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "ServeReplica:ether:Drawing" in " ".join(process.cmdline()):
                found.append(process)
    return found


def replica_states() -> dict[str, int]:
    applications = serve.status().applications
    found = applications["ether"].deployments.get("Drawing") if "ether" in applications else None
    return (
        {str(getattr(state, "value", state)): n for state, n in found.replica_states.items()} if found else {}
    )


def pixels(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found["b64_json"])))).astype(int)


def test_it_is_asked_as_a_server_of_one_process_is(served: tuple[httpx.Client, Path]) -> None:
    client, made = served
    assert httpx.get(f"{client.base_url}/v1/models").status_code == 401
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["base", "cat", "dog", "fox"]
    assert client.get("/health").json()["base"] == "base"
    engine = Engine(open_base(made / "base"))
    engine.add_adapter("fox", read_adapter(made / "adapters" / "fox"))
    own: dict[str, Any] = {"guidance_scale": engine.base.guidance_scale, "adapters": {"fox": 1.0}}
    expected = engine.submit(Request(prompt="a b", seed=1, steps=3, **own))
    drawn = pixels(client.post(DRAW, json=body("fox", 3)))
    assert np.abs(drawn - np.asarray(expected.picture.result(60)).astype(int)).max() <= 1
    engine.close()
    for wrong, status in (({"model": "nobody"}, 404), ({"steps": 5000}, 400), ({"style": "vivid"}, 400)):
        answer = client.post(DRAW, json=body("fox", 3) | wrong)
        assert answer.status_code == status
        assert "\n" not in answer.json()["error"]["message"]
    text = client.post(DRAW, json=body("fox", 3) | {"stream": True}).text
    assert [kind for kind in text.split() if kind.startswith("image_generation.")] == [
        *["image_generation.progress"] * 3,
        "image_generation.completed",
    ]


def test_requests_of_an_adapter_tend_to_meet_the_replica_that_holds_it(
    served: tuple[httpx.Client, Path],
) -> None:
    client, _ = served
    for steps, name in ((3, "fox"), (5, "cat"), (8, "dog")):
        for seed in range(10):
            pixels(client.post(DRAW, json=body(name, steps, seed)))
    handle: Any = serve.get_deployment_handle("Drawing", "ether")
    held = {}
    for name in ("fox", "cat", "dog"):
        figures = handle.options(session_id=name).ask.remote("figures").result()
        held[figures["steps_total"][1][""]] = figures["adapters_read"][1][""]
    # of two replicas, six where each has read each; one that was slow to answer is passed over once
    assert sum(held.values()) <= 4


def test_a_replica_killed_while_it_draws_loses_no_picture(served: tuple[httpx.Client, Path]) -> None:
    client, _ = served
    names, steps = ("fox", "cat", "dog", "base"), 300
    before = {process.pid for process in drawing_processes()}
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.post, DRAW, json=body(name, steps)) for name in names]
        time.sleep(0.5)
        busiest = max(drawing_processes(), key=lambda process: process.cpu_percent(0.3))
        assert not any(each.done() for each in asked)
        busiest.send_signal(signal.SIGKILL)
        drawn = [pixels(each.result()) for each in asked]
    for name, picture in zip(names, drawn, strict=True):
        alone = pixels(client.post(DRAW, json=body(name, steps)))
        assert np.abs(picture - alone).max() <= 1
    until = time.monotonic() + 120
    while len(now := {process.pid for process in drawing_processes()}) < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert len(now) == 2
    assert busiest.pid not in now


def test_an_edited_file_replaces_the_base_while_pictures_are_drawn(
    served: tuple[httpx.Client, Path],
) -> None:
    client, made = served
    shutil.copytree(made / "base", made / "other")
    deploy(made, client.base_url.port or 0, base=made / "other")
    drawn, until = list[str | None](), time.monotonic() + 240
    while drawn[-4:] != ["other"] * 4:
        assert time.monotonic() < until
        answer = client.post(DRAW, json=body("fox", 3))
        pixels(answer)
        said = read_image_metadata(base64.b64decode(answer.json()["data"][0]["b64_json"]))
        assert said is not None
        drawn.append(said.base)
    assert set(drawn) == {"base", "other"}
