"""Control images lie over their photos in every crop and mirror image, wherever they come from.

They are of a folder, of a data set's rows, in palettes' colours, or detected; all that is wrong is said.
"""

import json
import shutil
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
from ether_diffusion.training.control import validation_controls
from ether_diffusion.training.dataset import read_training_data
from ether_diffusion.training.photos import PhotoFolder
from recipes.tiny_world.control_pairs import sample_pairs, training_concepts, write_pairs

COLUMN = "conditioning_image"


def rows_of(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(dataset_name=str(folder), caption_column="text", **options)


def write_rows(folder: Path, rows: list[dict[str, Json]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, each its own control image, as a data set: diffusers' column names."""
    fill_with_photos(tmp_path / "pairs", [(80, 70), (64, 64), (96, 64)])
    (tmp_path / "pairs" / "maps").mkdir()
    rows: list[dict[str, Json]] = []
    for number in range(3):
        name = f"{number}.png"
        (tmp_path / "pairs" / f"{number}.txt").unlink()
        (tmp_path / "pairs" / "maps" / name).write_bytes((tmp_path / "pairs" / name).read_bytes())
        rows.append({"file_name": name, f"{COLUMN}_file_name": f"maps/{name}", "text": f"photo {number}"})
    write_rows(tmp_path / "pairs", rows)
    return tmp_path / "pairs"


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


def test_rows_pair_photos_with_images_and_captions(folder: Path) -> None:
    found = paired(rows_of(folder))
    assert [item.prompt for item in found.photos] == ["photo 0", "photo 1", "photo 2"]
    for item in found.photos:
        assert item.control is not None
        with Image.open(folder / item.name) as photo:
            assert item.control.decode() == photo.convert("RGB")
        assert f"control image of {item.name}" in found.fingerprint
    write_rows(
        folder, [{"file_name": f"{n}.png", COLUMN: f"maps/{n}.png", "text": f"photo {n}"} for n in range(3)]
    )
    assert paired(rows_of(folder)).fingerprint == found.fingerprint  # names of files do as well


def test_a_data_set_that_holds_the_bytes_gives_the_same_pairs(folder: Path, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), COLUMN: datasets.Image(), "text": datasets.Value("string")}
    )
    values: dict[str, list[object]] = {"image": [], COLUMN: [], "text": []}
    for number in range(3):
        data = {"bytes": (folder / f"{number}.png").read_bytes(), "path": None}
        values["image"].append(data)
        values[COLUMN].append(data)
        values["text"].append(f"photo {number}")
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
    from_bytes, from_files = paired(rows_of(tmp_path / "rows")), paired(rows_of(folder))
    assert [item.prompt for item in from_bytes.photos] == [item.prompt for item in from_files.photos]
    for one, other in zip(from_bytes.photos, from_files.photos, strict=True):
        assert one.control is not None
        assert other.control is not None
        assert one.control.decode() == other.control.decode()


def test_tiny_worlds_pairs_are_such_a_data_set(tmp_path: Path) -> None:
    pairs = sample_pairs(training_concepts(), 3, control_type="palette")
    write_pairs(pairs, tmp_path / "pairs", size=128)
    found = paired(rows_of(tmp_path / "pairs"), control_type="palette", palette="tiny_world")
    assert [item.prompt for item in found.photos] == [pair.caption for pair in pairs]


def test_all_pairs_that_cannot_be_used_are_said_at_once(folder: Path) -> None:
    Image.new("RGB", (300, 64)).save(folder / "maps" / "1.png")
    (folder / "maps" / "2.png").write_bytes(b"no picture")
    rows: list[dict[str, Json]] = [
        {"file_name": "0.png", COLUMN: "maps/none.png", "text": "a"},
        {"file_name": "1.png", COLUMN: "maps/1.png", "text": "b"},
        {"file_name": "2.png", COLUMN: "maps/2.png", "text": "c"},
    ]
    write_rows(folder, rows)
    said = refusal(rows_of(folder))
    assert "1 photos have no control image: 0.png; looked in the column conditioning_image of" in said
    assert "the control image of 1.png has 300 × 64 px, and its photo 64 × 64 px" in said
    assert "the control image of 2.png " in said
    (folder.parent / "secret.png").write_bytes((folder / "0.png").read_bytes())
    write_rows(folder, [{"file_name": "0.png", COLUMN: "../secret.png", "text": "a"}])
    assert "outside the folder" in refusal(rows_of(folder))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("map", 'conditioning_image_column="map" is no column of'),
        ("number", "the column number of .* holds neither images nor names of files"),
    ],
)
def test_a_column_without_images_is_refused(folder: Path, column: str, words: str) -> None:
    write_rows(folder, [{"file_name": "0.png", "number": 3, "text": "a"}])
    with pytest.raises(ValueError, match=words):
        paired(rows_of(folder), conditioning_image_column=column)


def test_control_images_of_no_photo_are_said_or_refused(folder: Path) -> None:
    maps = folder / "maps"
    Image.new("RGB", (64, 64)).save(maps / "lonely.png")
    for number in range(3):
        (folder / f"{number}.txt").write_text("x")
    (folder / "metadata.jsonl").unlink()
    plain = DataConfig(instance_data_dir=folder)
    sentence = "1 control images in maps belong to no usable photo and are not used: lonely.png"
    assert any(sentence in line for line in paired(plain, conditioning_data_dir=maps).warnings)
    strict = DataConfig(instance_data_dir=folder, strict=True)
    assert sentence in refusal(strict, conditioning_data_dir=maps)
    some = DataConfig(instance_data_dir=folder, strict=True, max_train_samples=2)
    assert len(paired(some, conditioning_data_dir=maps).photos) == 2


def test_some_of_the_rows_are_trained_on_and_of_several_captions_the_first(folder: Path) -> None:
    names = [[item.name for item in paired(rows_of(folder, max_train_samples=n)).photos] for n in (2, 2, 9)]
    assert len(names[0]) == 2
    assert names[0] == names[1] == sorted(names[0])
    assert len(names[2]) == 3
    write_rows(folder, [{"file_name": "0.png", f"{COLUMN}_file_name": "maps/0.png", "text": ["one", "two"]}])
    found = paired(rows_of(folder))
    assert [item.prompt for item in found.photos] == ["one"]
    assert "the column text holds lists of captions; the first of each is used" in found.warnings


# palettes


@pytest.fixture
def maps(tmp_path: Path) -> DataConfig:
    """A photo, and its map in two of Tiny World's colours."""
    fill_with_photos(tmp_path / "photos", [(64, 64)])
    (tmp_path / "maps").mkdir()
    write_map(tmp_path / "maps" / "0.png", 0)
    return DataConfig(instance_data_dir=tmp_path / "photos")


def write_map(path: Path, difference: int) -> None:
    values = np.zeros((64, 64, 3), np.uint8)
    values[:32], values[32:] = PALETTE["animal"], PALETTE["pattern"]
    Image.fromarray(values - np.array([difference, 0, 0], np.uint8)).save(path)


def palette_of(data: DataConfig, **control: Any) -> dict[str, Any]:
    assert data.instance_data_dir is not None
    folder = data.instance_data_dir.parent / "maps"
    return {"conditioning_data_dir": folder, "control_type": "palette", "palette": "tiny_world", **control}


def test_colours_near_the_palettes_are_trained_as_its_own(maps: DataConfig, tmp_path: Path) -> None:
    plain = made(maps, **palette_of(maps)).batch([0, 1])
    write_map(tmp_path / "maps" / "0.png", 5)
    near = made(maps, **palette_of(maps)).batch([0, 1])
    assert near.controls is not None
    assert plain.controls is not None
    assert torch.equal(near.controls, plain.controls)


def test_a_map_is_held_to_its_palette_or_to_few_colours(maps: DataConfig, tmp_path: Path) -> None:
    write_map(tmp_path / "maps" / "0.png", 40)
    paired(maps, **palette_of(maps, palette=None))
    off = "the control image of 0.png has 2 colours off the palette of Tiny World, in 4096 of 4096 px"
    assert off in refusal(maps, **palette_of(maps))
    (tmp_path / "p.json").write_text('{"sky": [0, 0, 1], "sea": [0, 1, 200]}')
    own = refusal(maps, **palette_of(maps, palette=str(tmp_path / "p.json")))
    assert f"has 2 colours off the palette {tmp_path / 'p.json'}, in 4096 of 4096 px" in own
    absent = refusal(maps, **palette_of(maps, palette=str(tmp_path / "none.json")))
    assert "none.json does not exist" in absent
    Image.fromarray(photo_files.noise(64, 64)).save(tmp_path / "maps" / "0.png")
    many = refusal(maps, **palette_of(maps, palette=None))
    assert "has more than 1024 colours, and each would be a class" in many


def test_a_validation_image_is_held_to_the_palette_too(tmp_path: Path) -> None:
    write_map(tmp_path / "off.png", 40)
    control = ControlConfig(
        control_type="palette", palette="tiny_world", validation_image=(str(tmp_path / "off.png"),)
    )
    with pytest.raises(ValueError, match=r"validation_image .*off\.png: has 2 colours off the palette"):
        validation_controls(control, (64, 64))


# detectors


@pytest.fixture
def photos(tmp_path: Path) -> DataConfig:
    """Photos at the size of training whose subject, a square, is cut out."""
    (tmp_path / "photos").mkdir()
    for number in range(2):
        layer = Image.fromarray(ramp(96, 64)).convert("RGBA")
        alpha = Image.new("L", (96, 64))
        alpha.paste(255, (20 + 10 * number, 16, 60, 48))
        layer.putalpha(alpha)
        layer.save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text("a square")
    return DataConfig(instance_data_dir=tmp_path / "photos", random_flip=True)


def test_a_detected_silhouette_lies_over_its_photo_in_every_crop_and_mirror_image(photos: DataConfig) -> None:
    built = made(photos, detector="silhouette")
    for start in range(0, 12, 3):
        batch = built.batch([start, start + 1, start + 2])
        assert batch.controls is not None
        # blue is white (the background) outside, and 0 on the ramp: the stand-in VAE doubles means in [-1, 1]
        inside = (1 - batch.latents[:, 2] / 2) / 2
        shares = torch.nn.functional.avg_pool2d(batch.controls[:, :1], 4)[:, 0]
        torch.testing.assert_close(shares, inside, atol=1e-5, rtol=0)
        assert batch.control_strengths is not None
        assert batch.control_strengths.tolist() == [1, 1, 1]


def test_detected_edges_are_opencvs_of_the_photo_at_the_size_of_training(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    picture = Image.fromarray(photo_files.noise(8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "photos" / "0.png")
    data = DataConfig(instance_data_dir=tmp_path / "photos", instance_prompt="x")
    batch = made(data, detector="canny", canny_low_threshold=40.0, canny_high_threshold=80.0).batch([0])
    expected = cv2.Canny(np.asarray(picture), 40, 80)
    assert batch.controls is not None
    assert expected.any()
    assert np.array_equal((batch.controls[0] * 255).numpy().astype(np.uint8), np.stack([expected] * 3))


def test_opaque_photos_have_no_silhouette_and_are_named(photos: DataConfig) -> None:
    assert photos.instance_data_dir is not None
    Image.new("RGB", (64, 64)).save(photos.instance_data_dir / "plain.png")
    data = DataConfig(instance_data_dir=photos.instance_data_dir, instance_prompt="x")
    said = refusal(data, detector="silhouette")
    assert "detector=silhouette: 1 of 3 photos have no transparent parts: plain.png" in said


def test_a_validation_image_of_a_detector_is_a_photo(photos: DataConfig, tmp_path: Path) -> None:
    image = tmp_path / "drawn.png"
    layer = Image.new("RGBA", (32, 32))
    layer.paste((255, 0, 0, 255), (8, 8, 24, 24))
    layer.save(image)
    (found,) = validation_controls(
        ControlConfig(detector="silhouette", validation_image=(str(image),)), (32, 32)
    )
    assert found.shape == (1, 3, 32, 32)
    assert found[0, 0].sum() == 256
    assert found[0, :, 8:24, 8:24].min() == 1


# over their photos

SIZES = [(96, 64), (64, 80), (128, 100)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Photos whose control images, beside them, are the photos themselves."""
    fill_with_photos(tmp_path / "photos", SIZES)
    (tmp_path / "controls").mkdir()
    for path in (tmp_path / "photos").glob("*.png"):
        shutil.copy(path, tmp_path / "controls")
    return DataConfig(instance_data_dir=tmp_path / "photos", random_flip=True)


def overlaid(data: DataConfig, prior: PriorConfig = NO_PRIOR, **control: Any) -> BatchSource:
    assert data.instance_data_dir is not None
    controls = data.instance_data_dir.parent / "controls"
    return made(data, prior, **{"conditioning_data_dir": controls, **control})


def test_a_control_image_is_cropped_and_mirrored_with_its_photo(data: DataConfig) -> None:
    built = overlaid(data.replace(image_interpolation_mode="bilinear"))
    for samples in (range(3), range(9, 12), range(21, 24)):
        batch = built.batch(list(samples))
        assert batch.controls is not None
        assert batch.controls.shape == (3, 3, SIZE, SIZE)
        # the stand-in VAE doubles the mean of each area of the photo in [-1, 1]
        means = torch.nn.functional.avg_pool2d(batch.controls, FACTOR) * 2 - 1
        torch.testing.assert_close(batch.latents[:, :3] / 2, means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("detector", [None, "canny"])
def test_cached_and_uncached_batches_are_the_same_bit_for_bit(data: DataConfig, detector: str | None) -> None:
    data = data.replace(center_crop=True)  # else the cache has a few of the crops, and loading any
    given: dict[str, Any] = {"detector": detector, "conditioning_data_dir": None} if detector else {}
    cached, loaded = overlaid(data, **given), overlaid(uncached(data), **given)
    for start in (0, 6, 18):
        assert_equal(cached.batch([start, start + 1]), loaded.batch([start, start + 1]))


@pytest.mark.parametrize("mode", ["none", "frozen", "class_images"])
def test_rows_of_a_prior_follow_no_control(data: DataConfig, tmp_path: Path, mode: Any) -> None:
    assert source(data).batch([0]).controls is None
    assert source(data).batch([0]).control_strengths is None
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
        built = overlaid(data, control_dropout=dropout)
        found = [built.batch([sample]).control_strengths for sample in range(24)]
        return [float(one.item()) for one in found if one is not None]

    assert strengths(0.0) == [1.0] * 24
    assert strengths(1.0) == [0.0] * 24
    assert 0 < sum(strengths(0.5)) < 24
    assert strengths(0.5) == strengths(0.5)


def test_the_colours_of_a_palette_are_never_blended(data: DataConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "controls").glob("*.png"):
        with Image.open(path) as image:
            width, height = image.size
        values = np.zeros((height, width, 3), np.uint8)
        values[:, : width // 2] = (255, 128, 0)
        Image.fromarray(values).save(path)

    def colours(**control: Any) -> set[tuple[float, ...]]:
        batch = overlaid(data, **control).batch([0, 1, 2])
        assert batch.controls is not None
        pixels = (batch.controls * 255).round().permute(0, 2, 3, 1).reshape(-1, 3)
        return {tuple(colour) for colour in pixels.tolist()}

    assert colours(control_type="palette") <= {(255.0, 128.0, 0.0), (0.0, 0.0, 0.0)}
    assert len(colours()) > 2
