"""Journeys through Control in a real browser, on the embedded base."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from browser import (
    CUT_OFF,
    LONG_MS,
    PATIENT,
    RunningStudio,
    assert_same_pixels,
    download,
    needs_browser,
    open_page,
    running_studio,
    serious_findings,
    set_number,
)
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from ether_diffusion.control import control_image_sha256
from ether_diffusion.pipelines import ImageMetadata, read_image_metadata
from ether_diffusion.tiny_world.world import PALETTE

pytestmark = [needs_browser, PATIENT]


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


@pytest.fixture
def page(browser: Browser, studio: RunningStudio) -> Iterator[Page]:
    with open_page(browser, studio.url, allowed=CUT_OFF) as opened:
        opened.get_by_role("tab", name="Control").click()
        yield opened


def fill(page: Page, adapter: str, *, steps: int = 2) -> None:
    page.locator("#control-prompt textarea").fill("a strawberry")
    choose(page, "control-adapter", adapter)
    set_number(page, "control-steps", steps)


def choose(page: Page, dropdown: str, name: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def pick(page: Page, name: str) -> None:
    page.locator("#control-sketch .swatch").filter(has_text=name).click()


def drag(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw with the mouse, from and to shares of the canvas' sides."""
    canvas = page.locator("#control-sketch canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=6)
    page.mouse.up()


@dataclass
class Drawn:
    """A downloaded picture: what it says, and the control image that the studio kept for it."""

    said: ImageMetadata
    control: Image.Image


def generate(page: Page, studio: RunningStudio, target: Path) -> Drawn:
    page.locator("#control-go").click()
    expect(page.locator("#control-stop")).to_be_visible()
    expect(page.locator("#control-go")).to_be_visible(timeout=LONG_MS)
    said = read_image_metadata(download(page, "control-download", target))
    assert said is not None
    kept = studio.folder / "outputs" / "control-images" / f"{said.options['control_image_sha256']}.png"
    return Drawn(said, Image.open(kept).convert("RGB"))


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(int(channel) for channel in pixel) for pixel in np.asarray(image).reshape(-1, 3)}


def test_a_sketch_of_classes_is_followed_in_exactly_their_colours(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    fill(page, "Classes")
    pick(page, "beach")
    page.locator("#control-sketch [data-do=fill]").click()
    pick(page, "food")
    drag(page, (0.3, 0.5), (0.7, 0.5))
    choose(page, "control-adapters", "Fox")
    page.keyboard.press("Escape")
    drawn = generate(page, studio, tmp_path / "drawn.png")
    assert drawn.control.size == (64, 64)
    assert colours(drawn.control) == {PALETTE["beach"], PALETTE["food"]}
    assert drawn.control.getpixel((32, 32)) == PALETTE["food"]
    assert drawn.control.getpixel((32, 4)) == PALETTE["beach"]
    assert (drawn.said.options["control"], drawn.said.options["control_strength"]) == ("Classes", 1.0)
    assert {use.name for use in drawn.said.adapters} == {"Classes", "Fox"}
    expect(page.locator("#control-pair")).to_be_visible()  # the base beside it
    expect(page.locator("#control-used img")).to_be_visible()
    again = generate(page, studio, tmp_path / "again.png")
    assert control_image_sha256(again.control) == control_image_sha256(drawn.control)


def test_a_drawing_survives_a_reload_and_undo_takes_strokes_back(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    fill(page, "Shapes", steps=1)
    expect(page.locator("#control-sketch .swatch")).to_have_count(2)
    expect(page.locator("#control-adapter-strength")).to_be_hidden()  # an encoder alone has none
    drag(page, (0.5, 0.3), (0.5, 0.7))
    drag(page, (0.1, 0.1), (0.2, 0.1))
    page.locator("#control-sketch [data-do=undo]").click()
    first = generate(page, studio, tmp_path / "first.png")
    assert colours(first.control) == {(0, 0, 0), (255, 255, 255)}
    assert first.control.getpixel((32, 32)) == (255, 255, 255)
    assert first.control.getpixel((8, 6)) == (0, 0, 0)
    page.reload()
    page.get_by_role("tab", name="Control").click()
    expect(page.locator("#control-prompt textarea")).to_have_value("a strawberry")
    expect(page.locator("#control-sketch .swatch")).to_have_count(2)
    again = generate(page, studio, tmp_path / "again.png")
    assert control_image_sha256(again.control) == control_image_sha256(first.control)


def drop(page: Page, tab: str, picture: Path) -> Locator:
    """Drop a picture in a tab, and return what the page says of it."""
    page.get_by_role("tab", name=tab).click()
    page.locator(f"#{tab.lower()}-drop input[type=file]").set_input_files(picture)
    return page.locator(f"#{tab.lower()}-restored")


def test_a_picture_dropped_back_draws_the_same_pixels_and_history_brings_it_here_too(
    browser: Browser, studio: RunningStudio, page: Page, tmp_path: Path
) -> None:
    fill(page, "Classes")
    drag(page, (0.3, 0.5), (0.7, 0.5))
    set_number(page, "control-control-strength", 0.7)
    choose(page, "control-adapters", "Fox")
    page.keyboard.press("Escape")
    drawn = generate(page, studio, tmp_path / "drawn.png")
    expect(drop(page, "Create", tmp_path / "drawn.png")).to_contain_text("only the tab Control draws with")
    with open_page(browser, studio.url) as other:  # another visitor, with an empty form
        expect(drop(other, "Control", tmp_path / "drawn.png")).to_have_text("All settings restored")
        expect(other.locator("#control-used img")).to_be_visible()
        again = generate(other, studio, tmp_path / "again.png")
        assert again.said == drawn.said
        assert_same_pixels(tmp_path / "drawn.png", tmp_path / "again.png")
    with open_page(browser, studio.url) as third:
        third.get_by_role("tab", name="History").click()
        third.locator("#history-gallery .grid-container button").first.click()
        expect(third.locator("#history-facts")).to_contain_text("followed by Classes at 0.7")
        third.locator("#history-use").click()
        expect(third.locator("#control-restored")).to_have_text("All settings restored")
        generate(third, studio, tmp_path / "third.png")
        assert_same_pixels(tmp_path / "drawn.png", tmp_path / "third.png")


def test_a_control_image_that_is_gone_is_said_and_nothing_else_is_followed_instead(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    fill(page, "Shapes", steps=1)
    drag(page, (0.2, 0.2), (0.8, 0.3))
    drawn = generate(page, studio, tmp_path / "drawn.png")
    kept = studio.folder / "outputs" / "control-images"
    (kept / f"{drawn.said.options['control_image_sha256']}.png").unlink()
    page.reload()
    expect(drop(page, "Control", tmp_path / "drawn.png")).to_contain_text("not stored here; add it again")
    expect(page.locator("#control-steps input[type=number]")).to_have_value("1")
    page.locator("#control-go").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("There is no control image")


def test_a_new_studio_fills_a_drawn_shape_without_choosing_anything(browser: Browser, tmp_path: Path) -> None:
    with running_studio(tmp_path / "new") as new, open_page(browser, new.url) as page:
        page.get_by_role("tab", name="Control").click()
        expect(page.locator("#control-adapter input")).to_have_value("Shapes")
        expect(page.locator("#control-sketch .swatch")).to_have_count(2)
        page.locator("#control-prompt textarea").fill("a strawberry")
        set_number(page, "control-steps", 1)
        drag(page, (0.3, 0.5), (0.7, 0.5))
        drawn = generate(page, new, tmp_path / "drawn.png")
        assert drawn.said.options["control"] == "Shapes"
        assert colours(drawn.control) == {(0, 0, 0), (255, 255, 255)}


def test_an_upload_is_followed_as_it_is_or_as_a_detector_sees_it(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    photo = Image.new("RGBA", (128, 128))
    photo.paste((200, 30, 30, 255), (32, 32, 96, 96))
    photo.save(tmp_path / "cut-out.png")
    fill(page, "Shapes", steps=1)
    page.get_by_label("Upload", exact=True).check()
    page.locator("#control-upload input[type=file]").set_input_files(tmp_path / "cut-out.png")
    expect(page.locator("#control-upload")).to_contain_text("cut-out")
    as_it_is = generate(page, studio, tmp_path / "plain.png")
    assert as_it_is.control.size == (128, 128)
    assert as_it_is.control.getpixel((64, 64)) == (200, 30, 30)
    choose(page, "control-detector", "A cut-out: its shape (silhouette)")
    seen = generate(page, studio, tmp_path / "seen.png")
    expected = np.zeros((64, 64, 3), dtype=np.uint8)
    expected[16:48, 16:48] = 255
    assert np.array_equal(np.asarray(seen.control), expected)


def test_what_cannot_be_followed_is_said_in_words(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "white").save(tmp_path / "wide.png")
    page.locator("#control-prompt textarea").fill("a strawberry")
    said = page.get_by_test_id("toast-body")
    page.locator("#control-go").click()
    expect(said.filter(has_text="There is no control adapter chosen")).to_be_visible()
    fill(page, "Shapes", steps=1)
    page.get_by_label("Upload", exact=True).check()
    page.locator("#control-go").click()
    expect(said.filter(has_text="There is no control image")).to_be_visible()
    page.locator("#control-upload input[type=file]").set_input_files(tmp_path / "wide.png")
    expect(page.locator("#control-upload")).to_contain_text("wide")
    page.locator("#control-go").click()
    expect(said.filter(has_text="64 × 32 px and the picture 64 × 64 px")).to_be_visible()
    choose(page, "control-detector", "A cut-out: its shape (silhouette)")
    page.locator("#control-go").click()
    expect(said.filter(has_text="proportions").first).to_be_visible()
    expect(page.locator("#control-go")).to_be_visible()


def test_stop_ends_the_drawing(page: Page) -> None:
    fill(page, "Classes", steps=150)
    page.locator("#control-go").click()
    expect(page.locator("#control-status")).to_contain_text("Step", timeout=LONG_MS)
    page.locator("#control-stop").click()
    expect(page.locator("#control-status")).to_contain_text("Stopped")
    expect(page.locator("#control-go")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_tab_and_axe_finds_nothing_serious(
    browser: Browser, studio: RunningStudio, tmp_path: Path, scheme: str
) -> None:
    with open_page(browser, studio.url, phone=True, scheme=scheme) as page:  # type: ignore[arg-type]
        page.get_by_role("tab", name="Control").click()
        fill(page, "Classes", steps=1)
        generate(page, studio, tmp_path / "phone.png")
        assert serious_findings(page) == []
