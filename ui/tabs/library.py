"""The tab Library: the adapters there are, to look at, name, fetch, add and delete; also /adapters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup

from ether_diffusion.ui.library import Card
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.tabs.page import EMPTY, ON_PRESS, DeleteButton, Page, Panel, Updates, told_by
from ether_diffusion.ui.uploads import data_address
from ether_diffusion.ui.words import (
    MAX_CHARACTERS,
    facts_html,
    handler,
    kilobytes,
    notes_html,
    sentence,
    without_paths,
)

THUMBNAIL_SIDE = 144
FILES = (("zip", "Zip"), ("lora", "LoRA"))
NONE_YET = "No adapters yet. Train one, or add one that you have."
SHOW_DETAIL = """() => { if (window.innerWidth <= 760) document.getElementById("library-detail")
  .scrollIntoView({ behavior: "smooth" }); }"""
_CARD = Markup(
    '<button type="button" class="card" data-adapter="{id}" aria-pressed="{pressed}">'
    '<span class="look-of" aria-hidden="true">{picture}</span><span class="words">'
    '<span class="name">{name}</span>{lines}{mark}</span></button>'
)


class LibraryTab(Panel):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page, prefix: str) -> None:
        super().__init__(page, prefix)
        library = page.studio.library
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300, elem_classes="settings"):
                self.empty = self.html("empty", EMPTY.format(NONE_YET))
                self.cards = self.html("cards", js_on_load=ON_PRESS, visible=False)
                self.dropped = gr.File(
                    label="Add an adapter: its zip, or its .safetensors with its .json",
                    file_count="multiple", file_types=[".zip", ".safetensors", ".json"], height=104,
                    elem_id="library-drop", elem_classes="drop",
                )  # fmt: skip
            beside: dict[str, Any] = {"elem_classes": "results", "elem_id": "library-detail"}
            with gr.Column(scale=2, min_width=300, visible=False, **beside) as self.detail:
                self.head = self.html("head")
                self.use = self.button("use", "Use in Create", variant="primary")
                with gr.Row(elem_classes="tool-row"):
                    native, self.lora = (
                        self.button(name, f"{label} file", size="md") for name, label in FILES
                    )
                with gr.Row(elem_classes="seed-row"):
                    one: dict[str, Any] = {"max_lines": 1, "max_length": MAX_CHARACTERS, "min_width": 140}
                    self.name = gr.Textbox(label="Name", scale=3, elem_id="library-name", **one)
                    rename = self.button("rename", "Rename", size="sm", min_width=84, scale=1)
                self.delete = DeleteButton("library", "Delete …")
        self.chosen = gr.State("")
        chosen, listed = [self.chosen], [self.empty, self.cards]
        for event in (Context.root_block.load, self.block.select):
            self.on(event, self._refresh, chosen, listed)
        added = self.on(self.dropped.upload, self._add, [self.dropped])
        opened = self.on(self.cards.click, self._choose)
        opened.success(None, js=SHOW_DETAIL, api_visibility="private")
        self.sends(self.use.click, self._take, chosen)
        page.changes += [
            self.on([rename.click, self.name.submit], self._rename, [self.chosen, self.name]),
            self.delete.tie(self, self._ask, self._remove, self.chosen),
            added,
        ]
        self.downloads(native, library.native_zip, chosen)
        self.downloads(self.lora, library.lora_file, chosen)
        gr.api(self.adapters, api_name="adapters")

    @handler
    def adapters(self) -> list[dict[str, Any]]:
        """List the adapters of the library, the newest first; num_bytes are those of their files.

        kind is "subject" or "control"; why_not says why one cannot be used with this base.
        """
        self.studio.keep_finished()
        names = ("id", "name", "kind", "method", "fits_base", "why_not", "trigger", "num_bytes")
        listed = [{name: getattr(card, name) for name in names} for card in self.studio.library.cards()]
        return [{**facts, "why_not": without_paths(facts["why_not"])} for facts in listed]

    def _refresh(self, chosen: str) -> Updates:
        """Show the adapters there are, those of runs that have finished meanwhile, too."""
        self.studio.keep_finished()
        return self._list(chosen)

    def _list(self, chosen: str) -> Updates:
        cards = self.studio.library.cards()
        listing = Markup("").join(_card_html(card, is_chosen=card.id == chosen) for card in cards)
        page = Markup('<div class="cards">{}</div>').format(listing)
        return {
            self.empty: gr.update(visible=not cards),
            self.cards: gr.update(value=page, visible=bool(cards)),
        }

    def _show(self, card: Card) -> Updates:
        can_draw, notes = card.fits_base and card.kind == "subject", Markup("")
        if not card.fits_base:
            heading = "It cannot be used with this studio's base"
            notes = notes_html(heading, [sentence(card.why_not)], kind="warning")
        elif card.kind == "control":
            notes = notes_html("It follows a control image: choose it in the tab Control.")
        elif card.why_not:
            notes = notes_html("Good to know", [sentence(card.why_not)])
        return {
            **self._list(card.id),
            self.chosen: card.id,
            self.detail: gr.update(visible=True),
            self.head: Markup("<h2>{}</h2>{}{}").format(card.name, facts_html(_facts(card)), notes),
            self.use: gr.update(visible=can_draw),
            self.lora: gr.update(visible=can_draw),
            self.name: card.name,
            **self.delete.hide(),
        }

    def _choose(self, event: gr.EventData) -> Updates:
        return self._show(self.studio.library.card(str(told_by(event).get("adapter"))))

    def _rename(self, adapter_id: str, name: str) -> Updates:
        return self._show(self.studio.library.rename(adapter_id, name))

    def _ask(self, adapter_id: str) -> str:
        name = self.studio.library.card(adapter_id).name
        return f"Delete {name}? Its files are gone then; pictures drawn with it stay."

    def _remove(self, adapter_id: str) -> Updates:
        self.studio.library.delete(adapter_id)
        return {**self._list(""), self.detail: gr.update(visible=False), self.chosen: ""}

    def _add(self, files: list[str] | None) -> Iterator[Updates]:
        """Take an adapter, and its files out of the field, also where they are refused."""
        yield {self.dropped: None}
        yield self._show(self.studio.library.import_upload([Path(file) for file in files or []]))

    def _take(self, adapter_id: str) -> Restored:
        """Return what draws with the adapter on show, for the tab Create."""
        card = self.studio.library.card(adapter_id)
        if not card.fits_base:
            raise ValueError(f"{card.name} cannot be used here: {card.why_not}")
        return request_with(self.studio, card.id, card.trigger)


def _card_html(card: Card, *, is_chosen: bool) -> Markup:
    address = None if card.thumbnail is None else data_address(card.thumbnail, THUMBNAIL_SIDE)
    picture = card.name[:1].upper() if address is None else Markup('<img alt="" src="{}">').format(address)
    mark = Markup("")
    if not card.fits_base:
        other = "For other weights" if card.match == "other weights" else "For another base"
        mark = Markup('<span class="mark unfit">{}</span>').format(other if card.method else "Cannot be read")
    elif card.kind == "control":
        mark = Markup('<span class="mark">Control</span>')
    size, day = kilobytes(card.num_bytes), f"{card.created.astimezone():%d %b %Y}"
    lines = [f"{size} · {day}"]
    if card.method:
        learned = card.method if card.steps is None else f"{card.method} · {card.steps} steps"
        of_base = " · ".join(filter(None, [card.base_name, size]))
        called = f"“{card.trigger}”" * bool(card.trigger)
        lines = [*filter(None, (learned, called)), of_base, f"{day} · {card.hash[:8]}"]
    spans = Markup("").join(Markup('<span class="line">{}</span>').format(line) for line in lines)
    pressed = "true" if is_chosen else "false"
    return _CARD.format(id=card.id, pressed=pressed, picture=picture, name=card.name, lines=spans, mark=mark)


def _facts(card: Card) -> list[tuple[str, str]]:
    facts = {
        "Kind": card.kind.capitalize(), "Method": card.method, "Base": card.base_name,
        "Call it by": card.trigger, "Steps": "" if card.steps is None else str(card.steps),
        "Size": kilobytes(card.num_bytes),
        "Numbers in it": f"{card.num_parameters:,}" if card.num_parameters else "",
        "Hash": card.hash[:16], "Added": f"{card.created.astimezone():%d %b %Y, %H:%M}",
    }  # fmt: skip
    return [(name, value) for name, value in facts.items() if value]
