"""The study of photos and steps trains on as many as it says, and finds the fewest steps that are enough."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.metrics.likeness import Estimate, estimate
from research.study_photos import enough_steps, main, training

SHORT = ["--subjects", "panda", "--num_photos", "1", "3", "--steps", "1", "--inference_steps", "1"]


def row(**scores: tuple[float, float]) -> dict[int, Mapping[str, Estimate]]:
    return {
        int(steps[1:]): {"object": estimate([likeness], "a"), "tiny_t": estimate([prompt], "a")}
        for steps, (likeness, prompt) in scores.items()
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    assert main([*SHORT, "--output_dir", str(folder)]) == 0
    return folder


def test_a_run_sees_as_many_photos_as_it_says(study: Path) -> None:
    found = json.loads((study / "photos.json").read_text())
    for number in (1, 3):
        one = training(found["method"], found["learning_rate"], number, 1, "panda", 0)
        photos = study / one.folder / "photos"
        assert len(list(photos.glob("*.png"))) == number
        assert len((photos / "metadata.jsonl").read_text().splitlines()) == number


def test_its_numbers_and_plot_are_written(study: Path) -> None:
    found = json.loads((study / "photos.json").read_text())
    assert {number: set(cells) for number, cells in found["photos"].items()} == {"1": {"1"}, "3": {"1"}}
    assert set(found["photos"]["3"]["1"]) >= {
        "object",
        "tiny_i",
        "tiny_t",
        "recognised",
        "drift",
        "weight_distance",
    }
    assert found["enough_steps"] == {"1": 1, "3": 1}
    with Image.open(study / "photos.png") as plot:
        assert plot.format == "PNG"


def test_what_was_measured_is_not_measured_again(study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.rglob("scores.json")}
    assert len(before) == 3
    assert main([*SHORT, "--output_dir", str(study)]) == 0
    assert {path: path.stat().st_mtime_ns for path in study.rglob("scores.json")} == before


def test_the_fewest_steps_near_the_best_are_enough() -> None:
    assert enough_steps(row(s50=(0.10, 0.7), s100=(0.191, 0.7), s200=(0.20, 0.7)), 0.6) == 100
    assert enough_steps(row(s50=(0.10, 0.7), s100=(0.15, 0.7), s200=(0.40, 0.1)), 0.6) == 100
    assert enough_steps(row(s50=(0.10, 0.5)), 0.6) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--subjects", "gorilla"], "no concept is named 'gorilla'"),
        (["--method", "nothing"], "--method is one of"),
        (["--num_photos", "7"], "1 to 6 photos; asked for 7"),
    ],
)
def test_what_cannot_be_studied_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "photos")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "photos").exists()
