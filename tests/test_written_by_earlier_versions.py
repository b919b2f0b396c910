"""What version 0.1 wrote is read, with the values that it had when it was written."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from control_encoders import control_images
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd
from trained_adapters import inputs, predict
from training_runs import write_base

from ether_diffusion.adapters import load_any
from ether_diffusion.control import control_image_sha256, controlled, load_control
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.scripts import ether, train_dreambooth
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.files import read_config_file
from ether_diffusion.ui.studio import Studio

WRITTEN = Path(__file__).parent / "data" / "written_by_0_1"
SAID = load_file(WRITTEN / "predictions.safetensors")
SUBJECTS = ("ether", "ether_plus", "lora", "oft", "hra", "delora", "boft")
CONTROLS = {"control": "palette", "control_alone": "silhouette", "control_lora": None}


def agree(found: torch.Tensor, name: str) -> bool:
    """Say whether a prediction is the written one, as near as machines agree, and not the base's."""
    base = SAID["base/text" if name.endswith("/text") else "base"]
    assert not torch.allclose(SAID[name], base, rtol=0, atol=1e-2)
    return torch.allclose(found, SAID[name], rtol=0, atol=1e-4)


def test_the_base_is_the_one_that_the_files_were_written_on() -> None:
    torch.testing.assert_close(predict(tiny_sd(), None), SAID["base"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SUBJECTS)
def test_adapters_of_every_method_compute_what_they_did(name: str) -> None:
    pipe = tiny_sd()
    load_any(pipe, WRITTEN / "adapters" / name, require_same_base=True)
    assert agree(predict(pipe, None), name)


def test_the_text_encoders_adapter_computes_what_it_did() -> None:
    pipe = tiny_sd()
    load_any(pipe, WRITTEN / "adapters" / "ether_plus", require_same_base=True)
    with torch.no_grad():
        assert agree(pipe.text_encoder(inputs()["tokens"])[0], "ether_plus/text")


@pytest.mark.parametrize("name", CONTROLS)
def test_control_encoders_compute_what_they_did(name: str) -> None:
    pipe = tiny_sd()
    loaded = load_control(pipe, WRITTEN / "adapters" / name)
    with controlled(pipe.unet, loaded.encoder, control_images(2, side=8)):
        assert agree(predict(pipe, None), name)
    assert loaded.encoder.config.control_type == CONTROLS[name]
    assert (loaded.report is None) == (name == "control_alone")


@pytest.mark.parametrize("name", SUBJECTS)
def test_adapters_say_what_they_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ether.main(["inspect", str(WRITTEN / "adapters" / name), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == ({"unet", "text_encoder"} if name == "ether_plus" else {"unet"})
    unet = said["unet"]
    assert (unet["trigger"], unet["base_model"], unet["projections"]) == ("a photo of sks dog", "base", 32)


def test_the_run_goes_on_to_the_adapter_that_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(Path("base"))
    shutil.copytree(WRITTEN / "run", "run")
    shutil.copytree(WRITTEN / "photos", "photos")
    flags = ["--config", "run/training_config.yaml", "--max_train_steps", "6"]
    flags += ["--instance_data_dir", "photos", "--output_dir", "run"]
    assert train_dreambooth.main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (WRITTEN / "resumed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
    found, wanted = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "run", WRITTEN / "resumed")
    )
    begun = load_file(WRITTEN / "run" / "adapter_model.safetensors")
    assert any(not torch.allclose(wanted[key], begun[key], atol=1e-3) for key in wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "config.json",
            {
                "adapter": "ether",
                "num_blocks": 8,
                "learning_rate": 0.003,
                "max_train_steps": 12,
                "mixed_precision": "bf16",
                "validation_prompt": ["a", "b"],
                "snr_gamma": 5.0,
            },
        ),
        (
            "config.yaml",
            {
                "adapter": "ether",
                "num_blocks": 2,
                "learning_rate": 0.01,
                "max_train_steps": 4,
                "instance_prompt": "a photo of sks cat",
                "validation_prompt": ["a sks cat on a beach"],
                "checkpoints_total_limit": 1,
                "snr_gamma": None,
            },
        ),
    ],
)
def test_configurations_say_what_they_said(file: str, said: dict[str, Any]) -> None:
    flat = DreamBoothConfig.from_flat(read_config_file(WRITTEN / file)).flat()
    assert {name: flat[name] for name in said} == said


def test_pictures_say_how_they_were_made() -> None:
    said = read_image_metadata(WRITTEN / "picture.png")
    assert said is not None
    assert (said.prompt, said.negative_prompt) == ("a photo of sks dog: naïve, „quoted“", "rain")
    assert (said.seed, said.steps, said.width, said.height, said.base) == (5, 2, 8, 8, "base")
    (use,) = said.adapters
    assert (use.name, use.strength, sorted(use.sha256)) == ("ether_plus", 0.75, ["text_encoder", "unet"])
    shares = {
        path.stem: [use.strength for use in found.adapters]
        for path in (WRITTEN / "grid" / "pictures").glob("*.png")
        if (found := read_image_metadata(path)) is not None
    }
    assert shares == {
        "prompt1_seed5_ether0.5": [0.5],
        "prompt1_seed5_ether1": [1.0],
        "prompt1_seed5_base": [],
    }


def test_a_studio_has_its_adapters_pictures_and_runs(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "studio", tmp_path / "studio")
    for path in (tmp_path / "studio").rglob("*"):  # a checkout makes files new, as a run that goes on does
        os.utime(path, (1e9, 1e9))
    studio = Studio(tmp_path / "studio", base=str(write_base(tmp_path / "base")))
    try:
        cards = {card.name: card for card in studio.library.cards()}
        assert {name: (card.kind, card.fits_base) for name, card in cards.items()} == {
            "Füchslein": ("subject", True),
            "Maps": ("control", True),
            "Kätzchen": ("subject", True),
        }
        assert cards["Füchslein"].created.isoformat() == "2026-11-26T06:13:44.923835+00:00"
        (run,) = studio.runs.all()
        assert (run.name, run.state, run.step, run.library_id) == (
            "Kätzchen",
            "finished",
            2,
            cards["Kätzchen"].id,
        )
        drawn = [
            (said.prompt, said.seed, [use.name for use in said.adapters])
            for picture in studio.history.pictures()
            if (said := picture.metadata) is not None
        ]
        assert sorted(drawn) == [
            ("a sks dog", 3, []),
            ("a sks dog", 3, ["Füchslein"]),
            ("a street", 4, []),
            ("a street", 4, []),
        ]
        (sha256,) = {
            said.options["control_image_sha256"]
            for picture in studio.history.pictures()
            if (said := picture.metadata) is not None and "control_image_sha256" in said.options
        }
        image = studio.engine.outputs.find_control(str(sha256))
        assert image is not None
        assert control_image_sha256(image) == sha256
    finally:
        studio.close()
