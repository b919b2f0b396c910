"""Palettes: maps in colours of classes are taken, near colours snapped, and all others named."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.control.palette import TOLERANCE, Palette, palette_of, read_palette

TWO = palette_of({"sky": [0, 128, 255], "earth": "#804000"}, "the palette two")


def image(*colours: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.array([colours], dtype=np.uint8))


def pixels(picture: Image.Image) -> list[list[int]]:
    found: list[list[int]] = np.asarray(picture).reshape(-1, 3).tolist()
    return found


def test_a_map_in_the_palettes_colours_stays_as_it_is() -> None:
    assert pixels(TWO.snap(image((0, 128, 255), (128, 64, 0)))) == [[0, 128, 255], [128, 64, 0]]


def test_a_colour_within_the_tolerance_becomes_its_nearest_and_one_beyond_is_refused() -> None:
    assert pixels(TWO.snap(image((TOLERANCE, 128 - TOLERANCE, 250)))) == [[0, 128, 255]]
    with pytest.raises(ValueError, match="has 1 colours off the palette two"):
        TWO.snap(image((TOLERANCE + 1, 128, 255)))


def test_a_saved_jpeg_of_flat_areas_keeps_its_classes() -> None:
    stripes = np.repeat(np.array([[(0, 128, 255)], [(128, 64, 0)]], np.uint8), 16, axis=0).repeat(32, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "JPEG", quality=95, subsampling=0)
    with Image.open(buffer) as saved:
        assert np.array_equal(np.asarray(TWO.snap(saved.convert("RGB"))), stripes)


def test_colours_off_the_palette_are_named_with_their_counts_the_most_frequent_first() -> None:
    off = [(9, 9, 9)] * 2 + [(200, 0, 0)] * 3 + [(0, 200, 0)] + [(0, 0, 90)] + [(0, 128, 255)]
    with pytest.raises(ValueError, match="off the palette") as caught:
        TWO.snap(image(*off))
    assert str(caught.value).startswith(
        "has 4 colours off the palette two, in 7 of 8 px: #c80000 (3 px), #090909 (2 px), "
    )
    assert " and 1 more; paint in its colours, to within 8 of 255" in str(caught.value)


def test_a_photo_in_place_of_a_map_is_refused_as_well() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"has 1\d{4} colours off the palette"):
        TWO.snap(Image.fromarray(noise))


def test_a_file_of_colours_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"sky": [0, 128, 255], "earth": "#804000"}')
    found = read_palette(tmp_path / "p.json")
    assert (found.classes, found.colours) == (TWO.classes, TWO.colours)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it should be a valid dictionary|it should be an object"),
        ("{", "is not valid JSON"),
        ("{}", "has 0 colours; use from 1 to 1024"),
        ('{"sky": [0, 0]}', "p.json: sky"),
        ('{"sea": "blue"}', "sea is blue; write .red, green, blue."),
        ('{"air": [0, 0, 256]}', "air.2 is 256; it should be less than or equal to 255"),
        ('{"sky": [0, 0, 1], "sea": "#000001"}', "gives sky and sea the same colour #000001"),
    ],
)
def test_a_file_that_is_no_palette_is_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_palette(tmp_path / "p.json")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist; give a JSON file"):
        read_palette(tmp_path / "none.json")


def test_too_many_classes_are_refused() -> None:
    colours = tuple((0, index // 256, index % 256) for index in range(1025))
    with pytest.raises(ValueError, match="has 1025 colours"):
        Palette("p", tuple(map(str, range(1025))), colours)
