"""The loop of DreamBooth trains a control encoder beside the adapter, resumes it, and writes both."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
from PIL import Image
from safetensors.torch import load_file

from ether_diffusion.adapters.format import content_hash
from ether_diffusion.adapters.models import adapter_tensors
from ether_diffusion.bases import open_base
from ether_diffusion.control import load_control, new_encoder, read_control
from ether_diffusion.pipelines import EtherControlPipeline
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import ControlRunConfig
from ether_diffusion.training.config.files import read_config_file
from ether_diffusion.training.randomness import stream
from ether_diffusion.training.run import train_dreambooth

ENCODER = "control_encoder.safetensors"


def config(tmp_path: Path, **flags: Json) -> ControlRunConfig:
    """Return a run of four steps whose control images are the photos in gray."""
    photos, controls = tmp_path / "photos", tmp_path / "controls"
    plain = training_runs.config(tmp_path)
    if not controls.exists():
        controls.mkdir()
        for path in photos.glob("*.png"):
            with Image.open(path) as image:
                image.convert("L").save(controls / path.name)
    values = plain.flat() | {"learning_rate": None, "target_modules": "attention"}
    values |= {"conditioning_data_dir": str(controls), "control_type": "gray"}
    return ControlRunConfig.from_flat(values | flags).resolved()


def fresh_encoder(tmp_path: Path) -> Any:
    base = open_base(tmp_path / "base")
    seed = stream(0, "control encoder").initial_seed()
    return new_encoder(base.load_denoiser(), vae_scale_factor=base.vae_scale_factor, seed=seed)


def trained(tmp_path: Path, **flags: Json) -> Path:
    run = config(tmp_path, **flags)
    assert train_dreambooth(run) == 0
    return run.output.output_dir


METHODS = ["ether_plus", "lora", "oft", "hra", "delora", "boft", "ia3", "none"]
PICTURE = "prompt-00_seed-0.png"

# what BOFT says of kernels that are not there
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, photos, control images and red.png."""
    folder = tmp_path_factory.mktemp("control")
    config(folder)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "red.png")
    return folder


def flags_of(place: Path, method: str) -> dict[str, Json]:
    """Return what a method's run of two steps is asked for, drawn with a control image."""
    return {
        "adapter": method,
        "output_dir": str(place / method),
        "validation_prompt": ["a cat"],
        "validation_image": [str(place / "red.png")],
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "validation_guidance_scale": 3.0,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "learning_rate": 0.01,
    }


@pytest.fixture(scope="module")
def runs(place: Path) -> Callable[[str], Path]:
    """Return the folder of a method's run, which is done once."""
    return cache(lambda method: trained(place, **flags_of(place, method)))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_an_adapter_and_an_encoder_that_load_together(
    place: Path, runs: Callable[[str], Path], method: str
) -> None:
    folder, fresh = runs(method), fresh_encoder(place)
    unet = open_base(place / "base").load_denoiser()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    loaded = load_control(unet, folder)
    assert loaded.encoder.config.control_type == "gray"
    assert fresh.conv_out.weight.abs().max() == 0
    assert loaded.encoder.conv_out.weight.abs().max() > 0
    assert not torch.equal(loaded.encoder.conv_in.weight, fresh.conv_in.weight)
    said = json.loads((folder / "control_config.json").read_text()).get("adapter_sha256")
    if method == "none":
        assert said is loaded.report is None
        assert not list(folder.glob("adapter_*"))
        assert before.keys() == unet.state_dict().keys()
        return
    saved = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    assert loaded.report is not None
    assert loaded.report.base_match == "same"
    assert said == content_hash(saved)
    found = adapter_tensors(unet, "control")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("method", METHODS)
def test_the_loaded_pipeline_draws_the_last_validation_images(
    place: Path, runs: Callable[[str], Path], method: str
) -> None:
    samples = runs(method) / "samples"
    pipe = EtherControlPipeline.from_pretrained(place / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control_weights(runs(method))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 8, "height": 8, "seed": 0}
    found = pipe("a cat", control_image=Image.open(place / "red.png"), **options).images[0]
    with Image.open(samples / "final" / PICTURE) as last:
        assert np.array_equal(np.asarray(found), np.asarray(last.convert("RGB")))
    if method in ("ether_plus", "none"):  # which begin as the base
        assert (samples / "base" / PICTURE).read_bytes() == (samples / "step-000000" / PICTURE).read_bytes()


def test_validation_shows_control_base_and_result_side_by_side(
    place: Path, runs: Callable[[str], Path]
) -> None:
    samples = runs("ether_plus") / "samples"
    with Image.open(samples / "control" / PICTURE) as shown:
        assert set(shown.convert("RGB").get_flattened_data()) == {(255, 0, 0)}
    assert (samples / "step-000002" / PICTURE).read_bytes() == (samples / "final" / PICTURE).read_bytes()
    assert (samples / "contact_sheet.png").is_file()
    flags = flags_of(place, "ether_plus") | {"output_dir": str(place / "plain"), "max_train_steps": 1}
    del flags["validation_image"]
    assert train_dreambooth(training_runs.config(place, **flags)) == 0
    of_base = place / "plain" / "samples" / "base" / PICTURE
    assert of_base.read_bytes() == (samples / "base" / PICTURE).read_bytes()  # the base sees no control
    assert not (place / "plain" / ENCODER).exists()


@pytest.mark.parametrize("method", ["ether_plus", "lora", "none"])
def test_the_card_shows_how_to_load_adapter_and_encoder(
    place: Path, runs: Callable[[str], Path], method: str
) -> None:
    card = (runs(method) / "README.md").read_text()
    assert "pipe = EtherControlPipeline.from_pretrained(" in card
    assert "pipe.load_control_weights(" in card
    assert "load_ether" not in card
    assert "PeftModel" not in card
    code = card.partition("```python\n")[2].partition("\n```")[0]
    code = code.replace("path or Hub id of this adapter", str(runs(method))).replace('("base")', "(base)")
    code = code.replace("control image, of the proportions of the picture", str(place / "red.png"))
    names: dict[str, Any] = {"base": place / "base"}
    exec(code.replace("control_image=where", "control_image=where, num_inference_steps=1"), names)
    assert names["picture"].size == (8, 8)


@pytest.mark.parametrize("method", ["ether_plus", "none"])
def test_a_run_that_was_cut_goes_on_to_the_same_bytes(
    place: Path, runs: Callable[[str], Path], method: str
) -> None:
    folder = runs(method)
    before = training_runs.trained_files(folder)
    assert ENCODER in before
    for path in (ENCODER, "control_config.json", "adapter_model.safetensors", "adapter_config.json"):
        (folder / path).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoint-2")
    assert train_dreambooth(config(place, **flags_of(place, method))) == 0
    assert training_runs.trained_files(folder) == before


def test_a_run_keeps_its_settings_and_its_kind_of_control(place: Path, runs: Callable[[str], Path]) -> None:
    flags = flags_of(place, "ether_plus")
    saved = read_config_file(runs("ether_plus") / "training_config.yaml")
    assert ControlRunConfig.from_flat(saved).resolved() == config(place, **flags)
    with pytest.raises(ValueError, match="control_type"):
        train_dreambooth(config(place, **(flags | {"control_type": "other", "max_train_steps": 6})))


def test_the_encoder_moves_at_its_own_rate(tmp_path: Path) -> None:
    # Adam's first step moves every number by its learning rate, where its gradient is no noise
    folder = trained(tmp_path, max_train_steps=1, control_learning_rate=3e-5, learning_rate=1e-3)
    encoder = read_control(folder)
    assert encoder.conv_out.weight.abs().max().item() == pytest.approx(3e-5, rel=1e-3)


def test_control_dropped_always_teaches_the_encoder_nothing(tmp_path: Path) -> None:
    encoder, fresh = read_control(trained(tmp_path, control_dropout=1.0)), fresh_encoder(tmp_path)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_another_control_image_gives_another_result_and_recomputed_activations_the_same(
    tmp_path: Path,
) -> None:
    folder = trained(tmp_path)
    one, plain = (load_file(folder / name) for name in ("adapter_model.safetensors", ENCODER))
    spared = trained(tmp_path, gradient_checkpointing=True, output_dir=str(tmp_path / "spared"))
    for name, tensor in load_file(spared / ENCODER).items():
        torch.testing.assert_close(tensor, plain[name])
    for path in (tmp_path / "controls").iterdir():
        with Image.open(path) as image:
            image.rotate(180).save(path)
    other = load_file(trained(tmp_path, output_dir=str(tmp_path / "other")) / "adapter_model.safetensors")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_an_sdxl_base_learns_control_too_with_an_average_and_flips(tmp_path: Path) -> None:
    training_runs.write_base(tmp_path / "base", is_xl=True)
    folder = trained(tmp_path, adapter="none", use_ema=True, random_flip=True)
    assert read_control(folder).conv_out.weight.abs().max() > 0
    assert "pipe = EtherControlXLPipeline.from_pretrained(" in (folder / "README.md").read_text()


def test_a_rehearsal_counts_the_encoders_parameters(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        dry = config(place, adapter="none", output_dir=str(place / "dry"))
        assert train_dreambooth(dry, dry_run=True) == 0
    count = sum(parameter.numel() for parameter in fresh_encoder(place).parameters())
    assert f"the encoder of control images, {count:,} parameters, learning rate 0.0001" in caplog.text
    assert "trained: none" not in caplog.text


def test_missing_control_images_are_said_before_anything_is_loaded(tmp_path: Path) -> None:
    run = config(tmp_path)
    next((tmp_path / "controls").iterdir()).unlink()
    with pytest.raises(ValueError, match="1 photos have no control image"):
        train_dreambooth(run)
    assert not run.output.output_dir.exists()


def test_a_validation_image_of_another_shape_is_refused_before_training(tmp_path: Path) -> None:
    config(tmp_path)
    Image.new("RGB", (32, 16)).save(tmp_path / "wide.png")
    run = config(tmp_path, validation_prompt=["a cat"], validation_image=[str(tmp_path / "wide.png")])
    with pytest.raises(ValueError, match="crop it to the same proportions"):
        train_dreambooth(run)
    assert not run.output.output_dir.exists()
