"""Contact sheets show every picture in its place, and labels that can be read."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

from ether_diffusion.contact_sheet import MAX_SHEET_PX, MIN_CELL_PX, draw_contact_sheet

COLOURS = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]


def picture(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def sheet(rows: list[list[Image.Image]] | None = None, **options: object) -> Image.Image:
    rows = rows or [[picture(colour) for colour in row] for row in COLOURS]
    labels = {"row_labels": [""] * len(rows), "column_labels": [""] * len(rows[0])}
    return draw_contact_sheet(rows, **(labels | options))  # type: ignore[arg-type]


def box_of(image: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """The rectangle that a colour fills, from its exact pixels."""
    mask = (np.asarray(image) == ImageColor.getrgb(colour)).all(axis=2)
    ys, xs = (place.tolist() for place in np.nonzero(mask))
    assert len(xs) == (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def test_pictures_stand_in_their_rows_and_columns_and_do_not_touch() -> None:
    boxes = [[box_of(sheet(), colour) for colour in row] for row in COLOURS]
    for row in boxes:
        assert len({(top, bottom) for _, top, _, bottom in row}) == 1
        assert row[0][2] < row[1][0]
        assert row[1][2] < row[2][0]
    for above, below in zip(*boxes, strict=True):
        assert (above[0], above[2]) == (below[0], below[2])
        assert above[3] < below[1]


def test_small_pictures_are_enlarged_by_whole_numbers_pixel_by_pixel() -> None:
    checkered = Image.new("RGB", (64, 64), "red")
    checkered.putpixel((5, 7), (0, 255, 0))
    left, top, right, bottom = box_of(sheet([[checkered]]), "lime")
    assert right - left == bottom - top == 3
    assert MIN_CELL_PX <= 64 * 3


def test_large_pictures_keep_their_size() -> None:
    left, top, right, bottom = box_of(sheet([[picture("red", (320, 200))]]), "red")
    assert (right - left, bottom - top) == (320, 200)


def test_pictures_of_other_sizes_are_fitted_into_their_cells() -> None:
    made = sheet([[picture("red", (400, 400)), picture("lime", (800, 200)), picture("blue", (100, 100))]])
    for colour, ratio in (("red", 1), ("lime", 4), ("blue", 1)):
        left, top, right, bottom = box_of(made, colour)
        assert (right - left) == pytest.approx(ratio * (bottom - top), abs=2 * ratio)


def test_labels_are_drawn_beside_and_above_the_pictures() -> None:
    bare = sheet()
    labelled = sheet(row_labels=["seed 0", "seed 1"], column_labels=["base", "0.5", "1"], title="fox")
    assert labelled.width > bare.width
    assert labelled.height > bare.height
    assert box_of(labelled, "red")[0] > box_of(bare, "red")[0]
    left, top, _, bottom = box_of(labelled, "red")
    assert np.unique(np.asarray(labelled.crop((0, top, left, bottom)))).size > 2


@pytest.mark.parametrize("label", ["word " * 400, "x" * 4000, "", " ", "\u202eabc\x00\n", "狐 🦊 ä × −0.5"])
def test_no_label_widens_or_overlaps_a_picture(label: str) -> None:
    made = sheet(row_labels=[label] * 2, column_labels=[label] * 3, title=label)
    for row in COLOURS:
        for colour in row:
            left, top, right, bottom = box_of(made, colour)
            assert (right - left, bottom - top) == (192, 192)
    assert made.width < 900


def test_accents_and_other_scripts_leave_no_boxes() -> None:
    def labelled(text: str) -> bytes:
        return sheet(column_labels=[text, "", ""]).tobytes()

    assert labelled("Füchse × 2") == labelled("Fuchse x 2")
    assert labelled("狐") == labelled("?")


def test_many_large_pictures_are_drawn_smaller() -> None:
    wide = picture("red", (3000, 3000))
    made = sheet([[wide] * 4] * 4)
    assert made.width * made.height < 1.1 * MAX_SHEET_PX


def test_drawing_needs_no_torch() -> None:
    code = "import sys, PIL.ImageFont; from pathlib import Path; import importlib.util as u;" + (
        "s = u.spec_from_file_location('c', 'ether_diffusion/contact_sheet.py'); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
