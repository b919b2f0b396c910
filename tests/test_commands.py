"""The command `ether`: its exit codes, its words and what it writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Capture, Factory, Patch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import load_ether, read_adapter, save_ether
from ether_diffusion.adapters.format import content_hash
from ether_diffusion.bases import open_base
from ether_diffusion.options import Options, declared
from ether_diffusion.scripts import command_options, ether
from ether_diffusion.serving.options import Serve
from ether_diffusion.tiny_world import SECOND_ALIAS
from ether_diffusion.training.config import DreamBoothConfig


@pytest.mark.parametrize("options", [Serve, command_options.Plan, command_options.Ui])
def test_a_command_without_a_base_takes_that_of_training_the_world_of_128_px(options: type[Options]) -> None:
    trained = DreamBoothConfig.options()["pretrained_model_name_or_path"].default
    assert declared(options)["base"].default == trained == SECOND_ALIAS
    assert open_base(SECOND_ALIAS).native_size == 128


@pytest.fixture(scope="module")
def made(tmp_path_factory: Factory) -> Path:
    """A folder with a base, another base, a UNet by itself, an adapter and an official checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    pipe = tiny_sd()
    pipe.save_pretrained(folder / "base")
    pipe.unet.save_pretrained(folder / "unet")
    tiny_sd(seed=7).save_pretrained(folder / "other")
    pipe.unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), "default")
    save_ether(
        pipe, folder / "adapter", trigger="a photo of sks dog", base_model="tiny", training={"steps": 800}
    )
    vectors = {f"transformer.h.0.attn.attn.ether_R{x}": torch.randn(1, 4, 8) for x in "qv"}
    torch.save({"model": vectors}, folder / "official.pth")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A fresh working directory of links to what was made."""
    for part in made.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_inspect_says_what_an_adapter_holds(work: Path, capsys: Capture) -> None:
    assert ether.main(["inspect", "adapter", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["unet"]
    adapter = read_adapter(work / "adapter")
    assert adapter.metadata.base_fingerprint is not None
    assert facts == {
        "variant": "ether_plus",
        "sides": "both",
        "num_blocks": 4,
        "num_blocks_pattern": {},
        "projections": 32,
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
        "sha256": content_hash(adapter.tensors),
        "trigger": "a photo of sks dog",
        "base_model": "tiny",
        "training": {"steps": 800},
        "base_fingerprint": adapter.metadata.base_fingerprint.id,
        "file_bytes": (work / "adapter" / "adapter_model.safetensors").stat().st_size,
    }
    assert ether.main(["inspect", "adapter"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"  trigger: a photo of sks dog", "  training: steps=800"} <= set(lines)


def test_export_writes_a_file_that_diffusers_loads(work: Path, capsys: Capture) -> None:
    assert ether.main(["export", "adapter", "--base", "base", "--output", "lora", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "lora/pytorch_lora_weights.safetensors\n"
    pipe = DiffusionPipeline.from_pretrained(work / "base")
    pipe.load_lora_weights(work / "lora")
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}


def test_export_takes_a_unet_a_name_and_another_base_and_writes_beside_by_default(work: Path) -> None:
    shutil.copytree(work / "adapter", "beside")
    made = []
    for base in (["unet"], ["other", "--rebake"]):
        assert ether.main(["export", "beside", "--export_name", "sks", "--base", *base]) == 0
        made.append(load_file("beside/sks.safetensors"))
    assert {tensor.dtype for tensor in made[0].values()} == {torch.float16}
    assert made[0].keys() == made[1].keys()
    assert any(not torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_merge_writes_a_pipeline_or_a_unet_that_stock_diffusers_loads(work: Path, capsys: Capture) -> None:
    merge = ["merge", "adapter", "--scale", "0.5"]
    assert ether.main([*merge, "--base", "base", "--output", "merged"]) == 0
    assert capsys.readouterr().out == "merged\n"
    pipe = DiffusionPipeline.from_pretrained(work / "base")
    load_ether(pipe, work / "adapter")
    merged = DiffusionPipeline.from_pretrained(work / "merged")
    x = torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 7, 32)
    with torch.no_grad():
        native = pipe.unet(*x, cross_attention_kwargs={"scale": 0.5}).sample
        torch.testing.assert_close(merged.unet(*x).sample, native, rtol=1e-4, atol=1e-5)
    assert ether.main([*merge, "--base", "unet", "--output", "alone"]) == 0
    UNet2DConditionModel.from_pretrained(work / "alone")


def test_convert_writes_an_adapter(work: Path) -> None:
    assert ether.main(["convert", "official.pth", "--output", "converted", "--architecture", "llama"]) == 0
    adapter = read_adapter(work / "converted")
    assert adapter.config.sides == "output"
    assert set(adapter.projections()) == {f"model.layers.0.self_attn.{x}_proj" for x in "qv"}


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


WRONG = {
    "inspect nowhere": "nowhere",
    "inspect unet": "unet",
    "export adapter --base ./nowhere --output out": "nowhere is not the folder",
    "export adapter --base empty --output out": "holds no model_index.json",
    "export adapter --base other --output out": "--rebake",
    "export adapter --base base --export_name ../x": "is not a file name",
    "export adapter --base base --output foreign": "is no export",
    "merge adapter --base base --output foreign": "not empty",
    "merge adapter --base other --output out": "--rebake",
    "merge adapter --base base --output out --scale inf": "finite",
    "convert none.pth --output out --architecture phi": "none.pth is not a file",
    "convert text.pth --output out --architecture phi": "not a torch checkpoint",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_users_error_is_one_sentence_and_changes_nothing(work: Path, command: str, capsys: Capture) -> None:
    (work / "empty").mkdir()
    (work / "foreign").mkdir()
    save_file({"x": torch.ones(1)}, work / "foreign" / "pytorch_lora_weights.safetensors")
    (work / "text.pth").write_text("hello")
    before = listing(work)
    assert ether.main(command.split()) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith(f"ether {command.split()[0]}: ")
    assert WRONG[command] in message
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert listing(work) == before


def test_debugging_lets_the_error_go_on() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ether.main(["--debug", "inspect", "nowhere"])


@pytest.mark.parametrize("arguments", [[], ["paint"], ["export", "adapter"], ["merge", "a", "--base", "b"]])
def test_a_command_line_that_does_not_parse_ends_with_code_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        ether.main(arguments)
    assert ended.value.code == 2
    assert "usage: ether" in capsys.readouterr().err
