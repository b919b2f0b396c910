"""Journeys through Create and History in a real browser, on the embedded base."""

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import (
    LONG_MS,
    PATIENT,
    RunningStudio,
    assert_same_pixels,
    download,
    needs_browser,
    open_page,
    serious_findings,
    set_number,
)
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from ether_diffusion.pipelines import ImageMetadata, read_image_metadata

pytestmark = [needs_browser, PATIENT]
PROMPT = "a photo of a red fox on grass, <b>naïve</b> 狐"


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


@pytest.fixture
def page(browser: Browser, studio: RunningStudio) -> Iterator[Page]:
    with open_page(browser, studio.url) as opened:
        yield opened


def fill(
    page: Page, *, prompt: str = PROMPT, steps: int = 2, seed: int | None = 7, num_images: int = 1
) -> None:
    page.locator("#create-prompt textarea").fill(prompt)
    set_number(page, "create-steps", steps)
    set_number(page, "create-num-images", num_images)
    if seed is not None:
        set_number(page, "create-seed", seed)


def choose_fox(page: Page) -> None:
    page.locator("#create-adapters input").click()
    page.get_by_role("option", name="Fox").click()
    page.keyboard.press("Escape")
    expect(page.get_by_label(re.compile("Strength of Fox")).first).to_be_visible()


def generate(page: Page) -> None:
    page.locator("#create-go").click()
    expect(page.locator("#create-download")).to_be_visible(timeout=LONG_MS)
    expect(page.locator("#create-go")).to_be_visible()


def fetch(page: Page, name: str, target: Path) -> ImageMetadata:
    """Download a picture, and return what it says of itself."""
    said = read_image_metadata(download(page, name, target))
    assert said is not None
    return said


def test_a_picture_says_what_the_form_said_and_dropped_back_draws_the_same_pixels(
    browser: Browser, studio: RunningStudio, tmp_path: Path
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    with open_page(browser, studio.url) as page:
        fill(page)
        choose_fox(page)
        set_number(page, "create-strength-0", 1.5)
        generate(page)
        expect(page.locator("#create-pair")).to_be_visible()
        expect(page.locator("#create-status")).to_contain_text("the adapter acts on")
        said = fetch(page, "create-download", first)
        assert (said.prompt, said.seed, said.steps) == (PROMPT, 7, 2)
        assert [(use.name, use.strength) for use in said.adapters] == [("Fox", 1.5)]
        assert (said.width, said.height) == (64, 64)
    with open_page(browser, studio.url) as page:  # another visitor, with an empty form
        page.locator("#create-drop input[type=file]").set_input_files(first)
        expect(page.locator("#create-restored")).to_contain_text("All settings restored")
        expect(page.locator("#create-prompt textarea")).to_have_value(PROMPT)
        generate(page)
        assert fetch(page, "create-download", again) == said
    assert_same_pixels(first, again)


def test_a_picture_that_says_nothing_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "plain.png")
    page.locator("#create-drop input[type=file]").set_input_files(tmp_path / "plain.png")
    expect(page.locator("#create-restored")).to_contain_text("does not say how it was made")


def test_stop_ends_the_drawing_and_the_next_one_starts_at_once(page: Page) -> None:
    fill(page, steps=150, num_images=32)
    page.locator("#create-go").click()
    expect(page.locator("#create-status")).to_contain_text("Step")
    page.locator("#create-stop").click()
    expect(page.locator("#create-go")).to_be_visible()
    expect(page.locator("#create-status")).to_contain_text("Stopped")
    fill(page, steps=1)
    generate(page)
    expect(page.locator("#create-status")).to_contain_text("1 picture")


def test_a_second_visitor_is_told_the_place_in_line(browser: Browser, studio: RunningStudio) -> None:
    with open_page(browser, studio.url) as one, open_page(browser, studio.url) as other:
        fill(one, steps=150, num_images=32)
        one.locator("#create-go").click()
        expect(one.locator("#create-status")).to_contain_text("Step")
        fill(other, steps=1)
        other.locator("#create-go").click()
        expect(other.locator("#create-status")).to_contain_text("yours is next")
        one.locator("#create-stop").click()
        expect(other.locator("#create-status")).to_contain_text("1 picture")
        expect(one.locator("#create-go")).to_be_visible()


def test_the_form_survives_a_reload(page: Page) -> None:
    fill(page, prompt="a blue boat", steps=3, seed=11)
    choose_fox(page)
    expect(page.locator("#create-new-seed input")).not_to_be_checked()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator("#create-prompt textarea")).to_have_value("a blue boat")
    expect(page.locator("#create-seed input")).to_have_value("11")
    expect(page.locator("#create-steps input[type=number]")).to_have_value("3")
    expect(page.get_by_label(re.compile("Strength of Fox")).first).to_be_visible()


def test_history_finds_a_picture_and_takes_its_settings_to_create(
    browser: Browser, studio: RunningStudio, tmp_path: Path
) -> None:
    with open_page(browser, studio.url) as page:
        word = secrets.token_hex(3)  # another one each time that this is tried
        prompt = f"a {word} teapot in the rain"
        fill(page, prompt=prompt, seed=21)
        generate(page)
        fill(page, prompt="something else", seed=3)
        page.get_by_role("tab", name="History").click()
        page.locator("#history-text textarea, #history-text input").first.fill(f"{word} rain")
        expect(page.locator("#history-gallery .grid-container button")).to_have_count(1)
        expect(page.locator("#history-all")).to_have_text("Download 1 picture as a zip")
        page.get_by_role("tab", name="Library").click()
        page.get_by_role("tab", name="History").click()  # what is looked for stays
        page.wait_for_timeout(400)
        expect(page.locator("#history-gallery .grid-container button")).to_have_count(1)
        with page.expect_download() as caught:
            page.locator("#history-all").click()
        assert caught.value.suggested_filename == "pictures.zip"
        page.locator("#history-gallery .grid-container button").first.click()
        expect(page.locator("#history-facts")).to_contain_text(prompt)
        assert fetch(page, "history-download", tmp_path / "x.png").seed == 21
        page.get_by_role("button", name="Use these settings").click()
        expect(page.locator("#create-prompt textarea")).to_be_visible()
        expect(page.locator("#create-prompt textarea")).to_have_value(prompt)
        expect(page.locator("#create-seed input")).to_have_value("21")


def test_an_impossible_wish_is_refused_in_a_sentence(page: Page) -> None:
    fill(page)
    set_number(page, "create-width", 60)
    page.locator("#create-go").click()
    expect(page.locator(".toast-body").first).to_contain_text("60")
    expect(page.locator("#create-go")).to_be_visible()


def test_fields_of_tabs_that_were_never_opened_are_as_they_were(page: Page) -> None:
    """An empty number shows 0 where it is mounted late: none is empty in any tab, also after a reload."""
    fill(page)
    for name in ("create-width", "create-height"):
        page.locator(f"#{name} input").fill("")
        page.locator(f"#{name} input").blur()
    page.reload()
    for tab in ("create", "compare", "control"):
        page.get_by_role("tab", name=tab.capitalize()).click()
        for side in ("width", "height"):
            expect(page.locator(f"#{tab}-{side} input")).to_have_value("64")


def test_stop_and_other_visitors_at_a_large_size(browser: Browser, studio: RunningStudio, page: Page) -> None:
    fill(page)
    for side in ("create-width", "create-height"):
        set_number(page, side, 4096)
    page.locator("#create-go").click()
    expect(page.locator(".toast-body").first).to_contain_text("px would take about")
    for side in ("create-width", "create-height"):
        set_number(page, side, 512)
    page.locator("#create-go").click()
    expect(page.locator("#create-status")).to_contain_text(re.compile("Step 0 of"), timeout=LONG_MS)
    with open_page(browser, studio.url) as other:
        fill(other)
        other.locator("#create-go").click()
        expect(other.locator("#create-status")).to_contain_text("Waiting: yours is next")
        page.locator("#create-stop").click()
        expect(page.locator("#create-status")).to_contain_text("Stopped", timeout=5000)
        expect(other.locator("#create-status")).to_contain_text("picture", timeout=LONG_MS)


def width(page: Page, name: str) -> float:
    box = page.locator(name).bounding_box()
    assert box is not None
    return box["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(browser: Browser, studio: RunningStudio, phone: bool, scheme: str) -> None:
    with open_page(browser, studio.url, phone=phone, scheme=scheme) as page:  # type: ignore[arg-type]
        fill(page)
        choose_fox(page)
        generate(page)
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        assert serious_findings(page) == []
        page.get_by_role("tab", name="History").click()
        page.locator("#history-gallery .grid-container button").first.click()
        expect(page.locator("#history-facts")).to_contain_text("Prompt")
        if phone:
            assert width(page, "#history-gallery") == width(page, ".search-row")
        page.wait_for_timeout(400)
        assert serious_findings(page) == []


def test_the_keyboard_alone_draws_a_picture(page: Page) -> None:
    fill(page, steps=1)
    page.locator("#create-prompt textarea").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#create-download")).to_be_visible(timeout=LONG_MS)
    page.locator("#create-prompt textarea").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#create-go")).to_be_focused()
