"""A base is loaded from wherever it lies, as it is stored, or refused in words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig
from ether_diffusion.bases import load_base
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_sd().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_of_a_pipeline_is_loaded_whole(folder: Path) -> None:
    pipe = load_base(folder)
    assert isinstance(pipe, StableDiffusionPipeline)
    for name, weight in tiny_sd().unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight), name


def test_a_folder_of_a_unet_is_loaded_as_one(folder: Path) -> None:
    assert isinstance(load_base(folder / "unet"), UNet2DConditionModel)


def test_each_part_keeps_the_dtype_it_is_stored_in(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pipe.unet.to(torch.float16)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    assert loaded.unet.dtype == torch.float16
    assert loaded.text_encoder.dtype == torch.bfloat16
    assert loaded.vae.dtype == torch.float32


@pytest.mark.parametrize("kind", [EtherConfig, LoraConfig])
def test_a_base_saved_with_an_adapter_inside_is_the_base_again(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, plain = tiny_sd(), tiny_sd().unet.state_dict()
    pipe.unet.add_adapter(kind(target_modules=["to_q", "to_out.0"]))
    pipe.save_pretrained(tmp_path)
    for unet in (load_base(tmp_path).unet, load_base(tmp_path / "unet")):
        assert unet.state_dict().keys() == plain.keys()
        for name, weight in plain.items():
            assert torch.equal(unet.state_dict()[name], weight), name
    assert caplog.text.count("saved with an adapter inside") == caplog.text.count("by save_ether") == 2
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="would be random numbers"):
        load_base(tmp_path)


def test_tiny_world_is_an_alias() -> None:
    if (WEIGHTS_FOLDER / "model_index.json").is_file():
        assert isinstance(load_base(ALIAS), StableDiffusionPipeline)
    else:
        with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
            load_base(ALIAS)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a base model, nor a hub id"):
        load_base(name)


def test_a_folder_of_something_else_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json and no UNet"):
        load_base(folder / "vae")


def test_a_damaged_base_is_refused_in_words(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is damaged; fetch or save it again"):
        load_base(folder)
