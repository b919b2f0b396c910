"""Trackers beside the run's own log: what TensorBoard's files hold, and packages that are missing."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import config, log_of

from ether_diffusion.strict_json import Json
from ether_diffusion.training import processes
from ether_diffusion.training.run import train_dreambooth

DRAWN: dict[str, Json] = {
    "validation_prompt": ["a sks cat", "a dog"],
    "num_validation_images": 1,
    "validation_steps": 2,
    "validation_num_inference_steps": 1,
}


def events(folder: Path) -> EventAccumulator:
    """Read TensorBoard's files of a run as TensorBoard does."""
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    flags: dict[str, Json] = {
        "report_to": "tensorboard",
        "logging_dir": "diary",
        "tracker_project_name": "cats",
    }
    for num_steps in (2, 4):  # a run that goes on adds to what the tracker has
        assert train_dreambooth(config(folder, max_train_steps=num_steps, **(DRAWN | flags))) == 0
    return folder / "run"


def test_tensorboard_gets_the_numbers_of_the_log(run: Path) -> None:
    found = events(run / "diary" / "cats")
    log = log_of(run)
    for name in ("loss", "grad_norm", "learning_rate"):
        scalars = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in scalars] == [1, 2, 3, 4]
        assert [value for _, value in scalars] == pytest.approx([line[name] for line in log], rel=1e-6)


def test_tensorboard_gets_the_images_of_each_validation(run: Path, tmp_path: Path) -> None:
    found = events(run / "diary" / "cats")
    shown = found.Images("validation")
    assert [event.step for event in shown] == [0, 2, 4]
    for event in shown:
        (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
        files = sorted((run / "samples" / f"step-{event.step:06d}").iterdir())
        assert len(files) == 2
        beside = np.concatenate([pixels(path) for path in files], axis=1)
        assert np.array_equal(pixels(tmp_path / "shown.png"), beside)


def test_tensorboard_gets_the_settings(run: Path) -> None:
    *_, settings = sorted(
        (run / "diary" / "cats").rglob("hparams.yml"), key=lambda path: path.stat().st_mtime
    )
    text = settings.read_text()
    assert "max_train_steps: 4" in text
    assert "adapter: ether_plus" in text


def test_trackers_that_are_not_installed_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in processes.AVAILABLE:
        monkeypatch.setitem(processes.AVAILABLE, name, lambda: False)
    for name in ("wandb", "comet_ml"):
        with pytest.raises(ValueError, match=f"^report_to={name} needs the package .*; pip install .*$"):
            train_dreambooth(config(tmp_path, report_to=name))
    with pytest.raises(ValueError, match="report_to=all finds none of tensorboard, wandb"):
        train_dreambooth(config(tmp_path, report_to="all"))
    assert not (tmp_path / "run").exists()


class StandInTracker:
    """A tracker of accelerate's that takes numbers only, as Comet's."""

    name = "numbers"

    def __init__(self) -> None:
        self.logged: list[Any] = []


def test_a_tracker_that_takes_no_images_is_given_none(caplog: pytest.LogCaptureFixture) -> None:
    class Accelerator:
        trackers = (StandInTracker(),)

    with caplog.at_level(logging.WARNING):
        processes.track_images(Accelerator(), [[Image.new("RGB", (4, 4))]], 1)
    assert not caplog.records
