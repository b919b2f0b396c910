"""Control images lie over their photos in every crop and mirror image, and all that is wrong is said."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from visit_sources import (
    FACTOR,
    NO_PRIOR,
    SIZE,
    assert_equal,
    encode_without_noise,
    fill_with_photos,
    source,
    uncached,
)

from ether_diffusion.training.batches import BatchSource
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.dataset import read_training_data

SIZES = [(96, 64), (64, 80), (128, 100)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Photos whose control images, beside them, are the photos themselves."""
    fill_with_photos(tmp_path / "photos", SIZES)
    (tmp_path / "controls").mkdir()
    for path in (tmp_path / "photos").glob("*.png"):
        shutil.copy(path, tmp_path / "controls")
    return DataConfig(instance_data_dir=tmp_path / "photos", random_flip=True)


def made(data: DataConfig, prior: PriorConfig | None = None, **control: Any) -> BatchSource:
    assert data.instance_data_dir is not None
    controls = data.instance_data_dir.parent / "controls"
    control = {"conditioning_data_dir": controls} | control
    made_control = ControlConfig(**control)
    return source(
        data,
        prior or NO_PRIOR,
        vae=encode_without_noise,
        effective_batch=3,
        num_samples=24,
        control=made_control,
    )


def test_a_control_image_is_cropped_and_mirrored_with_its_photo(data: DataConfig) -> None:
    built = made(data.replace(image_interpolation_mode="bilinear"))
    for samples in (range(3), range(9, 12), range(21, 24)):
        batch = built.batch(list(samples))
        assert batch.controls is not None
        assert batch.controls.shape == (3, 3, SIZE, SIZE)
        # the stand-in VAE doubles the mean of each area of the photo in [-1, 1]
        means = torch.nn.functional.avg_pool2d(batch.controls, FACTOR) * 2 - 1
        torch.testing.assert_close(batch.latents[:, :3] / 2, means, atol=1e-5, rtol=1e-5)


def test_cached_and_uncached_batches_are_the_same_bit_for_bit(data: DataConfig) -> None:
    data = data.replace(center_crop=True)  # else the cache has a few of the crops, and loading any
    cached, loaded = made(data), made(uncached(data))
    for start in (0, 6, 18):
        assert_equal(cached.batch([start, start + 1]), loaded.batch([start, start + 1]))


def test_control_is_dropped_for_its_share_of_samples_each_time_the_same_ones(data: DataConfig) -> None:
    def strengths(dropout: float) -> list[float]:
        built = made(data, control_dropout=dropout)
        found = [built.batch([sample]).control_strengths for sample in range(24)]
        return [float(one.item()) for one in found if one is not None]

    assert strengths(0.0) == [1.0] * 24
    assert strengths(1.0) == [0.0] * 24
    assert 0 < sum(strengths(0.5)) < 24
    assert strengths(0.5) == strengths(0.5)


def test_rows_of_a_frozen_prior_follow_no_control(data: DataConfig) -> None:
    prior = PriorConfig(prior_preservation="frozen", class_prompt="a dog")
    batch = made(data, prior).batch([0, 1])
    assert batch.control_strengths is not None
    assert batch.control_strengths.tolist() == [1, 1, 0, 0]


def test_class_images_have_no_control(data: DataConfig, tmp_path: Path) -> None:
    fill_with_photos(tmp_path / "class", [(64, 64)])
    prior = PriorConfig(
        prior_preservation="class_images", class_data_dir=tmp_path / "class", class_prompt="a dog"
    )
    batch = made(data, prior).batch([0, 1])
    assert batch.control_strengths is not None
    assert batch.controls is not None
    assert batch.control_strengths.tolist() == [1, 1, 0, 0]
    assert batch.controls[2:].abs().max() == 0


def test_without_control_a_batch_has_none(data: DataConfig) -> None:
    batch = source(data).batch([0])
    assert batch.controls is None
    assert batch.control_strengths is None


def test_the_colours_of_a_palette_are_never_blended(data: DataConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "controls").glob("*.png"):
        with Image.open(path) as image:
            width, height = image.size
        values = np.zeros((height, width, 3), np.uint8)
        values[:, : width // 2] = (255, 128, 0)
        Image.fromarray(values).save(path)

    def colours(**control: Any) -> set[tuple[float, ...]]:
        batch = made(data, **control).batch([0, 1, 2])
        assert batch.controls is not None
        pixels = (batch.controls * 255).round().permute(0, 2, 3, 1).reshape(-1, 3)
        return {tuple(colour) for colour in pixels.tolist()}

    assert colours(control_type="palette") <= {(255.0, 128.0, 0.0), (0.0, 0.0, 0.0)}
    assert len(colours()) > 2


def test_control_images_are_part_of_what_was_trained_on(data: DataConfig, tmp_path: Path) -> None:
    before = made(data).fingerprint()
    assert {name for name in before if "control" in name} == {f"control image of {n}.png" for n in range(3)}
    Image.new("RGB", SIZES[1]).save(tmp_path / "controls" / "1.png")
    assert made(data).fingerprint() != before


def test_all_that_is_wrong_with_control_images_is_said_at_once(data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "controls"
    (folder / "0.png").unlink()
    Image.new("RGB", (300, 64)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        read_training_data(data, control=ControlConfig(conditioning_data_dir=folder))
    message = str(caught.value)
    assert "1 photos have no control image in" in message
    assert "the control image 1.png has 300 × 64 px, and its photo 64 × 80 px" in message
    assert "the control image 2.png" in message


@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "P"])
def test_control_images_of_other_modes_are_made_rgb(data: DataConfig, tmp_path: Path, mode: str) -> None:
    for path in (tmp_path / "controls").glob("*.png"):
        with Image.open(path) as image:
            converted = image.convert(mode)
        converted.save(path)
    batch = made(data).batch([0])
    assert batch.controls is not None
    assert batch.controls.shape == (1, 3, SIZE, SIZE)
