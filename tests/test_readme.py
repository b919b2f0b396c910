"""The README's code runs, its commands exist and its numbers are those of the code."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.scripts import ether
from ether_diffusion.scripts.train_dreambooth import make_parser
from ether_diffusion.tiny_world import tiny_world_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEED = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def snippet(containing: str) -> str:
    (found,) = [code for code in SNIPPETS if containing in code]
    return found


def test_the_first_snippet_trains_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, there = snippet("save_ether(pipe").split("load_ether(pipe")
    scope: dict[str, Any] = {}
    exec(here, scope)
    fresh = type(scope["pipe"]).from_pretrained(tiny_world_path())  # "in another process, on the same base"
    fresh.set_progress_bar_config(disable=True)
    exec("load_ether(pipe" + there, scope | {"pipe": fresh})
    assert fresh.get_active_adapters() == ["fox"]
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (64, 64)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_the_snippet_of_the_pipelines_draws_weighs_and_gives_the_base_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("my-adapter", "other-adapter")):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path())
        torch.manual_seed(seed)
        pipe.unet.add_adapter(EtherConfig())
        save_ether(pipe, name)
    scope: dict[str, Any] = {}
    exec(
        snippet("read_image_metadata").replace('"num_inference_steps": 20', '"num_inference_steps": 2'), scope
    )
    assert scope["image"].tobytes() != scope["base"].tobytes()
    assert len(scope["pair"]) == 2
    assert scope["pipe"].active_adapters == []
    metadata = read_image_metadata("fox.png")
    assert metadata is not None
    assert [use.name for use in metadata.adapters] == ["fox", "cat"]


def test_every_flag_of_the_readmes_training_commands_exists() -> None:
    blocks = re.findall(r"^    (?:train-dreambooth|accelerate launch).*?\n\n", README, flags=re.M | re.S)
    given = {flag for block in blocks for flag in re.findall(r"(?<=--)\w+", block)} - {"nproc_per_node"}
    section = README[README.index("## Your own photos") : README.index("## The studio")]
    mentioned = set(re.findall(r"`--(\w+)", section)) - {"nproc_per_node"}
    known = {name for action in make_parser()._actions for name in action.option_strings}
    assert len(blocks) == 3
    assert {f"--{name}" for name in given | mentioned} <= known


def test_the_configuration_of_the_readme_is_accepted() -> None:
    code = snippet("num_blocks_pattern")
    unet = tiny_unet()
    scope: dict[str, Any] = {}
    exec("from ether_diffusion import EtherConfig\nconfig = " + code.strip(), scope)
    unet.add_adapter(scope["config"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_the_snippet_of_mixed_adapters_gives_a_row_each() -> None:
    pipe = tiny_sd()
    for name in ("dog", "cat"):
        pipe.unet.add_adapter(EtherConfig(), name)
    given = {
        "latents": torch.randn(3, 4, 8, 8),
        "timesteps": torch.tensor([1, 2, 3]),
        "text": torch.randn(3, 7, 32),
    }
    scope: dict[str, Any] = {"torch": torch, "pipe": pipe, **given}
    exec(snippet("mixed_adapters"), scope)
    assert scope["noise"].shape == (3, 4, 8, 8)


def test_the_snippet_of_prepared_adapters_reaches_the_vectors() -> None:
    unet = tiny_unet()
    unet.add_adapter(EtherConfig())
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 7, 32))
    exec(
        snippet("prepared_adapters"),
        {"unet": unet, "batch": inputs, "compute_loss": lambda m, b: m(*b)[0].mean()},
    )
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)


def test_fused_attention_can_be_adapted_as_the_readme_says() -> None:
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    targets = re.search(r'`target_modules=r"(.*)"`', README)
    assert targets is not None
    unet.add_adapter(EtherConfig(target_modules=targets[1]))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 7, 32))
    unet(*inputs)[0].mean().backward()
    missing = [name for name, p in unet.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^    ether (\w+)", README, flags=re.MULTILINE))))
def test_every_command_of_the_readme_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        ether.main([command, "--help"])
    options = re.findall(rf"^    ether {command} .*?(?=#|$)", README, flags=re.MULTILINE)
    helped = capsys.readouterr().out
    assert all(option in helped for line in options for option in re.findall(r"--\w+", line))


@pytest.mark.parametrize("bench", sorted(set(re.findall(r"\btools\.(bench_\w+)", SPEED))))
def test_every_bench_of_the_tables_starts(bench: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tools.{bench}", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_the_tree_names_what_is_there() -> None:
    root = ROOT
    tree = re.search(r"^    ether_diffusion/ .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert tree is not None
    folder = root
    for line in tree[0].splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]
        folder = root if indent == 4 else folder
        for name in names.split(", "):
            assert (folder / name).exists(), f"the README's tree names {name}, which is not in {folder}"
        if indent == 4:
            folder = root / names
