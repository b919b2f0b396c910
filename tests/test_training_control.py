"""The loop of DreamBooth trains a control encoder beside the adapter, resumes it, and writes both."""

import json
import shutil
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
from ether_diffusion.options import OptionsError
from ether_diffusion.pipelines import EtherControlPipeline
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import ControlRunConfig, DreamBoothConfig
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


def test_a_run_leaves_an_adapter_and_an_encoder_that_load_together(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    unet = open_base(tmp_path / "base").load_denoiser()
    loaded = load_control(unet, folder)
    assert loaded.report is not None
    assert loaded.report.base_match == "same"
    assert loaded.encoder.config.control_type == "gray"


def test_the_encoder_learns(tmp_path: Path) -> None:
    encoder, fresh = read_control(trained(tmp_path)), fresh_encoder(tmp_path)
    assert fresh.conv_out.weight.abs().max() == 0
    assert encoder.conv_out.weight.abs().max() > 0
    assert not torch.equal(encoder.conv_in.weight, fresh.conv_in.weight)


def test_the_encoder_moves_at_its_own_rate(tmp_path: Path) -> None:
    # Adam's first step moves every number by its learning rate, where its gradient is no noise
    folder = trained(tmp_path, max_train_steps=1, control_learning_rate=3e-5, learning_rate=1e-3)
    encoder = read_control(folder)
    assert encoder.conv_out.weight.abs().max().item() == pytest.approx(3e-5, rel=1e-3)


def test_control_dropped_always_teaches_the_encoder_nothing(tmp_path: Path) -> None:
    encoder, fresh = read_control(trained(tmp_path, control_dropout=1.0)), fresh_encoder(tmp_path)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_another_control_image_gives_another_result(tmp_path: Path) -> None:
    one = load_file(trained(tmp_path) / "adapter_model.safetensors")
    for path in (tmp_path / "controls").iterdir():
        with Image.open(path) as image:
            image.rotate(180).save(path)
    other = load_file(trained(tmp_path, output_dir=str(tmp_path / "other")) / "adapter_model.safetensors")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    cut = trained(tmp_path, output_dir=str(tmp_path / "cut"))
    before = training_runs.trained_files(cut)
    for name in ("adapter_model.safetensors", ENCODER, "control_config.json", "adapter_config.json"):
        (cut / name).unlink()
    shutil.rmtree(cut / "checkpoint-4")
    assert train_dreambooth(config(tmp_path, output_dir=str(cut))) == 0
    assert training_runs.trained_files(cut) == before == training_runs.trained_files(whole)


@pytest.mark.parametrize(
    "flags", [{"use_ema": True}, {"gradient_checkpointing": True}, {"random_flip": True}]
)
def test_other_options_hold_with_control(tmp_path: Path, flags: dict[str, Json]) -> None:
    assert read_control(trained(tmp_path, **flags)).conv_out.weight.abs().max() > 0


def test_recomputed_activations_give_the_same_encoder(tmp_path: Path) -> None:
    plain = load_file(trained(tmp_path) / ENCODER)
    spared = trained(tmp_path, gradient_checkpointing=True, output_dir=str(tmp_path / "spared"))
    for name, tensor in load_file(spared / ENCODER).items():
        torch.testing.assert_close(tensor, plain[name])


def test_an_sdxl_base_learns_control_too(tmp_path: Path) -> None:
    training_runs.write_base(tmp_path / "base", is_xl=True)
    assert read_control(trained(tmp_path)).conv_out.weight.abs().max() > 0


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # what BOFT says of kernels that are not there
@pytest.mark.parametrize("method", ["lora", "oft", "hra", "delora", "boft"])
def test_other_methods_train_the_encoder_beside_them_and_load(tmp_path: Path, method: str) -> None:
    folder = trained(tmp_path, adapter=method, max_train_steps=2)
    saved = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    said = json.loads((folder / "control_config.json").read_text())["adapter_sha256"]
    assert said == content_hash(saved)
    unet = open_base(tmp_path / "base").load_denoiser()
    loaded = load_control(unet, folder)
    assert loaded.report is not None
    assert loaded.report.base_match == "same"
    assert loaded.encoder.conv_out.weight.abs().max() > 0
    found = adapter_tensors(unet, "control")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", ["ether_plus", "lora", "oft", "hra", "delora", "boft", "none"])
def test_the_loaded_pipeline_draws_the_last_validation_images(tmp_path: Path, method: str) -> None:
    config(tmp_path)
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    image.save(tmp_path / "drawn.png")
    flags: dict[str, Json] = {
        "adapter": method,
        "validation_prompt": ["a cat"],
        "validation_image": [str(tmp_path / "drawn.png")],
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "validation_guidance_scale": 3.0,
        "max_train_steps": 2,
        "learning_rate": 0.01,
    }
    folder = trained(tmp_path, **flags)
    pipe = EtherControlPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control_weights(folder)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 8, "height": 8, "seed": 0}
    found = pipe("a cat", control_image=image, **options).images[0]
    with Image.open(folder / "samples" / "final" / "prompt-00_seed-0.png") as last:
        expected = np.asarray(last.convert("RGB"))
    assert np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("method", ["ether_plus", "lora", "none"])
def test_the_card_shows_how_to_load_adapter_and_encoder(tmp_path: Path, method: str) -> None:
    training_runs.write_base(tmp_path / "base", is_xl=method == "none")
    folder = trained(tmp_path, adapter=method, max_train_steps=1)
    card = (folder / "README.md").read_text()
    name = "EtherControlXLPipeline" if method == "none" else "EtherControlPipeline"
    assert f"pipe = {name}.from_pretrained(" in card
    assert "pipe.load_control_weights(" in card
    assert "load_ether" not in card
    assert "PeftModel" not in card
    code = card.partition("```python\n")[2].partition("\n```")[0]
    place = tmp_path / "control.png"
    Image.new("RGB", (16, 16)).save(place)
    code = code.replace("path or Hub id of this adapter", str(folder)).replace('("base")', "(base)")
    code = code.replace("control image, of the proportions of the picture", str(place))
    names: dict[str, Any] = {"base": tmp_path / "base"}
    exec(code.replace("control_image=where", "control_image=where, num_inference_steps=1"), names)
    assert names["picture"].size == (8, 8)


def test_encoder_only_trains_and_saves_the_encoder_alone(tmp_path: Path) -> None:
    folder = trained(tmp_path, adapter="none")
    assert read_control(folder).conv_out.weight.abs().max() > 0
    assert not (folder / "adapter_config.json").exists()
    assert not (folder / "adapter_model.safetensors").exists()
    unet = open_base(tmp_path / "base").load_denoiser()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    loaded = load_control(unet, folder)
    assert loaded.report is None
    after = unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_encoder_only_that_was_cut_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = trained(tmp_path, adapter="none")
    cut = trained(tmp_path, adapter="none", output_dir=str(tmp_path / "cut"))
    before = training_runs.trained_files(cut)
    (cut / ENCODER).unlink()
    shutil.rmtree(cut / "checkpoint-4")
    assert train_dreambooth(config(tmp_path, adapter="none", output_dir=str(cut))) == 0
    assert training_runs.trained_files(cut) == before == training_runs.trained_files(whole)
    assert ENCODER in before


@pytest.mark.parametrize("adapter", ["ether_plus", "none"])
def test_a_validation_before_the_first_step_shows_the_base_bit_for_bit(tmp_path: Path, adapter: str) -> None:
    config(tmp_path)
    image = tmp_path / "drawn.png"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(image)
    flags: dict[str, Json] = {
        "adapter": adapter,
        "validation_prompt": ["a cat"],
        "validation_image": [str(image)],
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "max_train_steps": 2,
    }
    samples, name = trained(tmp_path, **flags) / "samples", "prompt-00_seed-0.png"
    base, first = ((samples / folder / name).read_bytes() for folder in ("base", "step-000000"))
    assert base == first


def test_a_rehearsal_counts_the_encoders_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert train_dreambooth(config(tmp_path, adapter="none"), dry_run=True) == 0
    count = sum(parameter.numel() for parameter in fresh_encoder(tmp_path).parameters())
    assert f"the encoder of control images, {count:,} parameters, learning rate 0.0001" in caplog.text
    assert "trained: none" not in caplog.text


def test_encoder_only_has_no_text_encoder_to_adapt() -> None:
    values: dict[str, Json] = {"instance_data_dir": "photos", "conditioning_data_dir": "maps"}
    with pytest.raises(OptionsError, match=r"adapter=none trains the encoder .* train_text_encoder"):
        ControlRunConfig.from_flat({**values, "adapter": "none", "train_text_encoder": True})


def test_encoder_only_is_nothing_for_a_subject() -> None:
    with pytest.raises(OptionsError, match=r"adapter=none .* nothing is trained; choose a method"):
        DreamBoothConfig.from_flat({"instance_data_dir": "photos", "adapter": "none"})


def test_a_subject_run_without_control_writes_no_encoder(tmp_path: Path) -> None:
    run = training_runs.config(tmp_path)
    assert train_dreambooth(run) == 0
    assert not (run.output.output_dir / ENCODER).exists()


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    values = {"instance_data_dir": "photos", "conditioning_data_dir": "maps"}
    rates = {}
    for adapter in ("ether", "ether_plus", "oft"):
        made = ControlRunConfig.from_flat({**values, "adapter": adapter}).resolved()
        rates[adapter] = made.optimization.learning_rate
        assert made.adapter.target_modules == "attention_and_feedforward"
        assert made.control.control_learning_rate == 1e-4
    assert rates == {"ether": 1e-3, "ether_plus": 1e-3, "oft": 1e-5}
    assert DreamBoothConfig.from_flat({"instance_data_dir": "photos"}).learning_rate == 6e-3


def test_the_settings_of_a_run_are_read_back_as_they_were(tmp_path: Path) -> None:
    run = config(tmp_path, max_train_steps=1)
    assert train_dreambooth(run) == 0
    saved = read_config_file(run.output.output_dir / "training_config.yaml")
    assert ControlRunConfig.from_flat(saved).resolved() == run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"conditioning_data_dir": None}, "there is nothing to follow"),
        ({"control_learning_rate": 2e-4}, "control_learning_rate=0.0002 is out of range"),
        ({"control_dropout": 1.5}, "control_dropout=1.5 is out of range"),
        ({"control_type": "a b"}, "control_type='a b' is no name"),
        ({"validation_prompt": ["a cat"]}, "found 0 of validation_image and 1 of validation_prompt"),
        ({"conditioning_data": "x"}, "did you mean conditioning_data_dir"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, flags: dict[str, Json], words: str) -> None:
    with pytest.raises(OptionsError, match=words):
        config(tmp_path, **flags)


def test_a_subject_run_knows_no_option_of_control() -> None:
    with pytest.raises(OptionsError, match="conditioning_data_dir"):
        DreamBoothConfig.from_flat({"instance_data_dir": "photos", "conditioning_data_dir": "maps"})


def test_missing_control_images_are_said_before_anything_is_loaded(tmp_path: Path) -> None:
    run = config(tmp_path)
    next((tmp_path / "controls").iterdir()).unlink()
    with pytest.raises(ValueError, match="1 photos have no control image"):
        train_dreambooth(run)
    assert not run.output.output_dir.exists()


def test_validation_shows_control_base_and_result_side_by_side(tmp_path: Path) -> None:
    config(tmp_path)
    image = tmp_path / "drawn.png"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(image)
    flags: dict[str, Json] = {
        "validation_prompt": ["a cat"],
        "validation_image": [str(image)],
        "num_validation_images": 1,
        "validation_num_inference_steps": 2,
        "learning_rate": 0.1,
    }
    folder = trained(tmp_path, **flags) / "samples"
    name = "prompt-00_seed-0.png"
    with Image.open(folder / "control" / name) as shown:
        assert set(shown.convert("RGB").get_flattened_data()) == {(255, 0, 0)}
    plain = training_runs.config(tmp_path, **{k: v for k, v in flags.items() if k != "validation_image"})
    subject = DreamBoothConfig.from_flat(plain.flat() | {"output_dir": str(tmp_path / "plain")})
    assert train_dreambooth(subject) == 0
    of_base = [
        (root / "samples" / "base" / name).read_bytes() for root in (folder.parent, tmp_path / "plain")
    ]
    assert of_base[0] == of_base[1]  # the base sees no control
    assert (folder / "step-000004" / name).read_bytes() == (folder / "final" / name).read_bytes()
    assert (folder / "contact_sheet.png").is_file()


def test_a_validation_image_of_another_shape_is_refused_before_training(tmp_path: Path) -> None:
    config(tmp_path)
    Image.new("RGB", (32, 16)).save(tmp_path / "wide.png")
    run = config(tmp_path, validation_prompt=["a cat"], validation_image=[str(tmp_path / "wide.png")])
    with pytest.raises(ValueError, match="crop it to the same proportions"):
        train_dreambooth(run)
    assert not run.output.output_dir.exists()


def test_a_run_does_not_go_on_with_another_kind_of_control(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match="control_type"):
        train_dreambooth(config(tmp_path, control_type="other", max_train_steps=6))
