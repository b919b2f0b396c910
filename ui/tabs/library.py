"""The tab Library: the adapters there are, to look at, name, fetch, add and delete."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.ui.cards import GONE, Card
from ether_diffusion.ui.display_name import MAX_CHARACTERS
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import notes_html
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create import SMALL
from ether_diffusion.ui.tabs.history import SAVE_AS
from ether_diffusion.ui.tabs.library_endpoint import add_endpoint
from ether_diffusion.ui.tabs.library_looks import EMPTY, card_facts, cards_html
from ether_diffusion.ui.tabs.parts import Sending, TabParts, Updates
from ether_diffusion.ui.thumbnails import Thumbnails

THUMBNAIL_SIDE = 144
SHOW_DETAIL = """() => { if (window.innerWidth <= 760) document.getElementById("library-detail")
  .scrollIntoView({ behavior: "smooth" }); }"""
CHOOSE = """element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-adapter]");
  if (card) trigger("click", { adapter: card.dataset.adapter });
});"""


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Library", id="library") as tab:
        page = LibraryTab(studio)
        add_endpoint(studio)
    page.refresh_with(tab)
    return TabParts(
        tab,
        sendings=[Sending(page.used, page.restored)],
        adapter_changes=[page.renamed, page.deleted, page.added],
    )


class LibraryTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._is_small = studio.engine.native_size < SMALL
        self._thumbnails = Thumbnails(THUMBNAIL_SIDE)
        self._lay_out()
        self._tie()

    def _lay_out(self) -> None:
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300, elem_classes="settings"):
                self.empty = gr.HTML(EMPTY, elem_id="library-empty")
                self.cards = gr.HTML(js_on_load=CHOOSE, visible=False, elem_id="library-cards")
                self.dropped = gr.File(
                    label="Add an adapter: its zip, or its .safetensors with its .json",
                    file_count="multiple",
                    file_types=[".zip", ".safetensors", ".json"],
                    height=104,
                    elem_id="library-drop",
                    elem_classes="drop",
                )
            with gr.Column(
                scale=2, min_width=300, visible=False, elem_classes="results", elem_id="library-detail"
            ) as self.detail:
                self._lay_out_detail()
        self.chosen, self.restored = gr.State(""), gr.State()
        self.file = gr.DownloadButton(visible="hidden")

    def _lay_out_detail(self) -> None:
        self.head = gr.HTML(elem_id="library-head")
        self.use = gr.Button("Use in Create", variant="primary", elem_id="library-use")
        with gr.Row(elem_classes="tool-row"):
            self.native = gr.Button("Zip file", size="md", elem_id="library-zip")
            self.lora = gr.Button("LoRA file", size="md", elem_id="library-lora")
        with gr.Row(elem_classes="seed-row"):
            self.name = gr.Textbox(
                label="Name", max_lines=1, max_length=MAX_CHARACTERS, min_width=140, scale=3,
                elem_id="library-name",
            )  # fmt: skip
            self.rename = gr.Button("Rename", size="sm", min_width=84, scale=1, elem_id="library-rename")
        self.delete = gr.Button("Delete …", size="sm", elem_id="library-delete")
        with gr.Column(visible=False, elem_classes="confirm") as self.confirm:
            self.question = gr.HTML(elem_id="library-question")
            with gr.Row(elem_classes="tool-row"):
                self.delete_now = gr.Button("Delete", variant="stop", elem_id="library-delete-now")
                self.keep = gr.Button("Keep it", elem_id="library-delete-not")

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        everything = self._shown()
        opened = self.cards.click(handler(self.choose), None, everything, **quiet)
        opened.success(None, js=SHOW_DETAIL, api_visibility="private")
        self.used = self.use.click(handler(self.take), [self.chosen], [self.restored], **quiet)
        self.renamed = gr.on(
            [self.rename.click, self.name.submit],
            handler(self.give_name), inputs=[self.chosen, self.name], outputs=everything, **quiet,
        )  # fmt: skip
        self.delete.click(handler(self.ask), [self.chosen], [self.confirm, self.question], **quiet)
        self.keep.click(handler(self.keep_it), None, [self.confirm], **quiet)
        self.deleted = self.delete_now.click(handler(self.remove), [self.chosen], everything, **quiet)
        self.added = self.dropped.upload(
            handler(self.add), [self.dropped], [*everything, self.dropped], **quiet
        )
        for button, function in ((self.native, self.zip), (self.lora, self.export)):
            written = button.click(
                handler(function), [self.chosen], [self.file], api_visibility="private",
                show_progress="minimal", show_progress_on=[button],
            )  # fmt: skip
            written.success(None, [self.file], None, js=SAVE_AS, api_visibility="private")

    def refresh_with(self, tab: gr.Tab) -> None:
        """Show what there is when the page is loaded and when the tab is opened."""
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for event in (gr.context.Context.root_block.load, tab.select):
            event(handler(self.refresh), [self.chosen], [self.empty, self.cards], **quiet)

    def _shown(self) -> list[Any]:
        return [
            self.empty, self.cards, self.chosen, self.detail, self.head, self.use, self.lora, self.name,
            self.confirm,
        ]  # fmt: skip

    def refresh(self, chosen: str) -> Updates:
        """Show the adapters there are, those of runs that have finished meanwhile, too."""
        self._studio.keep_finished()
        return self._list(chosen)

    def _list(self, chosen: str) -> Updates:
        cards = self._studio.library.cards()
        listing = cards_html(cards, chosen, self._thumbnails, is_small=self._is_small)
        return {
            self.empty: gr.update(visible=not cards),
            self.cards: gr.update(value=listing, visible=bool(cards)),
        }

    def _show(self, card: Card) -> Updates:
        """Show one adapter with what can be done with it."""
        can_draw = card.fits_base and card.kind == "subject"
        notes = ""
        if not card.fits_base:
            notes = notes_html("It cannot be used with this studio's base", [_said(card)], kind="warning")
        elif card.kind == "control":
            notes = notes_html("It follows a control image: choose it in the tab Control.", ())
        elif card.why_not:
            notes = notes_html("Good to know", [_said(card)])
        return {
            **self._list(card.id),
            self.chosen: card.id,
            self.detail: gr.update(visible=True),
            self.head: f"<h2>{escape(card.name)}</h2>{card_facts(card)}{notes}",
            self.use: gr.update(visible=can_draw),
            self.lora: gr.update(visible=card.fits_base and card.kind == "subject"),
            self.name: card.name,
            self.confirm: gr.update(visible=False),
        }

    def choose(self, event: gr.EventData) -> Updates:
        """Show the adapter whose card was clicked."""
        adapter_id = event._data.get("adapter") if isinstance(event._data, dict) else None
        if not isinstance(adapter_id, str):
            raise FileNotFoundError(GONE)
        return self._show(self._studio.library.card(adapter_id))

    def give_name(self, adapter_id: str, name: str) -> Updates:
        """Rename the adapter on show."""
        return self._show(self._studio.library.rename(adapter_id, name))

    def ask(self, adapter_id: str) -> Updates:
        """Ask whether the adapter on show shall be deleted."""
        name = self._studio.library.card(adapter_id).name
        words = f"<p>Delete {escape(name)}? Its files are gone then; pictures drawn with it stay.</p>"
        return {self.confirm: gr.update(visible=True), self.question: words}

    def keep_it(self) -> Updates:
        """Delete nothing."""
        return {self.confirm: gr.update(visible=False)}

    def remove(self, adapter_id: str) -> Updates:
        """Delete the adapter on show."""
        self._studio.library.delete(adapter_id)
        hidden = {self.detail: gr.update(visible=False), self.confirm: gr.update(visible=False)}
        return {**self._list(""), **hidden, self.chosen: ""}

    def add(self, files: list[str] | None) -> Iterator[Updates]:
        """Take an uploaded adapter, or say why it cannot be taken."""
        try:
            card = self._studio.library.import_upload([Path(file) for file in files or []])
        except Exception:
            yield {self.dropped: None}
            raise
        yield {**self._show(card), self.dropped: None}

    def take(self, adapter_id: str) -> Restored:
        """Return what draws with the adapter on show, for the tab Create."""
        card = self._studio.library.card(adapter_id)
        if not card.fits_base:
            raise ValueError(f"{card.name} cannot be used here: {card.why_not}")
        return request_with(self._studio, card.id, card.trigger)

    def zip(self, adapter_id: str) -> Path:
        """Return the adapter on show as one zip."""
        return self._studio.library.native_zip(adapter_id)

    def export(self, adapter_id: str) -> Path:
        """Return the adapter on show as one LoRA file."""
        return self._studio.library.lora_file(adapter_id)


def _said(card: Card) -> str:
    """Return why an adapter does not fit as a sentence."""
    return f"{card.why_not[:1].upper()}{card.why_not[1:].rstrip('.')}."
