"""What --push_to_hub sends: seen by a server on this machine that answers as the Hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from training_runs import command, config, contents

from ether_diffusion.scripts.train_dreambooth import main
from ether_diffusion.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

TOKEN = "hf_" + "secret" * 5
FLAGS: dict[str, Json] = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "push_to_hub": True,
    "hub_model_id": "somebody/cat",
    "export_lora": True,
    "validation_prompt": ["a sks cat"],
    "num_validation_images": 1,
    "validation_num_inference_steps": 1,
}


class StandInHub(ThreadingHTTPServer):
    """A Hub that keeps what it is sent; a token other than ours is refused."""

    def __init__(self) -> None:
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: StandInHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/somebody/{self.server.repositories[-1]['name']}"})
        elif self.path.startswith("/api/models/") and "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/somebody/cat/commit/{'0' * 40}"
            self._answer({"commitUrl": url, "commitOid": "0" * 40})
        else:
            self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "Repository not found"}, 404)

    def _answer(self, values: object, status: int = 200) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    server = StandInHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_the_result_goes_up_and_nothing_else(tmp_path: Path, hub: StandInHub) -> None:
    flags: dict[str, Json] = {"train_text_encoder": True, "report_to": "tensorboard", "logging_dir": "tb"}
    assert main([*command(config(tmp_path, **(FLAGS | flags)))[2:], "--hub_token", TOKEN]) == 0
    here = contents(tmp_path / "run")
    assert {"checkpoint-1/manifest.json", "run.json", "training_config.yaml", "log.jsonl"} <= here.keys()
    assert any(name.startswith("tb/") for name in here)
    image = "prompt-00_seed-0.png"
    assert set(hub.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "text_encoder/adapter_config.json",
        "text_encoder/adapter_model.safetensors",
        "samples/contact_sheet.png",
        f"samples/base/{image}",
        f"samples/step-000000/{image}",
        f"samples/step-000002/{image}",
        f"samples/final/{image}",
    }
    assert all(here[name] == data for name, data in hub.files.items())
    assert f"samples/final/{image}" in hub.files["README.md"].decode()
    for data in hub.files.values():  # nothing says where it was made
        assert str(tmp_path).encode() not in data
    for data in contents(tmp_path).values():  # the token is written nowhere
        assert TOKEN.encode() not in data
    for asked in hub.repositories:
        assert (asked["organization"], asked["name"]) == ("somebody", "cat")
        assert asked.get("visibility") is None


def test_a_repository_without_a_name_has_the_folders_and_may_be_private(
    tmp_path: Path, hub: StandInHub
) -> None:
    flags: dict[str, Json] = {"validation_prompt": [], "hub_model_id": None, "hub_private_repo": True}
    assert train_dreambooth(config(tmp_path, **(FLAGS | flags)), hub_token=TOKEN) == 0
    assert {(asked["name"], asked["visibility"]) for asked in hub.repositories} == {("run", "private")}


def test_a_token_that_is_refused_stops_before_anything_is_trained(tmp_path: Path, hub: StandInHub) -> None:
    with pytest.raises(OSError, match="401"):
        train_dreambooth(config(tmp_path, **FLAGS), hub_token="hf_other")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not hub.files
