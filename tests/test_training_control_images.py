"""Control images lie over their photos in every crop and mirror image, wherever they come from.

They are of a folder, of a data set's rows, in palettes' colours, or detected; all that is wrong is said.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import photo_files
import pytest
import torch
from photo_batches import (
    FACTOR,
    NO_PRIOR,
    SIZE,
    assert_equal,
    encode_without_noise,
    fill_with_photos,
    ramp,
    source,
    uncached,
)
from PIL import Image

from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world.world import PALETTE
from ether_diffusion.training.batches import BatchSource
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.dataset import read_training_data
from ether_diffusion.training.photos import PhotoFolder
from ether_diffusion.training.validation import validation_controls
from recipes.tiny_world.control_pairs import sample_pairs, training_concepts, write_pairs

COLUMN = "conditioning_image"


def rows_of(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(dataset_name=str(folder), caption_column="text", **options)


def write_rows(folder: Path, *rows: Mapping[str, Json]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, each its own control image, as a data set: diffusers' column names."""
    pairs = tmp_path / "pairs"
    fill_with_photos(pairs, [(80, 70), (64, 64), (96, 64)])
    (pairs / "maps").mkdir()
    for number in range(3):
        (pairs / f"{number}.txt").unlink()
        shutil.copy(pairs / f"{number}.png", pairs / "maps")
    names = [(f"{number}.png", f"photo {number}") for number in range(3)]
    maps = f"{COLUMN}_file_name"
    write_rows(pairs, *({"file_name": name, maps: f"maps/{name}", "text": text} for name, text in names))
    return pairs


def paired(data: DataConfig, **control: Any) -> PhotoFolder:
    made = ControlConfig(**control)
    without = [] if made.conditioning_data_dir is None else [made.conditioning_data_dir]
    return read_training_data(data, control=made, without=without)


def made(data: DataConfig, prior: PriorConfig = NO_PRIOR, **control: Any) -> BatchSource:
    with_control = ControlConfig(**control)
    return source(
        data, prior, vae=encode_without_noise, effective_batch=3, num_samples=24, control=with_control
    )


def refusal(data: DataConfig, **control: Any) -> str:
    with pytest.raises(ValueError, match="cannot be used") as caught:
        paired(data, **control)
    return str(caught.value)


def test_rows_pair_photos_with_images_or_their_names_and_captions(folder: Path) -> None:
    found = paired(rows_of(folder))
    assert [each.prompt for each in found.photos] == ["photo 0", "photo 1", "photo 2"]
    for each in found.photos:
        assert each.control is not None
        with Image.open(folder / each.name) as photo:
            assert each.control.decode() == photo.convert("RGB")
        assert f"control image of {each.name}" in found.fingerprint
    rows = [(f"{n}.png", f"photo {n}") for n in range(3)]
    write_rows(folder, *({"file_name": name, COLUMN: f"maps/{name}", "text": text} for name, text in rows))
    assert paired(rows_of(folder)).fingerprint == found.fingerprint


def test_a_data_set_that_holds_the_bytes_gives_the_same_pairs(folder: Path, tmp_path: Path) -> None:
    import datasets

    image, text = datasets.Image(), datasets.Value("string")
    images = [{"bytes": (folder / f"{number}.png").read_bytes(), "path": None} for number in range(3)]
    values = {"image": images, COLUMN: images, "text": [f"photo {number}" for number in range(3)]}
    features = datasets.Features({"image": image, COLUMN: image, "text": text})
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
    from_bytes, from_files = paired(rows_of(tmp_path / "rows")), paired(rows_of(folder))
    for one, other in zip(from_bytes.photos, from_files.photos, strict=True):
        assert one.control is not None
        assert other.control is not None
        assert (one.prompt, one.control.decode()) == (other.prompt, other.control.decode())


def test_tiny_worlds_pairs_are_such_a_data_set(tmp_path: Path) -> None:
    pairs = sample_pairs(training_concepts(), 3, control_type="palette")
    write_pairs(pairs, tmp_path / "pairs", size=128)
    found = paired(rows_of(tmp_path / "pairs"), control_type="palette", palette="tiny_world")
    assert [each.prompt for each in found.photos] == [pair.caption for pair in pairs]


def test_all_pairs_that_cannot_be_used_are_said_at_once(folder: Path) -> None:
    Image.new("RGB", (300, 64)).save(folder / "maps" / "1.png")
    (folder / "maps" / "2.png").write_bytes(b"no picture")
    (folder.parent / "secret.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "3.png").write_bytes(photo_files.photo(3))
    names = {"0.png": "maps/none.png", "1.png": "maps/1.png", "2.png": "maps/2.png", "3.png": "../secret.png"}
    write_rows(folder, *({"file_name": name, COLUMN: image, "text": "a"} for name, image in names.items()))
    said = refusal(rows_of(folder))
    for sentence in (
        "1 photos have no control image: 0.png; looked in the column conditioning_image of",
        "the control image of 1.png has 300 × 64 px, and its photo 64 × 64 px",
        "the control image of 2.png is no image",
        f"the control image of 3.png is a link to {folder.parent}/secret.png, outside the folder",
    ):
        assert sentence in said


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("map", 'conditioning_image_column="map" is no column of'),
        ("number", "the column number of .* holds neither images nor names of files"),
    ],
)
def test_a_column_without_images_is_refused(folder: Path, column: str, words: str) -> None:
    write_rows(folder, {"file_name": "0.png", "number": 3, "text": "a"})
    with pytest.raises(ValueError, match=words):
        paired(rows_of(folder), conditioning_image_column=column)


def test_control_images_of_no_photo_are_said_or_refused(folder: Path) -> None:
    maps = folder / "maps"
    Image.new("RGB", (64, 64)).save(maps / "lonely.png")
    (folder / "metadata.jsonl").unlink()
    plain = DataConfig(instance_data_dir=folder, instance_prompt="x")
    sentence = "1 control images in maps belong to no usable photo and are not used: lonely.png"
    assert sentence in paired(plain, conditioning_data_dir=maps).warnings
    assert sentence in refusal(plain.replace(strict=True), conditioning_data_dir=maps)
    some = paired(plain.replace(strict=True, max_train_samples=2), conditioning_data_dir=maps)
    assert len(some.photos) == 2


def test_some_of_the_rows_are_trained_on_and_of_several_captions_the_first(folder: Path) -> None:
    names = [[each.name for each in paired(rows_of(folder, max_train_samples=n)).photos] for n in (2, 2, 9)]
    assert [len(some) for some in names] == [2, 2, 3]
    assert names[0] == names[1] == sorted(names[0])
    write_rows(folder, {"file_name": "0.png", f"{COLUMN}_file_name": "maps/0.png", "text": ["one", "two"]})
    found = paired(rows_of(folder))
    assert [each.prompt for each in found.photos] == ["one"]
    assert "the column text holds lists of captions; the first of each is used" in found.warnings


# palettes


def write_map(path: Path, difference: int) -> None:
    values = np.zeros((64, 64, 3), np.uint8)
    values[:32], values[32:] = PALETTE["animal"], PALETTE["pattern"]
    Image.fromarray(values - np.array([difference, 0, 0], np.uint8)).save(path)


def test_a_map_is_held_to_its_palette_or_to_few_colours(tmp_path: Path) -> None:
    fill_with_photos(tmp_path / "photos", [(64, 64)])
    (tmp_path / "maps").mkdir()
    image, photos = tmp_path / "maps" / "0.png", DataConfig(instance_data_dir=tmp_path / "photos")
    control: dict[str, Any] = {"conditioning_data_dir": tmp_path / "maps", "control_type": "palette"}
    found = []
    for difference in (0, 5):  # colours near the palette's are trained as its own
        write_map(image, difference)
        found.append(made(photos, palette="tiny_world", **control).batch([0, 1]).controls)
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])
    write_map(image, 40)
    paired(photos, **control)
    off = "has 2 colours off the palette of Tiny World, in 4096 of 4096 px"
    assert f"the control image of 0.png {off}" in refusal(photos, palette="tiny_world", **control)
    (tmp_path / "p.json").write_text('{"sky": [0, 0, 1], "sea": [0, 1, 200]}')
    own = refusal(photos, palette=str(tmp_path / "p.json"), **control)
    assert f"has 2 colours off the palette {tmp_path / 'p.json'}, in 4096 of 4096 px" in own
    absent = refusal(photos, palette=str(tmp_path / "none.json"), **control)
    assert "none.json does not exist" in absent
    validation = ControlConfig(
        control_type="palette", palette="tiny_world", validation_image=(str(image),)
    )  # a validation image is held to it, too
    with pytest.raises(ValueError, match=rf"validation_image .*0\.png: {off}"):
        validation_controls(validation, (64, 64))
    Image.fromarray(photo_files.noise(64, 64)).save(image)
    assert "has more than 1024 colours, and each would be a class" in refusal(photos, **control)


# detectors


@pytest.fixture
def photos(tmp_path: Path) -> DataConfig:
    """Photos at the size of training whose subject, a square, is cut out."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        layer, alpha = Image.fromarray(ramp(96, 64)).convert("RGBA"), Image.new("L", (96, 64))
        alpha.paste(255, (20 + 10 * number, 16, 60, 48))
        layer.putalpha(alpha)
        layer.save(tmp_path / "photos" / f"{number}.png")
    return DataConfig(instance_data_dir=tmp_path / "photos", instance_prompt="a square", random_flip=True)


def test_a_detected_silhouette_lies_over_its_photo_in_every_crop_and_mirror_image(photos: DataConfig) -> None:
    batch = made(photos, detector="silhouette").batch(range(12))
    assert batch.controls is not None
    # blue is white (the background) outside, and 0 on the ramp: the stand-in VAE doubles means in [-1, 1]
    inside = (1 - batch.latents[:, 2] / 2) / 2
    shares = torch.nn.functional.avg_pool2d(batch.controls[:, :1], 4)[:, 0]
    torch.testing.assert_close(shares, inside, atol=1e-5, rtol=0)
    assert batch.control_strengths is not None
    assert batch.control_strengths.tolist() == [1] * 12


def test_detected_edges_are_opencvs_of_the_photo_at_the_size_of_training(tmp_path: Path) -> None:
    picture = Image.fromarray(photo_files.noise(8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "0.png")
    data = DataConfig(instance_data_dir=tmp_path, instance_prompt="x")
    batch = made(data, detector="canny", canny_low_threshold=40.0, canny_high_threshold=80.0).batch([0])
    expected = cv2.Canny(np.asarray(picture), 40, 80)
    assert batch.controls is not None
    assert expected.any()
    assert np.array_equal((batch.controls[0] * 255).numpy().astype(np.uint8), np.stack([expected] * 3))


def test_opaque_photos_have_no_silhouette_and_are_named(photos: DataConfig) -> None:
    assert photos.instance_data_dir is not None
    Image.new("RGB", (64, 64)).save(photos.instance_data_dir / "plain.png")
    said = refusal(photos, detector="silhouette")
    assert "detector=silhouette: 1 of 3 photos have no transparent parts: plain.png" in said


def test_a_validation_image_of_a_detector_is_a_photo(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 0, 255), (8, 8, 24, 24))
    layer.save(tmp_path / "drawn.png")
    control = ControlConfig(detector="silhouette", validation_image=(str(tmp_path / "drawn.png"),))
    (found,) = validation_controls(control, (32, 32))
    assert found.shape == (1, 3, 32, 32)
    assert found[0, 0].sum() == 256
    assert found[0, :, 8:24, 8:24].min() == 1


# over their photos


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Photos whose control images, beside them, are the photos themselves."""
    fill_with_photos(tmp_path / "photos", [(96, 64), (64, 80), (128, 100)])
    (tmp_path / "controls").mkdir()
    for path in (tmp_path / "photos").glob("*.png"):
        shutil.copy(path, tmp_path / "controls")
    return DataConfig(instance_data_dir=tmp_path / "photos", random_flip=True)


def overlaid(data: DataConfig, prior: PriorConfig = NO_PRIOR, **control: Any) -> BatchSource:
    assert data.instance_data_dir is not None
    controls = data.instance_data_dir.parent / "controls"
    return made(data, prior, **{"conditioning_data_dir": controls, **control})


def test_a_control_image_is_cropped_and_mirrored_with_its_photo(data: DataConfig) -> None:
    batch = overlaid(data.replace(image_interpolation_mode="bilinear")).batch(range(24))
    assert batch.controls is not None
    assert batch.controls.shape == (24, 3, SIZE, SIZE)
    # the stand-in VAE doubles the mean of each area of the photo in [-1, 1]
    means = torch.nn.functional.avg_pool2d(batch.controls, FACTOR) * 2 - 1
    torch.testing.assert_close(batch.latents[:, :3] / 2, means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detector", [None, "canny"])
def test_cached_and_uncached_batches_are_the_same_bit_for_bit(data: DataConfig, detector: str | None) -> None:
    data = data.replace(center_crop=True)  # else the cache has a few of the crops, and loading any
    given: dict[str, Any] = {"detector": detector, "conditioning_data_dir": None} if detector else {}
    cached, loaded = overlaid(data, **given), overlaid(uncached(data), **given)
    assert_equal(cached.batch(range(0, 24, 5)), loaded.batch(range(0, 24, 5)))


@pytest.mark.parametrize("mode", ["none", "frozen", "class_images"])
def test_rows_of_a_prior_follow_no_control(data: DataConfig, tmp_path: Path, mode: Any) -> None:
    plain = source(data).batch([0])
    assert plain.controls is None
    assert plain.control_strengths is None
    fill_with_photos(tmp_path / "class", [(64, 64)])
    prior = PriorConfig(prior_preservation=mode, class_data_dir=tmp_path / "class", class_prompt="a dog")
    batch = overlaid(data, prior).batch([0, 1])
    assert batch.control_strengths is not None
    assert batch.controls is not None
    assert batch.control_strengths.tolist() == ([1, 1] if mode == "none" else [1, 1, 0, 0])
    if mode == "class_images":
        assert batch.controls[2:].abs().max() == 0


def test_control_is_dropped_for_its_share_of_samples_each_time_the_same_ones(data: DataConfig) -> None:
    def strengths(dropout: float) -> list[float]:
        found = overlaid(data, control_dropout=dropout).batch(range(24)).control_strengths
        assert found is not None
        return [float(one) for one in found]

    assert strengths(0.0) == [1.0] * 24
    assert strengths(1.0) == [0.0] * 24
    assert 0 < sum(strengths(0.5)) < 24
    assert strengths(0.5) == strengths(0.5)


def test_the_colours_of_a_palette_are_never_blended(data: DataConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "controls").glob("*.png"):
        with Image.open(path) as image:
            values = np.zeros((image.height, image.width, 3), np.uint8)
        values[:, : values.shape[1] // 2] = (255, 128, 0)
        Image.fromarray(values).save(path)

    def colours(**control: Any) -> set[tuple[float, ...]]:
        batch = overlaid(data, **control).batch([0, 1, 2])
        assert batch.controls is not None
        pixels = (batch.controls * 255).round().permute(0, 2, 3, 1).reshape(-1, 3)
        return {tuple(colour) for colour in pixels.tolist()}

    assert colours(control_type="palette") <= {(255.0, 128.0, 0.0), (0.0, 0.0, 0.0)}
    assert len(colours()) > 2
