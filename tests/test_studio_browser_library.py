"""Journeys through Library in a real browser: look, name, fetch, add and delete."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import (
    PATIENT,
    RunningStudio,
    needs_browser,
    open_page,
    running_studio,
    serious_findings,
)
from control_encoders import random_encoder
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors.torch import load_file
from studio_files import save_tiny_world_adapter
from studio_folders import add, make_adapters

from ether_diffusion.adapters import read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.control import save_control
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.ui.studio import Studio

pytestmark = [needs_browser, PATIENT]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    """A studio with fox, cat, follow with control, lines of control alone, odd and alien of other bases."""
    folder = tmp_path_factory.mktemp("library")
    make_adapters(folder / "made")
    base = open_base("tiny_world")
    encoder = random_encoder(base.load_denoiser(), factor=base.vae_scale_factor)
    save_control(folder / "made" / "lines", encoder)
    furnished = Studio(folder / "studio", base="tiny_world")
    add(furnished, folder / "made", "fox", "cat", "follow", "lines", "odd", "alien")
    with running_studio(folder / "studio") as running:
        yield running


@pytest.fixture
def page(browser: Browser, studio: RunningStudio) -> Iterator[Page]:
    with open_page(browser, studio.url) as opened:
        open_library(opened)
        yield opened


def open_library(page: Page) -> None:
    page.get_by_role("tab", name="Library").click()
    expect(page.locator("#library-cards .card").first).to_be_visible()


def card(page: Page, name: str) -> Locator:
    return page.locator("#library-cards .card").filter(has=page.get_by_text(name, exact=True))


def choose(page: Page, name: str) -> None:
    card(page, name).click()
    expect(page.locator("#library-head h2")).to_have_text(name)
    expect(card(page, name)).to_have_attribute("aria-pressed", "true")


def fetch(page: Page, button: str, target: Path) -> Path:
    with page.expect_download() as caught:
        page.locator(f"#{button}").click()
    caught.value.save_as(target / caught.value.suggested_filename)
    return target / caught.value.suggested_filename


def test_an_adapter_is_added_named_fetched_and_deleted(
    page: Page, studio: RunningStudio, tmp_path: Path
) -> None:
    made = save_tiny_world_adapter(tmp_path / "made", seed=3)
    dropped, head = page.locator("#library-drop input[type=file]"), page.locator("#library-head h2")
    dropped.set_input_files([made / "adapter_model.safetensors", made / "adapter_config.json"])
    expect(head).to_have_text("a sks animal")
    expect(page.locator("#library-head")).to_contain_text("200")
    name = "Grandma's <b>fox</b> 狐"
    page.locator("#library-name input, #library-name textarea").first.fill(name)
    page.locator("#library-rename").click()
    expect(head).to_have_text(name)
    expect(card(page, name)).to_be_visible()
    archive = fetch(page, "library-zip", tmp_path)
    assert archive.name == "Grandma-s-b-fox-b.zip"
    lora = load_file(fetch(page, "library-lora", tmp_path))
    pipeline = open_pipeline(open_base("tiny_world"), device=torch.device("cpu"), dtype=torch.float32)
    pipeline.load_lora_weights(lora)  # of stock diffusers
    delete, question = page.locator("#library-delete"), page.locator("#library-delete-question")
    delete.click()
    expect(question).to_contain_text(f"Delete {name}?")
    choose(page, "fox")  # of which nothing was asked
    expect(question).to_be_hidden()
    choose(page, name)
    delete.click()
    page.locator("#library-delete-not").click()
    expect(question).to_be_hidden()
    delete.click()
    page.locator("#library-delete-now").click()
    expect(page.locator("#library-detail")).to_be_hidden()
    expect(card(page, name)).to_have_count(0)
    dropped.set_input_files(archive)
    expect(card(page, name)).to_be_visible()
    added = Studio(studio.folder, base="tiny_world").library.cards()[0]
    assert added.name == name
    before = load_file(made / "adapter_model.safetensors")
    after = load_file(studio.folder / "adapters" / added.id / "adapter_model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_adapters_of_other_bases_and_of_control_are_shown_as_such(page: Page, tmp_path: Path) -> None:
    for name, mark, words in (
        ("odd", "For other weights", "cannot be used with this studio's base"),
        ("alien", "For another base", "cannot be used with this studio's base"),
        ("follow", "Control", "It follows a control image"),
        ("lines", "Control", "It follows a control image"),
    ):
        expect(card(page, name).locator(".mark")).to_have_text(mark)
        choose(page, name)
        expect(page.locator("#library-head")).to_contain_text(words)
        expect(page.locator("#library-use")).to_be_hidden()
        expect(page.locator("#library-lora")).to_be_hidden()
        if mark == "Control":
            assert fetch(page, "library-zip", tmp_path).name == f"{name}.zip"
    page.get_by_role("tab", name="Create").click()
    page.locator("#create-adapters input").click()
    expect(page.get_by_role("option", name="fox", exact=True)).to_be_visible()
    for name in ("odd", "alien"):
        expect(page.get_by_role("option", name=name, exact=True)).to_have_count(0)


def test_the_keyboard_alone_chooses_an_adapter_which_goes_to_create_with_its_words(page: Page) -> None:
    card(page, "fox").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#library-head h2")).to_have_text("fox")
    page.locator("#library-use").click()
    expect(page.locator("#create-prompt textarea")).to_be_visible()
    expect(page.locator("#create-prompt textarea")).to_have_value("a photo of sks fox")
    expect(page.get_by_label("Strength of fox").first).to_be_visible()
    expect(page.locator("#create-restored")).to_contain_text("fox is chosen")


def test_a_mix_is_saved_from_create_by_keys_and_chosen_there(page: Page, studio: RunningStudio) -> None:
    both = f"Both {secrets.token_hex(2)}"  # another one each time that this is tried
    page.get_by_role("tab", name="Create").click()
    chosen = page.locator("#create-adapters")
    expect(page.locator("#create-mix")).to_be_hidden()
    for name in ("fox", "cat"):
        chosen.locator("input").click()
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")
    strength = page.locator("#create-strength-0 input[type=number]")
    strength.fill("0.6")
    strength.blur()
    page.locator("#create-mix").press("Enter")
    field = page.get_by_label("Name of the mix")
    expect(field).to_have_value("fox + cat")
    field.fill(both)
    field.press("Enter")
    expect(page.locator(".toast-body").last).to_contain_text(f"{both} is in the library")
    expect(page.locator("#create-mix-save")).to_be_hidden()
    expect(page.get_by_label(f"Strength of {both}").first).to_be_visible()
    expect(page.get_by_label("Strength of cat").first).to_be_hidden()
    added = Studio(studio.folder, base="tiny_world").library.cards()[0]
    assert (added.name, added.method) == (both, "LoRA")
    facts = read_adapter(studio.folder / "adapters" / added.id).metadata.training
    assert [str(fact).partition(":")[0] for fact in facts.values()] == ["fox at 0.6", "cat at 1"]


def test_an_upload_that_is_no_adapter_is_refused_in_words(page: Page, studio: RunningStudio) -> None:
    before = sorted((studio.folder / "adapters").iterdir())
    for name, data in (("zip", b"PK\x03\x04 but no zip"), ("safetensors", b"x")):
        file: Any = {"name": f"x.{name}", "mimeType": "application/octet-stream", "buffer": data}
        page.locator("#library-drop input[type=file]").set_input_files(file)
        expect(page.locator(".toast-body").last).to_contain_text(f"not a {'whole ' * (name == 'zip')}{name}")
        expect(page.locator(".toast-body").last).not_to_contain_text(str(studio.folder))
        expect(page.locator("#library-drop")).not_to_contain_text(f"x.{name}")  # it is ready for the next
    assert sorted((studio.folder / "adapters").iterdir()) == before


@pytest.mark.parametrize(("phone", "scheme"), [(False, "light"), (True, "dark")])
def test_axe_finds_nothing_serious(browser: Browser, studio: RunningStudio, phone: bool, scheme: Any) -> None:
    with open_page(browser, studio.url, phone=phone, scheme=scheme) as page:
        open_library(page)
        choose(page, "odd")
        page.locator("#library-delete").click()
        expect(page.locator("#library-delete-now")).to_be_visible()
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        assert serious_findings(page) == []
