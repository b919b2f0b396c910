"""Journeys through Create, Compare, Control and History in a real browser, on the embedded base."""

import json
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tiny_pipelines import tiny_sd

from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.control import control_image_sha256
from ether_diffusion.pipelines import ImageMetadata, read_image_metadata
from ether_diffusion.tiny_world.world import PALETTE

pytestmark = [needs_browser, PATIENT]
RESULTS = "[...document.querySelectorAll('.results img')].map(shown => shown.src).join()"
PROMPT = "a photo of a red fox on grass, <b>naïve</b> 狐"


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


@pytest.fixture
def page(browser: Browser, studio: RunningStudio) -> Iterator[Page]:
    with open_page(browser, studio.url, allowed=CUT_OFF) as opened:
        yield opened


def go_to(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab.capitalize()).click()


def write(page: Page, field: str, text: str) -> None:
    page.locator(f"#{field} :is(textarea, input)").first.fill(text)


def choose(page: Page, dropdown: str, name: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")


def fill(page: Page, *, prompt: str = PROMPT, steps: int = 2, seed: int = 7, num_images: int = 1) -> None:
    write(page, "create-prompt", prompt)
    set_number(page, "create-steps", steps)
    set_number(page, "create-num-images", num_images)
    set_number(page, "create-seed", seed)


def fill_grid(
    page: Page, *, strengths: str, seeds: str, steps: int, prompts: str = "a fox on a beach"
) -> None:
    go_to(page, "compare")
    write(page, "compare-prompts", prompts)
    choose(page, "compare-adapters", "Fox")
    write(page, "compare-strengths", strengths)
    write(page, "compare-seeds", seeds)
    set_number(page, "compare-steps", steps)


def fill_control(page: Page, adapter: str, *, steps: int = 2) -> None:
    go_to(page, "control")
    write(page, "control-prompt", "a strawberry")
    choose(page, "control-adapter", adapter)
    set_number(page, "control-steps", steps)


def start(page: Page, tab: str) -> Locator:
    """Press the button, and return what the tab says of the job."""
    page.locator(f"#{tab}-go").click()
    return page.locator(f"#{tab}-status")


def begin(page: Page, tab: str) -> Locator:
    """Begin what may take long, and then is asked first."""
    status = start(page, tab)
    page.wait_for_timeout(1500)
    if page.locator(f"#{tab}-draw-now").is_visible():
        page.locator(f"#{tab}-draw-now").click()
    return status


@contextmanager
def drawing(page: Page, tab: str = "create") -> Iterator[None]:
    """Wait for the end of what is begun inside, which may come before Stop was seen: for other pictures."""
    before, limit = page.evaluate(RESULTS), time.monotonic() + LONG_MS / 1000
    yield
    while page.evaluate(RESULTS) in ("", before) or page.locator(f"#{tab}-stop").is_visible():
        assert time.monotonic() < limit, "nothing was drawn"
        page.wait_for_timeout(100)


def generate(page: Page, target: Path, tab: str = "create") -> ImageMetadata:
    """Draw, download the picture, and return what it says of itself."""
    with drawing(page, tab):
        start(page, tab)
    said = read_image_metadata(download(page, f"{tab}-download", target))
    assert said is not None
    return said


def control_of(studio: RunningStudio, said: ImageMetadata) -> Image.Image:
    """Return the control image that the studio kept for a picture."""
    kept = studio.folder / "outputs" / "control-images" / f"{said.options['control_image_sha256']}.png"
    return Image.open(kept).convert("RGB")


def drag(page: Page, start: tuple[float, float], end: tuple[float, float], tab: str = "control") -> None:
    """Draw with the mouse, from and to shares of the canvas' sides."""
    canvas = page.locator(f"#{tab}-sketch canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=6)
    page.mouse.up()


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(int(channel) for channel in pixel) for pixel in np.asarray(image).reshape(-1, 3)}


def drop(page: Page, tab: str, picture: Path) -> Locator:
    """Drop a picture in a tab, and return what the page says of it."""
    go_to(page, tab)
    page.locator(f"#{tab}-drop input[type=file]").set_input_files(picture)
    return page.locator(f"#{tab}-restored")


def test_a_picture_says_what_the_form_said_and_dropped_back_draws_the_same_pixels(
    browser: Browser, studio: RunningStudio, tmp_path: Path
) -> None:
    with open_page(browser, studio.url, allowed=CUT_OFF) as page:
        fill(page)
        choose(page, "create-adapters", "Fox")
        set_number(page, "create-strength-0", 1.5)
        said = generate(page, tmp_path / "first.png")
        expect(page.locator("#create-pair")).to_be_visible()
        expect(page.locator("#create-status")).to_contain_text("the adapter acts on")
        assert (said.prompt, said.seed, said.steps) == (PROMPT, 7, 2)
        assert [(use.name, use.strength) for use in said.adapters] == [("Fox", 1.5)]
        assert (said.width, said.height) == (64, 64)
        assert str(studio.folder) not in page.content()  # no address says where the server keeps things
        page.reload()
        expect(page.locator("#create-status")).to_contain_text("1 picture in")
        expect(page.locator("#create-pair")).to_be_visible()
        assert_same_pixels(download(page, "create-download", tmp_path / "last.png"), tmp_path / "first.png")
    with open_page(browser, studio.url) as page:  # another visitor, with an empty form
        Image.new("RGB", (8, 8), "red").save(tmp_path / "plain.png")
        expect(drop(page, "create", tmp_path / "plain.png")).to_contain_text("does not say how it was made")
        expect(drop(page, "create", tmp_path / "first.png")).to_contain_text("All settings restored")
        expect(page.locator("#create-prompt textarea")).to_have_value(PROMPT)
        assert generate(page, tmp_path / "again.png") == said
        write(page, "create-prompt", "half a prompt")
        page.wait_for_timeout(500)
        expect(drop(page, "create", tmp_path / "first.png")).to_contain_text("All settings restored")
        expect(page.locator("#create-prompt textarea")).to_have_value(PROMPT)
        page.locator("#create-undo").click()
        expect(page.locator("#create-prompt textarea")).to_have_value("half a prompt")
    assert_same_pixels(tmp_path / "first.png", tmp_path / "again.png")


def test_stop_ends_the_drawing_and_the_next_one_starts_at_once(page: Page, tmp_path: Path) -> None:
    fill(page, steps=150, num_images=2)
    status = begin(page, "create")
    expect(status).to_contain_text("Step")
    page.locator("#create-stop").click()
    expect(page.locator("#create-go")).to_be_visible()
    expect(status).to_contain_text("Stopped")
    fill(page, steps=1)
    page.locator("#create-prompt textarea").focus()
    page.keyboard.press("Control+Enter")  # the keyboard alone draws, too
    expect(status).to_contain_text("1 picture", timeout=LONG_MS)
    page.locator("#create-prompt textarea").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#create-go")).to_be_focused()


def test_stop_and_other_visitors_at_a_large_size(browser: Browser, studio: RunningStudio, page: Page) -> None:
    fill(page)
    for side in (4096, 512):
        for name in ("create-width", "create-height"):
            set_number(page, name, side)
        status = begin(page, "create")
        if side == 4096:
            toast = page.get_by_test_id("toast-body").filter(has_text="px would take about").first
            expect(toast).to_be_visible()
            expect(page.locator("#create-cost")).to_contain_text("px would take about")
            most = page.locator("#create-width").inner_text()
            assert int(re.findall(r"Up to (\d+) here", most)[0]) < 4096
    expect(status).to_contain_text(re.compile("Step 0 of"), timeout=LONG_MS)
    with open_page(browser, studio.url) as other:
        fill(other)
        others = start(other, "create")
        expect(others).to_contain_text("Waiting: yours is next")
        page.locator("#create-stop").click()
        expect(status).to_contain_text("Stopped", timeout=5000)
        expect(others).to_contain_text("1 picture", timeout=LONG_MS)


def test_the_forms_survive_a_reload(page: Page) -> None:
    """An empty number shows 0 where it is mounted late: none is empty in any tab, also after a reload."""
    fill_grid(page, prompts="one\ntwo", strengths="0.25", seeds="5-6", steps=3)
    expect(page.locator("#compare-cost")).to_contain_text("8 pictures · 24 steps")
    go_to(page, "create")
    fill(page, prompt="a blue boat", steps=3, seed=11)
    choose(page, "create-adapters", "Fox")
    expect(page.locator("#create-new-seed input")).not_to_be_checked()
    for name in ("create-width", "create-height"):
        page.locator(f"#{name} input").fill("")
        page.locator(f"#{name} input").blur()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator("#create-prompt textarea")).to_have_value("a blue boat")
    expect(page.locator("#create-seed input")).to_have_value("11")
    expect(page.locator("#create-steps input[type=number]")).to_have_value("3")
    expect(page.get_by_label(re.compile("Strength of Fox")).first).to_be_visible()
    for tab in ("create", "compare", "control"):
        go_to(page, tab)
        for side in ("width", "height"):
            expect(page.locator(f"#{tab}-{side} input")).to_have_value("64")
    go_to(page, "compare")
    expect(page.locator("#compare-prompts textarea")).to_have_value("one\ntwo")
    expect(page.locator("#compare-seeds :is(textarea, input)")).to_have_value("5-6")
    expect(page.locator("#compare-cost")).to_contain_text("8 pictures · 24 steps")
    go_to(page, "create")
    for name, value in (("create-seed", ""), ("create-width", "63")):  # no form of that can be drawn
        page.locator(f"#{name} input").fill(value)
        page.locator(f"#{name} input").blur()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator("#create-prompt textarea")).to_have_value("a blue boat")
    expect(page.locator("#create-width input")).to_have_value("64")


def test_history_finds_a_picture_and_takes_its_settings_to_create(page: Page, tmp_path: Path) -> None:
    word = secrets.token_hex(3)  # another one each time that this is tried
    prompt = f"a {word} teapot in the rain"
    fill(page, prompt=prompt, seed=21)
    generate(page, tmp_path / "drawn.png")
    fill(page, prompt="something else", seed=3)
    go_to(page, "history")
    write(page, "history-text", f"{word} rain")
    found = page.locator("#history-gallery [data-picture]")
    expect(found).to_have_count(1)
    expect(page.locator("#history-all")).to_have_text("Download 1 picture as a zip")
    go_to(page, "library")
    go_to(page, "history")  # what is looked for stays
    page.wait_for_timeout(400)
    expect(found).to_have_count(1)
    with page.expect_download() as caught:
        page.locator("#history-all").click()
    assert caught.value.suggested_filename == "pictures.zip"
    found.first.click()
    expect(page.locator("#history-facts")).to_contain_text(prompt)
    write(page, "history-text", f"{word} sunshine")
    expect(page.locator("#history-picture")).to_be_hidden()  # what is not found is not shown
    write(page, "history-text", f"{word} rain")
    found.first.click()
    assert_same_pixels(download(page, "history-download", tmp_path / "x.png"), tmp_path / "drawn.png")
    page.locator("#history-use").click()
    expect(page.locator("#create-prompt textarea")).to_be_visible()
    expect(page.locator("#create-prompt textarea")).to_have_value(prompt)
    expect(page.locator("#create-seed input")).to_have_value("21")
    go_to(page, "history")
    found.first.click()
    page.locator("#history-delete").click()
    page.locator("#history-delete-now").click()
    expect(page.locator("#history-picture")).to_be_hidden()
    expect(page.locator("#history-empty")).to_contain_text("No picture is like that")


def test_history_is_lived_in_by_keys_alone(page: Page, studio: RunningStudio, tmp_path: Path) -> None:
    word = secrets.token_hex(3)
    fill(page, prompt=f"a {word} boat", seed=30, num_images=3)
    generate(page, tmp_path / "drawn.png")
    go_to(page, "history")
    write(page, "history-text", word)
    shots, facts = page.locator("#history-gallery [data-picture]"), page.locator("#history-facts")
    expect(shots).to_have_count(3)
    assert all("studio-files" in str(img.get_attribute("src")) for img in shots.locator("img").all())
    assert str(studio.folder) not in page.content()
    shots.first.press("Enter")
    expect(facts).to_contain_text("32")
    for key, seed, place in (("ArrowRight", "31", 1), ("ArrowRight", "30", 2), ("ArrowRight", "30", 2)):
        page.keyboard.press(key)
        expect(facts).to_contain_text(seed)
        expect(shots.nth(place)).to_have_attribute("aria-current", "true")
    page.keyboard.press("s")
    expect(page.locator("#history-star")).to_have_text("★ Starred")
    expect(page.locator("#history-gallery .star")).to_have_count(1)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#history-star")).to_have_text("☆ Star")
    page.keyboard.press("Escape")
    expect(page.locator("#history-picture")).to_be_hidden()
    boxes, chosen = page.locator("#history-gallery input[data-choose]"), page.locator("#history-chosen")
    boxes.first.press("Space")
    expect(chosen).to_have_text("1 picture chosen")
    boxes.last.click(modifiers=["Shift"])
    expect(chosen).to_have_text("3 pictures chosen")
    page.locator("#history-chosen-compare").press("Enter")
    expect(page.locator("#history-beside figure")).to_have_count(3)
    expect(page.locator("#history-beside figure").first).to_contain_text("Seed")
    expect(page.locator("#history-beside > div").last).to_contain_text(word)
    with page.expect_download() as caught:
        page.locator("#history-chosen-fetch").press("Enter")
    with zipfile.ZipFile(caught.value.path()) as file:
        assert len(file.namelist()) == 3
    board = page.get_by_label("Name of a board")
    board.fill(f"Boats {word}")
    board.press("Enter")
    page.locator("#history-chosen-none").press("Enter")
    expect(page.locator("#history-tools")).to_be_hidden()
    listing = page.locator("#history-gallery .shots")
    looks: list[Callable[[], None]] = [
        lambda: write(page, "history-text", ""),
        lambda: choose(page, "history-board", f"Boats {word}"),
    ]
    for look in looks:  # what is looked for chooses none, when it comes
        before = str(listing.get_attribute("data-render"))
        look()
        expect(listing).not_to_have_attribute("data-render", before)
    expect(shots).to_have_count(3)
    boxes.first.press("Space")
    page.locator("#history-chosen-off").press("Enter")
    expect(shots).to_have_count(2)
    shots.first.press("Enter")
    page.locator("#history-control").press("Enter")
    expect(page.locator("#control-used img")).to_be_visible()
    expect(page.get_by_role("radio", name="Upload")).to_be_checked()
    page.reload()
    expect(page.locator("#control-prompt textarea")).to_be_visible()
    go_to(page, "history")
    write(page, "history-text", word)
    expect(shots).to_have_count(3)
    expect(page.locator("#history-gallery .star")).to_have_count(1)  # kept on the server
    boxes.first.press("Space")
    boxes.last.click(modifiers=["Shift"])
    expect(chosen).to_have_text("3 pictures chosen")
    page.locator("#history-chosen-delete").press("Enter")
    expect(page.locator("#history-chosen-delete-question")).to_contain_text("Delete 3 pictures?")
    page.locator("#history-chosen-delete-now").press("Enter")
    expect(page.locator("#history-empty")).to_contain_text("No picture is like that")
    assert not any(word in str(read_image_metadata(each)) for each in studio.folder.glob("outputs/2*/*.png"))


def test_a_grid_is_drawn_as_the_form_says_and_each_cell_is_drawn_again_in_create(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    fill_grid(page, strengths="-0.5, 3", seeds="3, 7", steps=2)
    page.get_by_label("A column of the base").uncheck()
    expect(page.locator("#compare-cost")).to_contain_text("4 pictures · 8 steps")
    start(page, "compare")
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
    generate(page, tmp_path / "again.png")
    assert_same_pixels(tmp_path / "again.png", files[3])


def test_cells_stream_in_and_stop_leaves_the_rest_undrawn(page: Page) -> None:
    fill_grid(page, strengths="0.5, 1", seeds="0-9", steps=8)
    status = begin(page, "compare")
    expect(page.get_by_role("button", name="Base, seed 0")).to_be_visible(timeout=LONG_MS)
    expect(page.locator("#compare-grid .cell.now")).to_have_count(1)
    page.locator("#compare-stop").click()
    expect(page.locator("#compare-go")).to_be_visible()
    expect(status).to_contain_text("Stopped")
    expect(page.locator("#compare-grid .cell").last).to_contain_text("not drawn")
    expect(page.locator("#compare-sheet")).to_be_hidden()
    page.get_by_role("button", name="Base, seed 0").click()
    expect(page.locator("#compare-use")).to_be_enabled()


def test_what_is_too_much_or_no_number_is_said_before_anything_is_drawn(page: Page) -> None:
    fill_grid(page, strengths="0.5, 1", seeds="0-199", steps=2)
    cost = page.locator("#compare-cost")
    expect(cost).to_contain_text("This grid has 600 pictures; at most 400 are drawn at once.")
    write(page, "compare-seeds", "0, seven")
    expect(cost).to_contain_text("must be a whole number; found seven")
    write(page, "compare-seeds", "0")
    write(page, "compare-strengths", "1, 1")
    expect(cost).to_contain_text("found 1.0 twice among the strengths", ignore_case=True)
    start(page, "compare")
    expect(page.get_by_test_id("toast-body")).to_contain_text("twice among the strengths")
    expect(page.locator("#compare-grid .cell")).to_have_count(0)


def test_a_sketch_is_followed_dropped_back_and_brought_by_history(
    browser: Browser, studio: RunningStudio, page: Page, tmp_path: Path
) -> None:
    fill_control(page, "Classes")
    for name in ("beach", "food"):
        page.locator("#control-sketch .swatch").filter(has_text=name).click()
        if name == "beach":
            page.locator("#control-sketch [data-do=fill]").click()
    drag(page, (0.3, 0.5), (0.7, 0.5))
    set_number(page, "control-control-strength", 0.7)
    choose(page, "control-adapters", "Fox")
    said = generate(page, tmp_path / "drawn.png", "control")
    control = control_of(studio, said)
    assert (control.size, colours(control)) == ((64, 64), {PALETTE["beach"], PALETTE["food"]})
    assert control.getpixel((32, 32)) == PALETTE["food"]
    assert control.getpixel((32, 4)) == PALETTE["beach"]
    assert (said.options["control"], said.options["control_strength"]) == ("Classes", 0.7)
    assert {use.name for use in said.adapters} == {"Classes", "Fox"}
    expect(page.locator("#control-pair")).to_be_visible()  # the base beside it
    expect(page.locator("#control-used img")).to_be_visible()
    again = generate(page, tmp_path / "again.png", "control")
    assert again.options["control_image_sha256"] == said.options["control_image_sha256"]
    expect(drop(page, "create", tmp_path / "drawn.png")).to_contain_text("only the tab Control draws with")
    with open_page(browser, studio.url) as other:  # another visitor, with an empty form
        expect(drop(other, "control", tmp_path / "drawn.png")).to_have_text("All settings restored")
        expect(other.locator("#control-used img")).to_be_visible()
        assert generate(other, tmp_path / "other.png", "control") == said
        assert_same_pixels(tmp_path / "drawn.png", tmp_path / "other.png")
    with open_page(browser, studio.url) as third:
        go_to(third, "history")
        third.locator("#history-gallery [data-picture]").first.click()
        expect(third.locator("#history-facts")).to_contain_text("followed by Classes at 0.7")
        third.locator("#history-use").click()
        expect(third.locator("#control-restored")).to_have_text("All settings restored")
        generate(third, tmp_path / "third.png", "control")
        assert_same_pixels(tmp_path / "drawn.png", tmp_path / "third.png")


def test_a_picture_is_begun_with_painted_over_varied_and_enlarged(
    browser: Browser, studio: RunningStudio, page: Page, tmp_path: Path
) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    fill(page, steps=4)
    page.locator("#create-start button").first.click()
    page.locator("#create-start-picture input[type=file]").set_input_files(tmp_path / "photo.png")
    expect(page.locator("#create-start-sketch canvas")).to_be_visible()
    drag(page, (0.2, 0.3), (0.4, 0.3), "create-start")
    said = generate(page, tmp_path / "painted.png")
    assert (said.options["start_image"], said.options["start_strength"]) == ("photo.png", 0.6)
    changed = (np.asarray(Image.open(tmp_path / "painted.png")) != np.asarray(photo)).any(axis=-1)
    assert changed[16:24, 14:25].all()
    assert not changed[40:].any()
    with open_page(browser, studio.url) as other:  # another visitor: picture and brush come back
        expect(drop(other, "create", tmp_path / "painted.png")).to_have_text("All settings restored")
        expect(other.locator("#create-start-sketch canvas")).to_be_visible()
        again = generate(other, tmp_path / "again.png").options
        assert again["start_mask_sha256"] == said.options["start_mask_sha256"]
        assert_same_pixels(tmp_path / "painted.png", tmp_path / "again.png")

    with drawing(page):
        page.locator("#create-vary").click()
    varied = read_image_metadata(download(page, "create-download", tmp_path / "varied.png"))
    assert varied is not None
    assert (varied.prompt, varied.options["start_strength"]) == (said.prompt, 0.5)
    assert varied.options["start_image_sha256"] == control_image_sha256(Image.open(tmp_path / "painted.png"))
    assert varied.seed != said.seed
    page.locator("#create-enlarge").click()
    expect(page.locator("#create-notes")).to_contain_text("Enlarged twice by Lanczos alone")
    assert read_image_metadata(download(page, "create-download", tmp_path / "large.png")) is None
    small, large = Image.open(tmp_path / "varied.png"), Image.open(tmp_path / "large.png")
    assert np.array_equal(np.asarray(large), np.asarray(small.resize((128, 128), Image.Resampling.LANCZOS)))
    page.locator("#create-begin").click()
    expect(page.locator("#create-width input")).to_have_value("128")
    expect(page.locator("#create-start-sketch canvas")).to_have_attribute("width", "128")


def test_control_begins_with_a_picture_too_and_each_canvas_has_its_own_brush(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    fill_control(page, "Shapes", steps=4)
    expect(page.locator("#control-sketch .swatch")).to_have_count(2)
    page.locator("#control-start button").first.click()
    page.locator("#control-start-picture input[type=file]").set_input_files(tmp_path / "photo.png")
    expect(page.locator("#control-start-sketch canvas")).to_be_visible()
    for canvas in ("control-sketch", "control-start-sketch"):
        expect(page.locator(f"#{canvas} input:checked")).to_have_count(1)
    drag(page, (0.2, 0.3), (0.4, 0.3), "control-start")
    drag(page, (0.3, 0.5), (0.7, 0.5))
    said = generate(page, tmp_path / "painted.png", "control")
    assert (said.options["start_image"], said.options["control"]) == ("photo.png", "Shapes")
    assert colours(control_of(studio, said)) == {(0, 0, 0), (255, 255, 255)}
    changed = (np.asarray(Image.open(tmp_path / "painted.png")) != np.asarray(photo)).any(axis=-1)
    assert changed[16:24, 14:25].all()
    assert not changed[40:].any()
    with drawing(page, "control"):
        page.locator("#control-vary").click()
    varied = read_image_metadata(download(page, "control-download", tmp_path / "varied.png"))
    assert varied is not None
    assert varied.options["control_image_sha256"] == said.options["control_image_sha256"]
    assert varied.options["start_strength"] == 0.5


def test_a_drawing_survives_a_reload_and_one_that_is_gone_is_said(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    fill_control(page, "Shapes", steps=1)
    expect(page.locator("#control-sketch .swatch")).to_have_count(2)
    expect(page.locator("#control-adapter-strength")).to_be_hidden()  # an encoder alone has none
    drag(page, (0.5, 0.3), (0.5, 0.7))
    drag(page, (0.1, 0.1), (0.2, 0.1))
    page.locator("#control-sketch [data-do=undo]").click()
    said = generate(page, tmp_path / "first.png", "control")
    first = control_of(studio, said)
    assert colours(first) == {(0, 0, 0), (255, 255, 255)}
    assert first.getpixel((32, 32)) == (255, 255, 255)
    assert first.getpixel((8, 6)) == (0, 0, 0)
    page.reload()
    go_to(page, "control")
    expect(page.locator("#control-prompt textarea")).to_have_value("a strawberry")
    expect(page.locator("#control-sketch .swatch")).to_have_count(2)
    again = control_of(studio, generate(page, tmp_path / "again.png", "control"))
    sha256 = control_image_sha256(again)
    assert sha256 == said.options["control_image_sha256"]
    (studio.folder / "outputs" / "control-images" / f"{sha256}.png").unlink()
    page.reload()
    expect(drop(page, "control", tmp_path / "first.png")).to_contain_text("not stored here; add it again")
    expect(page.locator("#control-steps input[type=number]")).to_have_value("1")
    start(page, "control")  # nothing else is followed instead
    expect(page.get_by_test_id("toast-body")).to_contain_text("There is no control image")


def test_a_stranger_draws_the_fox_takes_examples_fills_a_shape_and_opens_another_base(
    browser: Browser, tmp_path: Path
) -> None:
    tiny_sd().save_pretrained(tmp_path / "another")
    with (
        running_studio(tmp_path / "new", base=None) as new,
        open_page(browser, new.url, allowed=(*CUT_OFF, "ERR_")) as page,
    ):
        expect(page.locator("#heading")).to_contain_text("photographs of real things cannot be learned on it")
        expect(page.locator("#create-prompt textarea")).to_have_value("a sks animal on a beach")
        set_number(page, "create-steps", 2)
        page.get_by_label("Strength of Example fox").first.fill("0.7")
        page.get_by_label("Strength of Example fox").first.blur()
        used = generate(page, tmp_path / "fox.png").adapters
        assert [(use.name, use.strength) for use in used] == [("Example fox", 0.7)]
        expect(page.locator("#create-pair")).to_be_visible()
        page.get_by_role("button", name="a cat in the snow", exact=True).click()
        expect(page.locator("#create-prompt textarea")).to_have_value("a cat in the snow")
        page.locator("#create-knows [data-example]").first.click()
        expect(page.locator("#create-restored")).to_contain_text("All settings restored")
        expect(page.locator("#create-prompt textarea")).to_have_value(re.compile("^a "))
        page.get_by_role("tab", name="Create").focus()
        page.keyboard.press("ArrowLeft")  # the keyboard goes round the tabs
        expect(page.get_by_role("tab", name="History")).to_have_attribute("aria-selected", "true")
        page.reload()
        expect(page.locator("#history-text")).to_be_visible()  # where one was
        expect(page.get_by_role("tab", name="History")).to_have_attribute("aria-selected", "true")
        go_to(page, "control")
        expect(page.locator("#control-adapter input")).to_have_value("Shapes")
        expect(page.locator("#control-sketch .swatch")).to_have_count(2)
        write(page, "control-prompt", "a strawberry")
        set_number(page, "control-steps", 1)
        drag(page, (0.3, 0.5), (0.7, 0.5))
        said = generate(page, tmp_path / "drawn.png", "control")
        assert said.options["control"] == "Shapes"
        assert colours(control_of(new, said)) == {(0, 0, 0), (255, 255, 255)}
        page.locator("#base-change").click()
        for name in ("/etc/passwd", str(tmp_path / "another")):
            page.locator("#base-name input").fill(name)
            page.keyboard.press("Enter")
            page.locator("#base-go").click()
            if name == "/etc/passwd":
                expect(page.locator(".toast-body").last).to_contain_text("“passwd” cannot be opened")
        expect(page.locator("#heading")).to_contain_text("Base: another", timeout=LONG_MS)
        expect(page.locator("#base-panel")).to_be_hidden()  # the page was loaded anew, where it was
        go_to(page, "create")
        expect(page.locator("#create-missing")).to_contain_text("Shapes")
        expect(page.locator("#create-knows")).to_be_hidden()
        fill(page, steps=4)
        assert generate(page, tmp_path / "other.png").base == "another"
        with drawing(page):
            page.locator("#create-enlarge").click()
            expect(page.locator(".toast-body").last).to_contain_text("and drawn over at")
        large = read_image_metadata(download(page, "create-download", tmp_path / "large.png"))
        assert large is not None
        with Image.open(tmp_path / "other.png") as small:
            assert (large.width, large.height) == (2 * small.width, 2 * small.height)
        assert large.options["start_strength"] == 0.3
        new.stop()
        expect(page.locator("#gone")).to_contain_text("does not answer")


def test_an_upload_is_followed_as_it_is_or_as_a_detector_sees_it(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    photo = Image.new("RGBA", (128, 128))
    photo.paste((200, 30, 30, 255), (32, 32, 96, 96))
    photo.save(tmp_path / "cut-out.png")
    fill_control(page, "Shapes", steps=1)
    page.get_by_label("Upload", exact=True).check()
    page.locator("#control-upload input[type=file]").set_input_files(tmp_path / "cut-out.png")
    expect(page.locator("#control-upload")).to_contain_text("cut-out")
    as_it_is = control_of(studio, generate(page, tmp_path / "plain.png", "control"))
    assert (as_it_is.size, as_it_is.getpixel((64, 64))) == ((128, 128), (200, 30, 30))
    choose(page, "control-detector", "A cut-out: its shape (silhouette)")
    seen = control_of(studio, generate(page, tmp_path / "seen.png", "control"))
    expected = np.zeros((64, 64, 3), dtype=np.uint8)
    expected[16:48, 16:48] = 255
    assert np.array_equal(np.asarray(seen), expected)


def test_what_cannot_be_followed_is_said_in_words_and_other_proportions_are_cropped(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 32), "white").save(tmp_path / "wide.png")
    Image.effect_noise((128, 128), 90).convert("RGB").save(tmp_path / "photo.png")
    go_to(page, "control")
    write(page, "control-prompt", "a strawberry")

    def refused(words: str) -> None:
        start(page, "control")
        expect(page.get_by_test_id("toast-body").filter(has_text=words).first).to_be_visible()

    refused("There is no control adapter chosen")
    fill_control(page, "Shapes", steps=1)
    page.locator("#control-sketch [data-do=clear]").click()
    refused("The canvas is empty")
    page.get_by_label("Upload", exact=True).check()
    refused("There is no control image")
    sent = page.locator("#control-upload input[type=file]")
    sent.set_input_files(tmp_path / "photo.png")
    expect(page.locator("#control-used img")).to_be_visible()  # what was sent is shown
    refused("The upload is a photo, and what is followed here shows silhouette")
    page.locator("#control-upload").get_by_role("button", name="Clear").first.click()
    sent.set_input_files(tmp_path / "wide.png")
    expect(page.locator("#control-upload")).to_contain_text("wide")
    followed = control_of(studio, generate(page, tmp_path / "cropped.png", "control"))
    assert followed.size == (32, 32)  # its middle


def width(page: Page, name: str) -> float:
    box = page.locator(name).bounding_box()
    assert box is not None
    return box["width"]


@pytest.mark.parametrize(("phone", "scheme"), [(True, "light"), (False, "dark")])
def test_axe_finds_nothing_serious_in_any_tab(
    browser: Browser, studio: RunningStudio, tmp_path: Path, phone: bool, scheme: str
) -> None:
    with open_page(browser, studio.url, phone=phone, scheme=scheme) as page:  # type: ignore[arg-type]

        def check() -> None:
            page.mouse.move(0, 0)
            page.wait_for_timeout(400)
            assert serious_findings(page) == []

        fill(page)
        choose(page, "create-adapters", "Fox")
        generate(page, tmp_path / "create.png")
        check()
        fill_grid(page, strengths="0.5, 1", seeds="0", steps=1)
        start(page, "compare")
        expect(page.locator("#compare-sheet")).to_be_visible(timeout=LONG_MS)
        page.get_by_role("button", name="Fox 1, seed 0").click()
        expect(page.locator("#compare-use")).to_be_visible()
        check()
        fill_control(page, "Classes", steps=1)
        generate(page, tmp_path / "control.png", "control")
        check()
        go_to(page, "history")
        page.locator("#history-gallery [data-picture]").first.click()
        expect(page.locator("#history-facts")).to_contain_text("Prompt")
        if phone:
            assert width(page, "#history-gallery") == width(page, ".search-row")
        page.locator("#history-gallery input[data-choose]").first.check()
        page.locator("#history-chosen-delete").click()
        expect(page.locator("#history-chosen-delete-now")).to_be_visible()
        page.locator("#queue summary").click()
        expect(page.locator("#queue li").first).to_be_visible()
        check()
