"""The study of blocks and sides trains what it says, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest

from ether_diffusion.adapters import read_adapter
from research.study_blocks import VARIANTS, main, plan

SHORT = ["--subjects", "fox", "--steps", "1", "--inference_steps", "1", "--blocks", "8"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    assert main([*SHORT, "--output_dir", str(folder)]) == 0
    return folder


def test_every_variant_is_trained_with_its_blocks_and_sides(study: Path) -> None:
    for training in plan([8], ["fox"], [0], 1):
        config = read_adapter(study / training.folder / "adapter").config
        asked = VARIANTS[str(training.asked["variant"])]
        assert (config.variant, config.sides) == (asked["adapter"], asked["sides"])
        assert config.num_blocks == 8


def test_its_numbers_and_plot_are_written(study: Path) -> None:
    found = json.loads((study / "blocks.json").read_text())
    assert {name: set(row) for name, row in found["variants"].items()} == {name: {"8"} for name in VARIANTS}
    assert found["variants"]["ETHER"]["8"]["object"]["num_values"] == 1
    assert (study / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_not_measured_again(study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.rglob("scores.json")}
    assert main([*SHORT, "--output_dir", str(study)]) == 0
    assert {path: path.stat().st_mtime_ns for path in study.rglob("scores.json")} == before


def test_other_settings_in_the_same_folder_are_one_sentence(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, "--steps", "3", "--output_dir", str(study)]) == 2
    assert "other settings" in capsys.readouterr().err


def test_an_unknown_subject_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--subjects", "gorilla", "--output_dir", str(tmp_path / "blocks")]) == 2
    assert "gorilla" in capsys.readouterr().err
    assert not (tmp_path / "blocks").exists()
