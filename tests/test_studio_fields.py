"""What visitors type and draw in the studio: lists of numbers, and drawings in the colours of classes."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.tiny_world.world import PALETTE
from ether_diffusion.ui.control_images import canvas_html, read_drawing
from ether_diffusion.ui.requests import GenerateRequest, GridRequest
from ether_diffusion.ui.tabs.compare import grid_html, labels_of


def grid(**wish: Any) -> GridRequest:
    return GridRequest(**{"prompts": "a fox", **wish})


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("7, 2 - 4;9", (7, 2, 3, 4, 9)), ("5…6", (5, 6))],
)
def test_seeds_are_numbers_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert grid(seeds=text).seeds == seeds


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *(
            ("seeds", text)
            for text in ("x", "1.5", "-1", "3-1", "0-99999999999", "²", "0-399, 7", "", "1," * 9999)
        ),
        *(("strengths", text) for text in ("nan", "inf", "1e9", "half", "0,5x")),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_by_the_name_of_its_field(field: str, text: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        grid(adapters=["fox"], **{field: text})
    assert len(str(caught.value)) < 200


def test_strengths_are_numbers_of_any_sign_and_prompts_the_lines_that_hold_something() -> None:
    assert grid(strengths="0.5, -1 .25;2.").strengths == (0.5, -1.0, 0.25, 2.0)
    assert grid(prompts=" a fox \n\n  \nan owl").prompts == ("a fox", "an owl")


def test_numbers_are_read_as_pages_and_scripts_send_them() -> None:
    read: list[Any] = [5, 5.0, "5", " 5 "]
    assert [GenerateRequest("x", steps=value).steps for value in read] == [5] * 4
    sides: list[Any] = [None, "", 0, "64"]
    assert [GenerateRequest("x", width=value).width for value in sides] == [None, None, None, 64]
    wrong: list[Any] = [1.5, "1.5"]
    for value in wrong:
        with pytest.raises(ValueError, match=r"seed must be a whole number; found 1\.5"):
            GenerateRequest("x", seed=value)


def as_text(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_drawing_is_read_in_exactly_the_colours_of_its_classes() -> None:
    near = np.full((8, 8, 3), PALETTE["beach"], dtype=np.uint8)
    near[2:6, 2:6] = PALETTE["food"]
    shaken = np.clip(near.astype(int) + np.random.default_rng(0).integers(-1, 2, near.shape), 0, 255)
    drawing = read_drawing(as_text(Image.fromarray(shaken.astype(np.uint8))), "palette")
    assert np.array_equal(np.asarray(drawing), near)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:image/png;base64,!!!",
        "data:image/png;base64,AAAA",
        "/etc/passwd",
        "data:image/png;base64," + "A" * (9 * 2**20),
    ],
    ids=["nothing", "svg", "no base64", "no png", "a path", "too long"],
)
def test_what_is_no_drawing_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="drawing"):
        read_drawing(text, "silhouette")


def test_a_drawing_of_too_many_pixels_is_refused_unread() -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_drawing(as_text(Image.new("L", (4000, 4000))), "silhouette")


def test_colours_of_no_class_are_refused_by_their_names() -> None:
    with pytest.raises(ValueError, match="#0a6464"):
        read_drawing(as_text(Image.new("RGB", (8, 8), (10, 100, 100))), "silhouette")


def test_every_class_can_be_drawn_with_and_has_its_name() -> None:
    page = canvas_html("palette", width=64, height=64)
    for name, colour in PALETTE.items():
        assert f'value="#{bytes(colour).hex()}"' in page
        assert f"</span>{name}</label>" in page


def test_a_table_has_a_column_per_choice_or_else_per_seed() -> None:
    both = GridRequest(("a", "b"), seeds=(1, 2), adapters=("x",), strengths=(0.5, 1.0))
    labels = labels_of(both, {"x": "Fox"})
    assert labels.columns == ["Base", "Fox 0.5", "Fox 1"]
    assert labels.rows == ["a · seed 1", "a · seed 2", "b · seed 1", "b · seed 2"]
    alone = labels_of(GridRequest(("a",), seeds=(1, 2)), {})
    assert alone == ([""], ["Seed 1", "Seed 2"])


def test_names_and_prompts_are_escaped_in_the_table() -> None:
    request = GridRequest(("<b>x</b>", "y"), adapters=("x",), strengths=(1.0,))
    page = grid_html(labels_of(request, {"x": '"><script>'}), (), is_running=True)
    assert "<b>" not in page
    assert "<script>" not in page
    assert page.count("drawing …") == 1
