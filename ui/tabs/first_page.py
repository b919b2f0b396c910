"""What one begins with on the embedded base: what it draws, prompts to click, pictures to take over."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup

from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.ui.restore import restore
from ether_diffusion.ui.studio import EXAMPLE
from ether_diffusion.ui.tabs.create import add_endpoint
from ether_diffusion.ui.tabs.page import QUIET, Page, Updates
from ether_diffusion.ui.tabs.start import StartForm, StartTab
from ether_diffusion.ui.uploads import data_address
from ether_diffusion.ui.words import handler

PROMPTS = (
    "a sks animal on a beach", "a sks animal in space", "a cat in the snow",
    "a rocket on a yellow background", "two strawberries in a meadow", "a tractor in the desert",
)  # fmt: skip
"""Chips; the first two call the shipped fox."""
ON_CLICK = """element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-prompt], [data-example]");
  if (chosen) trigger("click", { ...chosen.dataset });
});"""
_KNOWS = Markup(
    '<p class="quiet">This base draws {} things, as {}, on a beach, in the snow, in space or on a '
    "plain colour; of others it knows nothing. <b>sks animal</b> calls the fox of the adapter. Try:</p>"
    '<div class="chips">{}</div><div class="examples">{}</div>'
)
_CHIP = Markup('<button type="button" data-prompt="{0}">{0}</button>')
_EXAMPLE = Markup(
    '<button type="button" data-example="{}" aria-label="Take over the settings of an example: {}">'
    '<img alt="" src="{}"></button>'
)


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("Create", id="create") as tab:
        create = CreateTab(page, CreateForm(page.studio, "create"))
        add_endpoint(create)
    page.refreshes(tab, create.refresh, [create.form["adapters"], create.missing], create.form)


def examples() -> dict[str, Path]:
    """Return the example pictures, which say how they were made, by their prompts."""
    folder = Path(str(files("ether_diffusion.ui").joinpath("examples")))
    return {path.stem.replace("_", " "): path for path in sorted(folder.glob("*.png"))}


class CreateForm(StartForm):
    """The form of a stranger has the shipped fox in it, and a prompt that calls it."""

    def begin(self) -> None:
        super().begin()
        cards = {card.id: card for card in self.studio.library.cards() if card.fits_base}
        shipped = next((card for card in cards.values() if card.name == EXAMPLE), None)
        self["adapters"].choices = [(name, each) for each, name in self.names().items()]
        self["adapters"].value = [shipped.id] if shipped else []
        self["prompt"].value = f"{shipped.trigger} on a beach" if shipped else ""
        self["strength_1"].visible = shipped is not None
        self["strength_1"].label = f"Strength of {EXAMPLE}"


class CreateTab(StartTab):
    """The tab Create, with chips and examples above its form."""

    def lay_out_head(self) -> None:
        self.knows = gr.HTML(visible=False, js_on_load=ON_CLICK, elem_id="create-knows")
        super().lay_out_head()

    def tie(self) -> None:
        super().tie()
        _, filled = self.page.takers[self.prefix]
        self.knows.click(handler(self._take), None, filled, **QUIET)
        Context.root_block.load(handler(self._tell), None, [self.knows], **QUIET)

    def _tell(self) -> Updates:
        return {self.knows: gr.update(value=first_html(), visible=self.studio.is_toy)}

    def _take(self, event: gr.EventData) -> Updates:
        chosen: dict[str, Any] = event._data if isinstance(event._data, dict) else {}
        found, picture = examples(), str(chosen.get("example"))
        if (prompt := chosen.get("prompt")) in PROMPTS:
            return {self.form["prompt"]: prompt}
        return self.take(restore(found[picture], self.studio)) if picture in found else {}


def first_html() -> Markup:
    """Return what is shown above the form."""
    known = [concept.phrase for concept in load_concepts("trained")]
    chips = Markup("").join(map(_CHIP.format, PROMPTS))
    shown = [(name, data_address(path, 96)) for name, path in examples().items()]
    pictures = Markup("").join(_EXAMPLE.format(name, name, address) for name, address in shown if address)
    return _KNOWS.format(len(known), ", ".join(known[:12]), chips, pictures)
