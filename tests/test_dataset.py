"""Photos, captions and masks come together, or everything that is wrong with them is said at once."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import photo_files
import pytest
import torch
from photo_batches import (
    FACTOR,
    SIZE,
    assert_equal,
    encode_without_noise,
    fill_with_photos,
    plan,
    source,
    uncached,
)
from PIL import Image

from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.dataset import read_training_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill_with_photos(tmp_path / "photos", [(90, 70), (70, 90), (100, 80)])
    return tmp_path / "photos"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the `datasets` library that nothing else sees."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    was_shown = not datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    if was_shown:
        datasets.enable_progress_bars()


def write_mask(folder: Path, name: str, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    folder.mkdir(exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(folder / name)


def problems(config: DataConfig) -> str:
    with pytest.raises(ValueError, match="the training data cannot be used:\n") as caught:
        read_training_data(config)
    return str(caught.value)


def test_each_photo_has_its_caption_and_its_source(folder: Path) -> None:
    found = read_training_data(
        DataConfig(instance_data_dir=folder, token="sks", caption_template="{token} {caption}")
    )
    assert [item.name for item in found.photos] == ["0.png", "1.png", "2.png"]
    assert [item.prompt for item in found.photos] == ["sks photo 0", "sks photo 1", "sks photo 2"]
    assert [item.read and item.read() for item in found.photos] == [
        (folder / f"{number}.png").read_bytes() for number in range(3)
    ]


def test_everything_that_is_wrong_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"")
    (folder / "0.txt").unlink()
    (folder / "1.txt").write_bytes(b"\xff\xff")
    write_mask(tmp_path / "masks", "0.png", (90, 70), (0, 0, 0, 0))
    write_mask(tmp_path / "masks", "1.png", (90, 70), (0, 0, 9, 9))
    config = DataConfig(instance_data_dir=folder, mask_data_dir=tmp_path / "masks", strict=True)
    said = problems(config)
    for sentence in (
        "broken.png is empty (0 bytes)",
        "0.png has no caption, and there is no instance prompt",
        "1.txt is not UTF-8",
        "the mask of 0.png is black everywhere",
        "the mask of 1.png has 90 × 70 px, and its photo 70 × 90 px",
        "1 photos have no mask: 2.png; looked in masks",
    ):
        assert sentence in said


def test_what_is_passed_over_or_enlarged_is_warned_of(folder: Path) -> None:
    assert plan(DataConfig(instance_data_dir=folder)).warnings == ()
    (folder / "broken.png").write_bytes(b"")
    made = plan(DataConfig(instance_data_dir=folder, resolution=72))
    passed_over, enlarged = made.warnings
    assert len(made.photos) == 3
    assert passed_over.startswith("not used: broken.png is empty (0 bytes)")
    assert "2 photos are smaller than the size of training and are enlarged" in enlarged
    assert "0.png, 1.png;" in enlarged


def test_photos_of_a_bucket_share_its_shape_in_every_step(tmp_path: Path) -> None:
    sizes = [(90, 70), (70, 90), (100, 70), (64, 64), (80, 80), (90, 160)]
    fill_with_photos(tmp_path / "photos", sizes)
    config = DataConfig(instance_data_dir=tmp_path / "photos", use_aspect_ratio_buckets=True, repeats=2)
    for each in (config, uncached(config), config.replace(aspect_ratio_buckets="64,64;48,80;80,48")):
        built = source(each, effective_batch=2)
        shapes: set[tuple[int, ...]] = set()
        names: set[str] = set()
        for step in range(built.plan.num_samples // 2):
            batch = built.batch([2 * step, 2 * step + 1])
            shapes.add(tuple(batch.latents.shape[2:]))
            names |= set(batch.names)
        assert len(shapes) >= 3
        assert names == {f"{number}.png" for number in range(6)}


def test_one_bucket_orders_as_none_and_what_has_no_effect_or_fills_no_step_is_named(folder: Path) -> None:
    square, buckets = DataConfig(instance_data_dir=folder), {"use_aspect_ratio_buckets": True}
    config = square.replace(aspect_ratio_buckets="64,64", **buckets)
    assert plan(config).num_samples == 3
    assert plan(config).warnings == ()
    assert_equal(source(config).batch(range(7)), source(square).batch(range(7)))
    for changed, name in (
        (square.replace(dataloader_num_workers=2), "dataloader_num_workers"),
        (config.replace(resolution=64), "resolution"),
    ):
        (warning,) = plan(changed).warnings
        assert warning.startswith(f"{name} has no effect")
    (warning,) = plan(
        square.replace(aspect_ratio_buckets="64,64;64,48", **buckets), effective_batch=2
    ).warnings
    assert "effective batch of 2" in warning
    assert "1 at 64 × 48" in warning
    assert "2 at 64 × 64" not in warning


@pytest.mark.parametrize("kind", ["alpha", "folder"])
@pytest.mark.parametrize("unmasked_weight", [0.0, 0.25])
def test_a_mask_is_cut_as_its_photo_is(kind: str, unmasked_weight: float, tmp_path: Path) -> None:
    """The photo is white where the mask is and black elsewhere, so that the latents show the mask itself."""
    (tmp_path / "photos").mkdir()
    box = (30, 10, 75, 41)
    photo = Image.new("RGB", (120, 80))
    photo.paste((255, 255, 255), box)
    if kind == "alpha":
        mask = Image.new("L", (120, 80), 1)  # nearly transparent, so that black is not laid over with white
        mask.paste(255, box)
        pixels = np.asarray(mask)[..., None].repeat(3, axis=-1)
        photo = Image.fromarray(np.concatenate([255 - pixels, pixels[..., :1]], axis=-1))
        # over white: 255 − a·a/255, dark where the alpha is full
        config = DataConfig(instance_data_dir=tmp_path / "photos", instance_prompt="x", mask_from_alpha=True)
    else:
        write_mask(tmp_path / "masks", "a.png", (120, 80), box)
        config = DataConfig(
            instance_data_dir=tmp_path / "photos", instance_prompt="x", mask_data_dir=tmp_path / "masks"
        )
    photo.save(tmp_path / "photos" / "a.png")
    config = config.replace(
        random_flip=True,
        unmasked_weight=unmasked_weight,
        image_interpolation_mode="bilinear",
        crops_per_photo=9,
    )
    for each in (config, uncached(config)):
        batch = source(each, vae=encode_without_noise).batch(range(20))
        assert batch.masks is not None
        assert batch.masks.shape == (20, 1, SIZE // FACTOR, SIZE // FACTOR)
        red = batch.latents[:, :1] / 2
        shown = (red + 1) / 2 if kind == "folder" else (1 - red) / 2
        expected = unmasked_weight + (1 - unmasked_weight) * shown
        torch.testing.assert_close(batch.masks, expected, atol=0.01, rtol=0)
        assert len(batch.masks.flatten(1).unique(dim=0)) > 5


def test_a_crop_that_misses_the_mask_is_moved_onto_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(photo_files.encode(photo_files.noise(400, 64), "PNG"))
    write_mask(tmp_path / "masks", "a.png", (400, 64), (380, 30, 396, 50))
    config = DataConfig(
        instance_data_dir=tmp_path / "photos", instance_prompt="x", mask_data_dir=tmp_path / "masks"
    )
    for each in (config, uncached(config)):
        masks = source(each).batch(range(20)).masks
        assert masks is not None
        assert masks.amax((1, 2, 3)).min() > 0
        assert not caplog.records
    centred = source(uncached(config, center_crop=True))
    centred.batch(range(5))
    assert [record.getMessage() for record in caplog.records] == [
        "the middle of a.png shows nothing of its mask; it is cropped around the mask instead"
    ]


def test_photos_without_transparent_parts_count_whole(folder: Path) -> None:
    config = DataConfig(instance_data_dir=folder, mask_from_alpha=True)
    assert "mask_from_alpha: 3 of 3 photos have no transparent parts; cut one out" in problems(config)
    cut_out = Image.fromarray(photo_files.noise(90, 90)).convert("RGBA")
    cut_out.paste((0, 0, 0, 0), (0, 0, 45, 90))
    cut_out.save(folder / "3.png")
    (folder / "3.txt").write_text("photo 3", encoding="utf-8")
    built = source(config, num_samples=40)
    assert (
        "3 of 4 photos have no transparent parts and count whole: 0.png, 1.png, 2.png" in built.plan.warnings
    )
    batch = built.batch(range(40))
    assert batch.masks is not None
    for name, mask in zip(batch.names, batch.masks, strict=True):
        assert (mask.min().item() == 1) == (name != "3.png")


def test_a_fingerprint_names_photos_prompts_and_masks(folder: Path, tmp_path: Path) -> None:
    for number, size in enumerate([(90, 70), (70, 90), (100, 80)]):
        write_mask(tmp_path / "masks", f"{number}.png", size, (0, 0, 50, 50))
    config = DataConfig(instance_data_dir=folder, mask_data_dir=tmp_path / "masks")
    before = plan(config).fingerprint
    assert set(before) == {f"{k}{n}.png" for n in range(3) for k in ("", "prompt of ", "mask of ")}
    write_mask(tmp_path / "masks", "1.png", (70, 90), (0, 0, 50, 51))
    now = plan(config).fingerprint
    assert {name for name in before if before[name] != now[name]} == {"mask of 1.png"}


def write_metadata(folder: Path) -> None:
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"photo {number}"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.usefixtures("cache")
def test_a_data_set_of_an_image_folder_trains_as_the_folder_does(folder: Path) -> None:
    write_metadata(folder)
    for path in folder.glob("*.txt"):
        path.unlink()
    from_folder = DataConfig(instance_data_dir=folder, random_flip=True)
    from_rows = DataConfig(dataset_name=str(folder), caption_column="text", random_flip=True)
    assert plan(from_rows).fingerprint == plan(from_folder).fingerprint
    assert_equal(source(from_rows).batch(range(9)), source(from_folder).batch(range(9)))
    workers = list(source(uncached(from_rows, dataloader_num_workers=2)).batches([[0, 1], [2, 3]]))
    alone = list(source(uncached(from_folder)).batches([[0, 1], [2, 3]]))
    for batch, expected in zip(workers, alone, strict=True):
        assert_equal(batch, expected)


@pytest.mark.usefixtures("cache")
def test_nobody_is_told_what_folder_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    read_training_data(DataConfig(dataset_name=str(folder), instance_prompt="x"))
    assert asked == []
    assert before == datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


@pytest.mark.usefixtures("cache")
def test_images_inside_a_data_set_are_decoded_with_all_protection(folder: Path, tmp_path: Path) -> None:
    """Rows that hold the bytes themselves, as those of the Hub do; the EXIF turn is ours."""
    import datasets

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photo_files.encode(photo_files.noise(90, 70), "JPEG", exif=exif)
    rows = [(folder / "0.png").read_bytes(), b"<html>", turned]
    features = datasets.Features({"photo": datasets.Image(decode=False), "words": datasets.Value("string")})
    table = {"photo": [{"bytes": data, "path": None} for data in rows], "words": ["one", "two", None]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows" / "train.parquet")
    config = DataConfig(
        dataset_name=str(tmp_path / "rows"),
        image_column="photo",
        caption_column="words",
        instance_prompt="fallback",
    )
    found = read_training_data(config)
    assert [(item.name, item.prompt) for item in found.photos] == [
        ("row-00000", "one"),
        ("row-00002", "fallback"),
    ]
    assert (found.photos[1].width, found.photos[1].height) == (70, 90)
    assert found.warnings[0].startswith("not used: row-00001 is no image that can be read")
    assert "belong to no usable photo" not in "\n".join(found.warnings)
    assert "row-00001" in problems(config.replace(strict=True))


@pytest.mark.usefixtures("cache")
def test_a_data_set_that_does_not_fit_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    write_metadata(folder)
    (tmp_path / "empty").mkdir()
    config = DataConfig(dataset_name=str(folder), instance_prompt="x")
    changes: list[tuple[dict[str, str], str]] = [
        ({"image_column": "img"}, r'image_column="img" is no column of .*; it has image, text'),
        ({"dataset_config_name": "plain"}, r"is a folder of images; leave dataset_config_name out"),
        ({"image_column": "text"}, r"the column text of .* holds no images"),
        ({"dataset_name": str(tmp_path / "empty")}, r"the data set .* is not found"),
        (
            {"dataset_name": "nobody/nothing"},
            r"nobody/nothing cannot be loaded \(Couldn't reach",
        ),
    ]
    for change, sentence in changes:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
            read_training_data(config.replace(**change))
        assert "\n" not in str(caught.value)
    assert "the data set's column text is not used; for captions, set caption_column=text" in (
        read_training_data(config).warnings
    )
