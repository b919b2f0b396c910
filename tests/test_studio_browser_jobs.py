"""Jobs belong to the server: reloads in every state, a queue, what is asked first, and the keyboard."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import (
    CUT_OFF,
    LONG_MS,
    PATIENT,
    RunningStudio,
    needs_browser,
    open_page,
    running_studio,
    set_number,
)
from playwright.sync_api import Browser, Page, expect
from test_studio_browser_drawing import (
    begin,
    choose,
    drag,
    fill,
    fill_control,
    fill_grid,
    generate,
    go_to,
    start,
    write,
)

pytestmark = [needs_browser, PATIENT]


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


@pytest.fixture
def page(browser: Browser, studio: RunningStudio) -> Iterator[Page]:
    with open_page(browser, studio.url, allowed=CUT_OFF) as opened:
        yield opened


def test_a_reload_brings_back_the_tab_the_job_the_grid_and_the_canvas(page: Page) -> None:
    fill_grid(page, strengths="1", seeds="0-1", steps=1)
    start(page, "compare")
    expect(page.locator("#compare-sheet")).to_be_visible(timeout=LONG_MS)
    fill_control(page, "Shapes", steps=1)
    drag(page, (0.3, 0.5), (0.7, 0.5))
    drawn = page.locator("#control-sketch canvas").evaluate("canvas => canvas.toDataURL()")
    go_to(page, "create")
    fill(page, prompt="a blue boat", steps=150, num_images=2, seed=5)
    status = begin(page, "create")
    expect(status).to_contain_text(re.compile(r"Step \d+ of 150"), timeout=LONG_MS)
    page.reload()
    expect(page.get_by_role("tab", name="Create")).to_have_attribute("aria-selected", "true")
    expect(status).to_contain_text(re.compile(r"Step \d+ of 150"))
    expect(page.locator("#create-prompt textarea")).to_have_value("a blue boat")
    go_to(page, "compare")
    expect(page.locator("#compare-grid [data-cell]")).to_have_count(4)
    expect(page.locator("#compare-sheet")).to_be_visible()
    go_to(page, "control")
    canvas = page.locator("#control-sketch canvas")
    expect(canvas).to_be_visible()
    page.wait_for_timeout(500)
    assert canvas.evaluate("canvas => canvas.toDataURL()") == drawn
    page.locator("#queue .cancel").click()
    expect(page.locator("#queue summary")).to_have_text("All jobs are done")
    fill_grid(page, strengths="0.5, 1", seeds="0-9", steps=8)
    begin(page, "compare")
    expect(page.locator("#compare-grid .cell.now")).to_have_count(1)
    page.reload()  # in the tab where the grid is being drawn
    expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#compare-grid .cell.now")).to_have_count(1)
    page.locator("#compare-stop").click()
    expect(page.locator("#compare-status")).to_contain_text("Stopped")


def test_what_is_typed_right_after_a_reload_stays_and_the_rest_comes_back(page: Page) -> None:
    fill(page, prompt="what was there", steps=3, seed=11)
    choose(page, "create-adapters", "Fox")
    set_number(page, "create-strength-0", 0.35)
    page.wait_for_timeout(500)
    page.reload(wait_until="commit")
    write(page, "create-prompt", "typed at once")
    expect(page.locator("#create-seed input")).to_have_value("11")
    expect(page.locator("#create-strength-0 input[type=number]")).to_have_value("0.35")
    page.wait_for_timeout(2000)
    expect(page.locator("#create-prompt textarea")).to_have_value("typed at once")


def test_jobs_queue_in_order_and_each_is_cancelled_or_shown(
    browser: Browser, studio: RunningStudio, page: Page
) -> None:
    fill(page, prompt="first of all", steps=150, num_images=2)
    begin(page, "create")
    rows = page.locator("#queue li")
    expect(rows).to_have_count(1)
    for prompt in ("a second", "a third"):
        fill(page, prompt=prompt, steps=2)
        start(page, "create")
        expect(rows.filter(has_text=prompt)).to_be_visible()
    expect(rows.nth(0)).to_contain_text("first of all")
    expect(rows.nth(0)).to_contain_text(re.compile("Step"), timeout=LONG_MS)
    expect(rows.nth(1)).to_contain_text(re.compile(r"number 1 in line, begins in about \d+"))
    expect(rows.nth(2)).to_contain_text("number 2 in line")
    with open_page(browser, studio.url) as other:  # sees and stops nothing of another's
        other.wait_for_timeout(1500)
        expect(other.locator("#queue")).to_be_hidden()
    rows.nth(1).locator(".cancel").click()
    expect(rows.filter(has_text="a second")).to_contain_text("stopped")
    rows.nth(0).locator(".cancel").click()
    expect(page.locator("#queue summary")).to_have_text("All jobs are done", timeout=LONG_MS)
    expect(page.locator("#create-status")).to_contain_text("1 picture in", timeout=LONG_MS)  # the third's
    page.locator("#queue summary").click()
    rows.filter(has_text="a second").locator(".show").click()
    expect(page.locator("#create-status")).to_contain_text("Stopped before the first picture")


def test_a_server_that_dies_is_said_and_what_was_drawn_is_there_when_it_is_back(
    browser: Browser, tmp_path: Path
) -> None:
    with running_studio(tmp_path / "studio") as running:
        port = int(running.url.rpartition(":")[2])
        with open_page(browser, running.url, allowed=(*CUT_OFF, "ERR_", "Failed to fetch")) as page:
            fill(page, steps=1)
            generate(page, tmp_path / "kept.png")
            fill(page, prompt="never done", steps=150, num_images=2)
            expect(begin(page, "create")).to_contain_text("Step", timeout=LONG_MS)
            running.process.kill()
            running.process.wait()
            expect(page.locator("#gone")).to_contain_text("does not answer")
            with running_studio(tmp_path / "studio", port=port):
                expect(page.locator("#create-status")).to_contain_text("What was drawn last", timeout=LONG_MS)
                expect(page.locator("#create-prompt textarea")).to_have_value("never done")
                expect(page.locator("#create-go")).to_be_enabled()
                expect(page.locator("#create-stop")).to_be_hidden()


def test_what_is_wrong_is_said_at_its_field_and_what_takes_long_is_asked_first(
    browser: Browser, studio: RunningStudio
) -> None:
    with open_page(browser, studio.url, allowed=("422",)) as page:
        fill(page)
        for name, value, words in (
            ("create-width", 60, "Width must be a multiple of 8"),
            ("create-seed", -4, "Seed must be from 0 to 4294967295; found -4"),
        ):
            before = page.locator(f"#{name} input").input_value()
            set_number(page, name, value)
            expect(page.locator("#create-cost")).to_contain_text(words)
            start(page, "create")
            expect(page.locator(f"#{name}")).to_contain_text(words)
            set_number(page, name, float(before))
        expect(page.locator("#create-cost")).to_contain_text("of memory")
        for name in ("create-width", "create-height"):
            set_number(page, name, 128)
        set_number(page, "create-steps", 150)
        for number in (1, 2, 4, 8, 16, 32):  # machines differ
            set_number(page, "create-num-images", number)
            expect(page.locator("#create-cost")).to_contain_text(f"{150 * number} steps")
            if re.search(r"([3-9]|\d\d) min", page.locator("#create-cost").inner_text()):
                break
        start(page, "create")
        expect(page.locator("#create-draw-question")).to_contain_text("on this machine. Draw it?")
        expect(page.locator("#queue")).to_be_hidden()
        page.locator("#create-draw-not").click()
        expect(page.locator("#create-draw-question")).to_be_hidden()
        start(page, "create")
        page.locator("#create-draw-now").click()
        expect(page.locator("#create-status")).to_contain_text(
            re.compile(r"Step \d+ of 150"), timeout=LONG_MS
        )
        page.locator("#create-stop").click()
        expect(page.locator("#create-status")).to_contain_text("Stopped", timeout=5000)


def test_the_keyboard_shows_where_it_is_and_moves_what_is_compared(page: Page, tmp_path: Path) -> None:
    fill(page, steps=1)
    choose(page, "create-adapters", "Fox")
    generate(page, tmp_path / "pair.png")
    slider = page.locator("#create-steps input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#create-steps input[type=number]")).to_have_value("2")
    assert slider.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    shown = page.locator("#create-pair .pair")
    shown.locator("input[type=range]").focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert shown.evaluate("each => each.style.getPropertyValue('--at')") == "40%"
    expect(page.locator("#create-go")).to_have_css("flex-direction", "column")  # which says Ctrl+Enter


def test_on_a_phone_the_form_is_first_and_what_runs_is_a_bar(browser: Browser, studio: RunningStudio) -> None:
    with open_page(browser, studio.url, phone=True) as page:
        fill(page, steps=150, num_images=2)
        begin(page, "create")
        bar = page.locator("#queue")
        expect(bar).to_be_visible()
        box = bar.bounding_box()
        assert box is not None
        assert (box["x"], box["width"]) == (0, 390)
        assert box["height"] < 120
        go_to(page, "train")
        expect(page.locator("#train-photos")).to_be_in_viewport()
        expect(bar).to_be_in_viewport()
        bar.locator(".cancel").click()
        expect(page.locator("#queue summary")).to_have_text("All jobs are done")
