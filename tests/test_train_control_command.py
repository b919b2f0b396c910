"""`train-control` trains on a folder of Tiny World's pairs, and says what it cannot use."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import training_runs
from PIL import Image

from ether_diffusion.control import read_control
from ether_diffusion.scripts import train_control
from recipes.tiny_world.control_pairs import sample_pairs, training_concepts, write_pairs


def run(tmp_path: Path, *words: str) -> Path:
    """Train two steps on the tiny base, with these words of the command line; return the run's folder."""
    training_runs.write_base(tmp_path / "base")
    common = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
        "num_blocks": 2,
    }
    flags = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    assert train_control.main([*flags, *words, "--no-export_lora"]) == 0
    return tmp_path / "run"


def test_a_folder_of_pairs_becomes_an_adapter_and_an_encoder(tmp_path: Path) -> None:
    write_pairs(sample_pairs(training_concepts(), 3, control_type="silhouette"), tmp_path / "pairs")
    maps = tmp_path / "pairs" / "conditioning_images"
    words = ("--instance_data_dir", str(maps.parent), "--conditioning_data_dir", str(maps))
    encoder = read_control(run(tmp_path, *words, "--control_type", "silhouette"))
    assert encoder.config.control_type == "silhouette"
    assert encoder.conv_out.weight.abs().max() > 0


def test_the_folder_of_pairs_is_a_data_set_with_captions_and_a_palette(tmp_path: Path) -> None:
    write_pairs(sample_pairs(training_concepts(), 3, control_type="palette"), tmp_path / "pairs")
    folder = run(tmp_path, "--train_data_dir", str(tmp_path / "pairs"), "--palette", "tiny_world")
    assert read_control(folder).config.control_type == "palette"
    assert read_control(folder).conv_out.weight.abs().max() > 0


def test_a_detector_makes_pairs_of_photos_and_of_validation_images(tmp_path: Path) -> None:
    photos = training_runs.write_photos(tmp_path / "photos")
    photo = next(photos.glob("*.png"))
    folder = run(
        tmp_path,
        *("--instance_data_dir", str(photos), "--detector", "canny"),
        *("--validation_prompt", "a cat", "a dog", "--validation_image", str(photo)),
        *("--num_validation_images", "1", "--validation_num_inference_steps", "1"),
    )
    assert read_control(folder).config.control_type == "canny"
    with Image.open(photo) as image:
        small = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.LANCZOS))
    expected = cv2.Canny(small, 100, 200)
    for prompt in range(2):
        with Image.open(folder / "samples" / "control" / f"prompt-0{prompt}_seed-0.png") as shown:
            assert np.array_equal(np.asarray(shown.convert("L")), expected)


def test_all_that_is_wrong_with_pairs_is_said_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(sample_pairs(training_concepts(), 3, control_type="palette"), tmp_path / "pairs")
    maps = sorted((tmp_path / "pairs" / "conditioning_images").iterdir())
    Image.new("RGB", (64, 64), (1, 2, 3)).save(maps[0])
    Image.new("RGB", (64, 32), (255, 255, 255)).save(maps[1])
    words = ["--train_data_dir", str(tmp_path / "pairs"), "--palette", "tiny_world"]
    words += ["--pretrained_model_name_or_path", str(training_runs.write_base(tmp_path / "base"))]
    assert train_control.main([*words, "--output_dir", str(tmp_path / "run"), "--num_blocks", "2"]) == 2
    said = capsys.readouterr().err
    assert "has 1 colours off the palette of Tiny World, in 4096 of 4096 px: #010203 (4096 px)" in said
    assert "has 64 × 32 px, and its photo 64 × 64 px" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_without_control_images_it_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_control.main(["--instance_data_dir", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert found.startswith("train-control: there is nothing to follow; give conditioning_data_dir")
