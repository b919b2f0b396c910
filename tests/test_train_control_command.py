"""`train-control` trains on a folder of Tiny World's pairs, and says what it cannot use."""

from pathlib import Path

import pytest
import training_runs

from ether_diffusion.control import read_control
from ether_diffusion.scripts import train_control, train_dreambooth
from ether_diffusion.tiny_world.control import sample_pairs, training_concepts, write_pairs


def pairs(folder: Path) -> Path:
    write_pairs(sample_pairs(training_concepts(), 3, control_type="silhouette"), folder)
    return folder


def test_a_folder_of_pairs_becomes_an_adapter_and_an_encoder(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "pairs")
    training_runs.write_base(tmp_path / "base")
    arguments = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": folder,
        "conditioning_data_dir": folder / "conditioning_images",
        "control_type": "silhouette",
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
        "num_blocks": 2,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    assert train_control.main([*words, "--no-export_lora"]) == 0
    encoder = read_control(tmp_path / "run")
    assert encoder.config.control_type == "silhouette"
    assert encoder.conv_out.weight.abs().max() > 0


def test_without_control_images_it_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_control.main(["--instance_data_dir", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert found.startswith("train-control: there is nothing to follow; give conditioning_data_dir")


def test_its_help_has_the_flags_of_control_and_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_control.main(["--help"])
    assert stop.value.code == 0
    found = capsys.readouterr().out
    for flag in ("--conditioning_data_dir", "--control_type", "--control_dropout", "--learning_rate"):
        assert flag in found


def test_train_dreambooth_offers_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_dreambooth.main(["--help"])
    assert "conditioning_data_dir" not in capsys.readouterr().out
