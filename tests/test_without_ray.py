"""All that needs no Ray works where there is none, and what does says what to install."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_pipelines import tiny_sd
from training_runs import write_photos

from ether_diffusion import EtherConfig, save_ether

ROOT = Path(__file__).parent.parent
INSTALL = 'pip install "ether-diffusion[ray]"'
CODE = """
import sys


class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoRay())

import json
from pathlib import Path
from ether_diffusion.bases import open_base
from ether_diffusion.scripts import ether, train_dreambooth
from ether_diffusion.serving.engine import Engine
from ether_diffusion.serving.keys import Keys
from test_serving_api import DRAW, client_of

found = {"served": ether.main(["serve", "--ray", "--base", "base", "--adapters", "adapters"])}
jobs = ["--jobs", "jobs.json", "--pretrained_model_name_or_path", "base", "--num_blocks", "2"]
jobs += ["--instance_data_dir", "photos", "--instance_prompt", "a sks cat", "--max_train_steps", "1"]
found["spread"] = train_dreambooth.main([*jobs, "--ray"])
found["left"] = sorted(each.name for each in Path().iterdir())
found["trained"] = train_dreambooth.main(jobs)
engine = Engine(open_base("base"))
body = {"prompt": "a", "model": "fox", "steps": 1}
answer = client_of(engine, "adapters", Keys(None)).post(DRAW, json=body)
engine.close()
print(json.dumps(found | {"drawn": answer.status_code}))
"""


def test_without_ray_all_else_works_and_it_is_said_what_to_install(tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "base")
    pipe = tiny_sd()
    torch.manual_seed(0)
    pipe.unet.add_adapter(EtherConfig(init_weights=False), "default")
    save_ether(pipe, tmp_path / "adapters" / "fox")
    write_photos(tmp_path / "photos")
    (tmp_path / "jobs.json").write_text(json.dumps([{"output_dir": "a"}, {"output_dir": "b", "seed": 1}]))
    before = sorted(each.name for each in tmp_path.iterdir())
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"served": 2, "spread": 2, "left": before, "trained": 0, "drawn": 200}
    assert f"--ray needs Ray: {INSTALL}; without it one process draws" in done.stderr
    assert f"Ray is not installed: {INSTALL}" in done.stderr
    assert all((tmp_path / name / "adapter_model.safetensors").is_file() for name in "ab")
