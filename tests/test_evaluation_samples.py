"""What cannot be scored is set aside by name, or refused in a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.benchmark.evaluation import read_caption_file, read_generated, read_photos
from ether_diffusion.metrics.scores import Sample, find_fault, sort_samples
from ether_diffusion.pipelines.metadata import ImageMetadata, attach_metadata, png_bytes


def noise(side: int = 16, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def write(folder: Path, **images: Image.Image) -> Path:
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (noise(), None),
        (Image.new("RGB", (8, 8)), "is black"),
        (Image.new("RGB", (8, 8), (2, 1, 0)), "is black"),
        (Image.new("RGB", (8, 8), (9, 8, 7)), "is empty: one colour throughout"),
        (Image.new("RGB", (0, 8)), "has no pixels"),
        (Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)), "has values that are not finite"),
        (Image.fromarray(np.full((8, 8), np.inf, dtype=np.float32)), "has values that are not finite"),
    ],
)
def test_a_picture_that_shows_nothing_is_found_out(image: Image.Image, fault: str | None) -> None:
    assert find_fault(image) == fault


def test_what_shows_nothing_or_has_another_size_is_set_aside_by_name() -> None:
    images = {"a": noise(), "b": Image.new("RGB", (16, 16)), "c": noise(8), "d": noise(), "e": noise()}
    found = sort_samples(Sample(name, image) for name, image in images.items())
    assert [each.name for each in found.usable] == ["a", "d", "e"]
    assert found.set_aside == {"b": "is black", "c": "is 8x8 px, and most are 16x16"}


def test_nothing_but_black_pictures_or_sizes_without_a_majority_are_refused() -> None:
    with pytest.raises(ValueError, match="no picture to score: a is black"):
        sort_samples([Sample("a", Image.new("RGB", (8, 8)))])
    with pytest.raises(ValueError, match="of the sizes 16x16, 8x8 px; score pictures of one size"):
        sort_samples([Sample("a", noise()), Sample("b", noise(8))])


def test_photos_may_differ_in_size_and_bad_ones_are_set_aside(tmp_path: Path) -> None:
    folder = write(tmp_path, a=noise(), b=noise(24, 1), c=Image.new("RGB", (16, 16)))
    (folder / "d.png").write_bytes(b"")
    found = read_photos(folder)
    assert [each.name for each in found.usable] == ["a.png", "b.png"]
    assert found.set_aside["c.png"] == "is black"
    assert "0 bytes" in found.set_aside["d.png"]


def test_fewer_than_two_pictures_are_refused_with_what_is_wrong_with_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable photos"):
        read_photos(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_photos(tmp_path / "nothing")
    write(tmp_path, a=noise())
    with pytest.raises(ValueError, match=r"found 1 photo to compare with .* give at least two"):
        read_photos(tmp_path)
    with pytest.raises(ValueError, match=r"found one picture to score .* give at least two"):
        read_generated(tmp_path)
    with pytest.raises(ValueError, match=r"give at least two; b\.png is black"):
        read_photos(write(tmp_path, b=Image.new("RGB", (16, 16))))


def test_generated_pictures_have_the_prompts_of_captions_or_their_own_and_their_own_seeds(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "others", a=noise(), b=noise(seed=1))
    found = read_generated(folder, {"a.png": "a cat", "b.png": "an owl"})
    assert [(each.prompt, each.seed) for each in found.usable] == [("a cat", None), ("an owl", None)]
    (tmp_path / "ours").mkdir()
    for seed in (4, 5):
        image = noise(seed=seed)
        about = {"prompt": "a fox", "negative_prompt": None, "seed": seed, "steps": 2, "guidance_scale": 3.0}
        size = {"width": 16, "height": 16, "pipeline": "P", "scheduler": "S"}
        attach_metadata(image, ImageMetadata(**about, **size))  # type: ignore[arg-type]
        (tmp_path / "ours" / f"{seed}.png").write_bytes(png_bytes(image))
    for captions, prompt in ((None, "a fox"), ({"4.png": "an owl", "5.png": "an owl"}, "an owl")):
        found = read_generated(tmp_path / "ours", captions)
        assert [(each.prompt, each.seed) for each in found.usable] == [(prompt, 4), (prompt, 5)]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"a.png": "a cat"}, r"there is no caption for b\.png; give every picture one"),
        ({"a.png": "x", "b.png": "x", "c.png": "x"}, r"captions for c\.png, and no such pictures"),
    ],
)
def test_captions_that_do_not_fit_the_pictures_are_refused(
    tmp_path: Path, captions: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_generated(write(tmp_path, a=noise(), b=noise(seed=1)), captions)


def test_a_file_of_captions_is_read_line_by_line(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "prompt": "an owl"}]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_caption_file(file) == {"a.png": "a cat", "b.png": "an owl"}
    with pytest.raises(FileNotFoundError, match="no file of captions"):
        read_caption_file(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[1]",
        '{"file_name": "a.png"}',
        '{"text": "a cat"}',
        '{"file_name": 1, "text": "a cat"}',
        '{"file_name": "a.png", "text": 1}',
        '{"file_name": "a.png", "text": "a", "prompt": "b"}',
        '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "a"}',
    ],
)
def test_a_line_that_is_no_caption_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"captions\.jsonl line [12]"):
        read_caption_file(file)
