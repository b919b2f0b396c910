"""Journeys through Compare in a real browser, on the embedded base."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

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
    serious_findings,
    set_number,
)
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.pipelines import read_image_metadata

pytestmark = [needs_browser, PATIENT]


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


@pytest.fixture
def page(browser: Browser, studio: RunningStudio) -> Iterator[Page]:
    with open_page(browser, studio.url, allowed=CUT_OFF) as opened:
        opened.get_by_role("tab", name="Compare").click()
        yield opened


def fill(page: Page, *, prompts: str = "a fox on a beach", strengths: str, seeds: str, steps: int) -> None:
    write(page, "prompts", prompts)
    page.locator("#compare-adapters input").click()
    page.get_by_role("option", name="Fox").click()
    page.keyboard.press("Escape")
    write(page, "strengths", strengths)
    write(page, "seeds", seeds)
    set_number(page, "compare-steps", steps)


def write(page: Page, name: str, text: str) -> None:
    page.locator(f"#compare-{name} :is(textarea, input)").fill(text)


def test_a_grid_is_drawn_as_the_form_says_and_each_cell_is_drawn_again_in_create(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    fill(page, strengths="-0.5, 3", seeds="3, 7", steps=2)
    page.get_by_label("A column of the base").uncheck()
    expect(page.locator("#compare-cost")).to_contain_text("4 pictures · 8 steps")
    page.locator("#compare-go").click()
    expect(page.locator("#compare-sheet")).to_be_visible(timeout=LONG_MS)
    expect(page.locator("#compare-cost")).to_contain_text(re.compile(r"4 pictures · 8 steps · about \d+ s"))
    expect(page.locator("#compare-grid [data-cell]")).to_have_count(4)

    manifest = json.loads(download(page, "compare-manifest", tmp_path / "grid.json").read_text())
    assert (manifest["prompts"], manifest["seeds"]) == (["a fox on a beach"], [3, 7])
    assert manifest["choices"] == [{"Fox": -0.5}, {"Fox": 3.0}]
    assert [each["metadata"]["steps"] for each in manifest["pictures"]] == [2] * 4
    files = [next(studio.folder.rglob(Path(each["file"]).name)) for each in manifest["pictures"]]
    assert [read_image_metadata(file) is not None for file in files] == [True] * 4
    pictures = [Image.open(file).convert("RGB") for file in files]
    draw_contact_sheet(
        [pictures[:2], pictures[2:]],
        row_labels=["seed 3", "seed 7"],
        column_labels=["Fox -0.5", "Fox 3"],
        title="a fox on a beach · tiny_world · 2 steps · guidance 3 · DPMSolverMultistep",
    ).save(tmp_path / "expected.png")
    assert_same_pixels(download(page, "compare-sheet", tmp_path / "sheet.png"), tmp_path / "expected.png")

    page.get_by_role("button", name="Fox 3, seed 7").click()
    expect(page.locator("#compare-facts")).to_contain_text("Fox at 3")
    page.locator("#compare-use").click()
    expect(page.locator("#create-restored")).to_contain_text("All settings restored")
    page.locator("#create-go").click()
    expect(page.locator("#create-download")).to_be_visible(timeout=LONG_MS)
    assert_same_pixels(download(page, "create-download", tmp_path / "again.png"), files[3])


def test_cells_stream_in_and_stop_leaves_the_rest_undrawn(page: Page) -> None:
    fill(page, strengths="0.5, 1", seeds="0-9", steps=40)
    page.locator("#compare-go").click()
    expect(page.get_by_role("button", name="Base, seed 0")).to_be_visible(timeout=LONG_MS)
    expect(page.locator("#compare-grid .cell.now")).to_have_count(1)
    page.locator("#compare-stop").click()
    expect(page.locator("#compare-go")).to_be_visible()
    expect(page.locator("#compare-status")).to_contain_text("Stopped")
    expect(page.locator("#compare-grid .cell").last).to_contain_text("not drawn")
    expect(page.locator("#compare-sheet")).to_be_hidden()
    page.get_by_role("button", name="Base, seed 0").click()
    expect(page.locator("#compare-use")).to_be_enabled()


def test_what_is_too_much_or_no_number_is_said_before_anything_is_drawn(page: Page) -> None:
    fill(page, strengths="0.5, 1", seeds="0-199", steps=2)
    cost = page.locator("#compare-cost")
    expect(cost).to_contain_text("This grid has 600 pictures; at most 400 are drawn at once.")
    write(page, "seeds", "0, seven")
    expect(cost).to_contain_text("Seven is no seed")
    write(page, "seeds", "0")
    write(page, "strengths", "1, 1")
    expect(cost).to_contain_text("found 1.0 twice among the strengths", ignore_case=True)
    page.locator("#compare-go").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("twice among the strengths")
    expect(page.locator("#compare-grid .cell")).to_have_count(0)


def test_the_form_survives_a_reload(page: Page) -> None:
    fill(page, prompts="one\ntwo", strengths="0.25", seeds="5-6", steps=3)
    expect(page.locator("#compare-cost")).to_contain_text("8 pictures · 24 steps")
    page.reload()
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator("#compare-prompts textarea")).to_have_value("one\ntwo")
    expect(page.locator("#compare-seeds :is(textarea, input)")).to_have_value("5-6")
    expect(page.locator("#compare-cost")).to_contain_text("8 pictures · 24 steps")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_tab_and_axe_finds_nothing_serious(
    browser: Browser, studio: RunningStudio, scheme: str
) -> None:
    with open_page(browser, studio.url, phone=True, scheme=scheme) as page:  # type: ignore[arg-type]
        page.get_by_role("tab", name="Compare").click()
        fill(page, strengths="0.5, 1", seeds="0", steps=1)
        page.locator("#compare-go").click()
        expect(page.locator("#compare-sheet")).to_be_visible(timeout=LONG_MS)
        page.get_by_role("button", name="Fox 1, seed 0").click()
        expect(page.locator("#compare-use")).to_be_visible()
        assert serious_findings(page) == []
