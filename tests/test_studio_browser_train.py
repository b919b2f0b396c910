"""Journeys through Train in a real browser, with short real trainings of the embedded base."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import (
    PATIENT,
    WAIT_MS,
    RunningStudio,
    needs_browser,
    open_page,
    running_studio,
    serious_findings,
    set_number,
)
from photo_files import photo
from playwright.sync_api import Browser, Page, expect
from studio_trainers import make_runs, request, wait_until

from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.run_lock import read_holder
from ether_diffusion.ui.run import PROCESS_NAME

pytestmark = [needs_browser, PATIENT]
STEPS = 40
TRAINING_MS = 20 * WAIT_MS
"""As long as a short training may take on a machine that does much else."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    """A studio in which nothing has been trained."""
    with running_studio(tmp_path_factory.mktemp("train") / "studio") as running:
        yield running


def open_train(page: Page) -> None:
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-go")).to_be_visible()


def wait_for_step(page: Page, step: int) -> int:
    """Wait until the page tells of a later step than this one, and return it."""
    found = page.wait_for_function(
        """(step) => {
          const found = document.querySelector("#train-status")?.innerText.match(/step (\\d+) of/);
          return found && Number(found[1]) > step && Number(found[1]); }""",
        arg=step,
        timeout=TRAINING_MS,
    )
    return int(found.json_value())


def test_a_training_outlives_reload_closing_and_kill_and_its_adapter_comes_to_create(
    browser: Browser, studio: RunningStudio, tmp_path: Path
) -> None:
    photos = write_photos(find_concept("fox"), tmp_path)
    with open_page(browser, studio.url) as page:
        open_train(page)
        page.locator("#train-photos input[type=file]").set_input_files(photos)
        expect(page.locator("#train-photos-said")).to_contain_text(f"{len(photos)} photos")
        page.get_by_label("What is it?").fill("animal")
        page.get_by_label("Name in the library").fill("Fox")
        expect(page.locator("#train-described")).to_contain_text("a sks animal")
        page.get_by_role("button", name="Advanced").locator("visible=true").click()
        page.locator("#train-max-train-steps").locator("input, textarea").fill(str(STEPS))
        page.get_by_label("Pictures to draw in between").fill("a sks animal")
        page.locator("#train-go").click()
        expect(page.locator("#train-status h2")).to_have_text("Fox")
        wait_for_step(page, 1)
        expect(page.locator("#train-curve")).to_be_visible()
        page.reload()
        open_train(page)
        expect(page.locator("#train-gallery tr")).to_have_count(len(photos))
        expect(page.get_by_label("Name in the library")).to_have_value("Fox")
        wait_for_step(page, 2)
        expect(page.locator("#train-curve")).to_be_visible()
        expect(page.locator("#train-pictures figcaption").first).to_have_text("Base")
        expect(page.locator("#train-pictures figcaption").nth(1)).to_have_text("Step 10")
        seen = wait_for_step(page, 0)
    with open_page(browser, studio.url, phone=True) as page:  # the tab was closed; a second device
        open_train(page)
        wait_for_step(page, seen)
        page.locator("#train-pause").click()
        expect(page.locator("#train-status")).to_contain_text("Paused at step", timeout=TRAINING_MS)
        page.locator("#train-resume").click()
        wait_for_step(page, wait_for_step(page, 0))
        holder = read_holder(max((studio.folder / "runs").iterdir()) / PROCESS_NAME)
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
        expect(page.locator("#train-status")).to_contain_text("The training broke off")
        expect(page.locator("#train-status")).to_contain_text("it was killed")
        expect(page.locator("#train-pause")).to_be_hidden()
        page.locator("#train-resume").click()
        expect(page.locator("#train-status")).to_contain_text("Done: Fox", timeout=TRAINING_MS)
        expect(page.locator("#train-status .notes")).to_contain_text("likeness to the photos")
        expect(page.locator("#train-pictures figcaption").last).to_have_text(f"Step {STEPS}")
        page.locator("#train-use").click()
        expect(page.locator("#create-prompt textarea")).to_be_visible()
        expect(page.locator("#create-prompt textarea")).to_have_value("a sks animal")
        expect(page.locator("#create-restored")).to_contain_text("Fox is chosen")
        expect(page.get_by_label(re.compile("Strength of Fox")).first).to_be_visible()
    run = max((studio.folder / "runs").iterdir())
    lines = (run / "run" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "evaluation" not in line]
    assert steps == list(range(1, STEPS + 1))


def test_stop_ends_a_run_at_a_word_or_by_force_and_says_what_is_kept(
    browser: Browser, tmp_path: Path
) -> None:
    runs = make_runs(tmp_path)
    with running_studio(runs.root.parent) as running:
        for fate, presses, words, kept in (
            ("wait", 1, "Stopped at step 4 of 5. What was learned until then is kept", {"checkpoint-4"}),
            ("deaf", 3, "Stopped before anything was saved; the photos are kept", set()),
        ):
            runs.fate = fate
            run_id = runs.start(request(runs))
            try:
                with open_page(browser, running.url) as page:
                    open_train(page)
                    status, stop = page.locator("#train-status"), page.locator("#train-stop")
                    expect(status).to_contain_text("Training, step 3 of 5")
                    for _ in range(presses):
                        stop.click()
                        expect(status).to_contain_text(re.compile("Press Stop again|Stopped"))
                    expect(status).to_contain_text(words)
                    page.reload()
                    open_train(page)
                    expect(status).to_contain_text(words)
                    for name in ("stop", "pause", "use", "resume"):
                        is_there = name == "resume" or (name == "use" and bool(kept))
                        expect(page.locator(f"#train-{name}")).to_be_visible(visible=is_there)
            finally:
                for _ in range(3):
                    runs.stop(run_id)
            assert runs.status(run_id).state == "stopped"
            assert {path.name for path in (runs.root / run_id).rglob("checkpoint-*")} == kept


def test_the_form_shows_what_it_takes_and_says_why_it_takes_no_more(
    browser: Browser, studio: RunningStudio, tmp_path: Path
) -> None:
    for number in range(7):
        (tmp_path / f"good{number}.png").write_bytes(photo(seed=number))
    bad = {
        "empty.png": b"",
        "text.jpg": b"not a picture",
        "cut.png": photo(seed=8)[:900],
        "page.html": b"<html><script>document.title='x'</script></html>",
        "<b>name.jpg": b"\xff\xd8 no",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    with open_page(browser, studio.url, allowed=("500",)) as page:
        open_train(page)
        photos = page.locator("#train-gallery tr")
        sent, go = page.locator("#train-photos input"), page.locator("#train-go")
        toast = page.locator(".toast-body").last
        page.locator("#train-example").click()
        expect(photos).to_have_count(6)
        expect(page.get_by_label("Caption of fox_0.png")).to_have_value("a sks animal on a teal background")
        expect(page.get_by_label("What is it?")).to_have_value("animal")
        expect(page.locator("#train-described")).to_contain_text("200 steps: about")
        expect(page.locator("#train-described")).to_contain_text("nothing was measured of how like it comes")
        page.locator("#train-clear").click()
        expect(page.locator("#train-truth")).to_contain_text("Photographs of real things cannot be learned")
        page.get_by_label("What is it?").fill("dog")
        page.get_by_label("Name in the library").fill("")
        page.get_by_role("button", name="Command line").click()
        command = page.locator("#train-command textarea")
        expect(command).to_have_value(re.compile(r"^train-dreambooth .*--instance_data_dir=runs/ID/photos"))
        assert str(studio.folder) not in command.input_value()
        go.click()
        expect(toast).to_contain_text("There are no photos")
        sent.set_input_files(sorted(tmp_path.iterdir()))
        expect(page.locator("#train-refused tbody tr")).to_have_count(5)
        assert all(len(reason.inner_text()) > 10 for reason in page.locator("#train-refused td").all())
        expect(page.locator("#train-refused")).to_contain_text("cut.png")
        expect(photos).to_have_count(7)
        page.get_by_role("button", name="Crop good1.png").press("Enter")
        set_number(page, "train-crop-side", 0.95)
        page.locator("#train-square .crop").click(position={"x": 250, "y": 10})
        expect(page.locator("#train-crop-across input[type=number]")).to_have_value("1")
        expect(page.locator("#train-crop-down input[type=number]")).to_have_value("0")
        whole = photos.nth(1).locator("img").get_attribute("src")
        page.locator("#train-crop-now").press("Enter")
        expect(page.locator("#train-crop")).to_be_hidden()
        expect(photos.nth(1).locator("img")).not_to_have_attribute("src", str(whole))
        page.get_by_label("Caption of good1.png").fill("a red fox")
        page.get_by_label("Caption of good1.png").blur()
        expect(page.locator("#train-described")).to_contain_text("captions of good1.png have no {token}")
        page.get_by_role("button", name="Leave out good0.png").click()
        expect(photos).to_have_count(6)
        sent.set_input_files(tmp_path / "good3.png")
        expect(page.locator("#train-refused")).to_contain_text("is the same picture as good3.png")
        expect(page.locator("#train-photos-said")).to_contain_text("6 photos")
        page.locator("#train-clear").click()
        expect(page.locator("#train-gallery")).to_be_hidden()
        sent.set_input_files(tmp_path / "good3.png")
        expect(page.locator("#train-photos-said")).to_contain_text("1 photo")
        # fields that are mounted when this is opened hold what they held: none is 0 that was empty
        page.get_by_role("button", name="Advanced").locator("visible=true").click()
        steps = page.locator("#train-max-train-steps").locator("input, textarea")
        expect(steps).to_have_value("")
        expect(steps).to_have_attribute("placeholder", "200")  # as advised
        for wrong, words in (
            ("-5", "Steps -5 is out of range; use a whole number from 1"),
            ("many", "Steps 'many' does not fit; use a whole number"),
        ):
            steps.fill(wrong)
            go.click()
            expect(toast).to_contain_text(words)
        steps.fill("")
        go.click()
        expect(page.locator("#train-stop")).to_be_visible(timeout=TRAINING_MS)
        expect(page.locator("#train-status")).to_contain_text("dog")
        page.locator("#train-stop").click()
        expect(page.locator("#train-stop")).to_be_hidden(timeout=TRAINING_MS)


@pytest.mark.parametrize(("phone", "scheme"), [(False, "light"), (True, "dark")])
def test_axe_finds_nothing_serious(
    browser: Browser, broken: RunningStudio, tmp_path: Path, phone: bool, scheme: Any
) -> None:
    (tmp_path / "good.png").write_bytes(photo())
    with open_page(browser, broken.url, phone=phone, scheme=scheme) as page:
        open_train(page)
        expect(page.locator("#train-status")).to_contain_text("memory ran out in the run's folder")
        expect(page.locator("#train-curve")).to_be_visible()
        page.get_by_role("button", name="Advanced").locator("visible=true").click()
        page.locator("#train-photos input").set_input_files(tmp_path / "good.png")
        page.get_by_role("button", name="Crop good.png").press("Enter")
        expect(page.locator("#train-crop-now")).to_be_visible()
        page.locator("#train-delete").click()
        expect(page.locator("#train-delete-now")).to_be_visible()
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        assert serious_findings(page) == []
        page.locator("#train-delete-not").click()
        expect(page.locator("#train-delete-now")).to_be_hidden()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    """A studio with a run that broke off."""
    runs = make_runs(tmp_path_factory.mktemp("broken"), "crash")
    run_id = runs.start(request(runs))
    wait_until(runs, run_id, lambda each: each.state == "crashed")
    with running_studio(runs.root.parent) as running:
        yield running
