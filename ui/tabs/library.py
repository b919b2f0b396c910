"""The tab Library: the adapters there are, to look at, name, fetch, add and delete; also /adapters."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.library import GONE, Card
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.tabs.page import EMPTY, QUIET, SAVE_AS, STRENGTHS, DeleteButton, Form, Page, Updates
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
SHOW_DETAIL = """() => { if (window.innerWidth <= 760) document.getElementById("library-detail")
  .scrollIntoView({ behavior: "smooth" }); }"""
CHOOSE = """element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-adapter]");
  if (card) trigger("click", { adapter: card.dataset.adapter });
});"""
_CARD = Markup(
    '<button type="button" class="card" data-adapter="{id}" aria-pressed="{pressed}">'
    '<span class="look-of" aria-hidden="true">{picture}</span><span class="words">'
    '<span class="name">{name}</span>{lines}{mark}</span></button>'
)


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("Library", id="library") as tab:
        library = LibraryTab(page)
        gr.api(library.adapters, api_name="adapters")
    for event in (gr.context.Context.root_block.load, tab.select):
        event(handler(library.refresh), [library.chosen], [library.empty, library.cards], **QUIET)


class LibraryTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page) -> None:
        self._page, self._studio, library = page, page.studio, page.studio.library
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300, elem_classes="settings"):
                none_yet = EMPTY.format("No adapters yet. Train one, or add one that you have.")
                self.empty = gr.HTML(none_yet, elem_id="library-empty")
                self.cards = gr.HTML(js_on_load=CHOOSE, visible=False, elem_id="library-cards")
                self.dropped = gr.File(
                    label="Add an adapter: its zip, or its .safetensors with its .json",
                    file_count="multiple", file_types=[".zip", ".safetensors", ".json"], height=104,
                    elem_id="library-drop", elem_classes="drop",
                )  # fmt: skip
            beside: dict[str, Any] = {"elem_classes": "results", "elem_id": "library-detail"}
            with gr.Column(scale=2, min_width=300, visible=False, **beside) as self.detail:
                self.head = gr.HTML(elem_id="library-head")
                self.use = gr.Button("Use in Create", variant="primary", elem_id="library-use")
                with gr.Row(elem_classes="tool-row"):
                    native = gr.Button("Zip file", size="md", elem_id="library-zip")
                    self.lora = gr.Button("LoRA file", size="md", elem_id="library-lora")
                with gr.Row(elem_classes="seed-row"):
                    one: dict[str, Any] = {"max_lines": 1, "max_length": MAX_CHARACTERS, "min_width": 140}
                    self.name = gr.Textbox(label="Name", scale=3, elem_id="library-name", **one)
                    rename = gr.Button("Rename", size="sm", min_width=84, scale=1, elem_id="library-rename")
                self.delete = DeleteButton("library", "Delete …")
        self.chosen = gr.State("")
        file, chosen = gr.DownloadButton(visible="hidden"), [self.chosen]
        shown: list[Any] = [
            self.empty, self.cards, self.chosen, self.detail, self.head, self.use, self.lora, self.name,
            self.delete.box,
        ]  # fmt: skip
        opened = self.cards.click(handler(self._choose), None, shown, **QUIET)
        opened.success(None, js=SHOW_DETAIL, api_visibility="private")
        page.sendings.append(self.use.click(handler(self._take), chosen, [page.restored], **QUIET))
        named, renaming = [self.chosen, self.name], [rename.click, self.name.submit]
        page.changes += [
            gr.on(renaming, handler(self._rename), named, shown, **QUIET),
            self.delete.tie(self._ask, self._remove, self.chosen, shown),
            self.dropped.upload(handler(self._add), [self.dropped], [*shown, self.dropped], **QUIET),
        ]
        for button, write in ((native, library.native_zip), (self.lora, library.lora_file)):
            told: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": [button]}
            written = button.click(handler(write), chosen, [file], api_visibility="private", **told)
            written.success(None, [file], None, js=SAVE_AS, api_visibility="private")

    @handler
    def adapters(self) -> list[dict[str, Any]]:
        """List the adapters of the library, the newest first; num_bytes are those of their files.

        kind is "subject" or "control"; why_not says why one cannot be used with this base.
        """
        self._studio.keep_finished()
        names = ("id", "name", "kind", "method", "fits_base", "why_not", "trigger", "num_bytes")
        listed = [{name: getattr(card, name) for name in names} for card in self._studio.library.cards()]
        return [{**facts, "why_not": without_paths(facts["why_not"])} for facts in listed]

    def refresh(self, chosen: str) -> Updates:
        """Show the adapters there are, those of runs that have finished meanwhile, too."""
        self._studio.keep_finished()
        return self._list(chosen)

    def _list(self, chosen: str) -> Updates:
        cards = self._studio.library.cards()
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
            self.delete.box: gr.update(visible=False),
        }

    def _choose(self, event: gr.EventData) -> Updates:
        adapter_id = event._data.get("adapter") if isinstance(event._data, dict) else None
        if not isinstance(adapter_id, str):
            raise FileNotFoundError(GONE)
        return self._show(self._studio.library.card(adapter_id))

    def _rename(self, adapter_id: str, name: str) -> Updates:
        return self._show(self._studio.library.rename(adapter_id, name))

    def _ask(self, adapter_id: str) -> str:
        name = self._studio.library.card(adapter_id).name
        return f"Delete {name}? Its files are gone then; pictures drawn with it stay."

    def _remove(self, adapter_id: str) -> Updates:
        self._studio.library.delete(adapter_id)
        return {**self._list(""), self.detail: gr.update(visible=False), self.chosen: ""}

    def _add(self, files: list[str] | None) -> Iterator[Updates]:
        try:
            card = self._studio.library.import_upload([Path(file) for file in files or []])
        except Exception:
            yield {self.dropped: None}
            raise
        yield {**self._show(card), self.dropped: None}

    def _take(self, adapter_id: str) -> Restored:
        """Return what draws with the adapter on show, for the tab Create."""
        card = self._studio.library.card(adapter_id)
        if not card.fits_base:
            raise ValueError(f"{card.name} cannot be used here: {card.why_not}")
        return request_with(self._studio, card.id, card.trigger)


class MixBox:
    """What keeps the adapters that a form has, at their strengths, as one; made inside the form."""

    def __init__(self, form: Form) -> None:
        self._form, mix = form, f"{form.prefix}-mix"
        self._open = gr.Button("Save this mix …", size="sm", visible=False, elem_id=mix)
        with gr.Column(visible=False, elem_classes="confirm", elem_id=f"{mix}-box") as self._box:
            one: dict[str, Any] = {"max_lines": 1, "max_length": MAX_CHARACTERS}
            self._name = gr.Textbox(label="Name of the mix", elem_id=f"{mix}-name", **one)
            with gr.Row(elem_classes="tool-row"):
                self._save = gr.Button("Save", variant="primary", elem_id=f"{mix}-save")
                self._leave = gr.Button("Cancel", elem_id=f"{mix}-not")

    def tie(self, page: Page) -> None:
        """Tie the events; a mix that was saved is chosen instead of what it was made of."""
        form, shown = self._form, [self._box, self._name]
        chosen, sliders = form["adapters"], [form[name] for name in STRENGTHS]
        offered = [self._open, self._box]
        chosen.change(handler(self._offer), [chosen], offered, **QUIET)
        self._open.click(handler(self._ask), [chosen], shown, **QUIET)
        self._leave.click(lambda: gr.update(visible=False), None, [self._box], **QUIET)
        given, told = (
            [chosen, self._name, *sliders],
            {"show_progress": "minimal", "show_progress_on": [self._save]},
        )
        saved = gr.on(
            [self._save.click, self._name.submit], handler(self._keep), given, [chosen, *sliders, *offered],
            api_visibility="private", **told,
        )  # fmt: skip
        page.changes.append(saved)

    def _offer(self, chosen: Sequence[str] | None) -> Updates:
        return {self._open: gr.update(visible=len(chosen or []) > 1), self._box: gr.update(visible=False)}

    def _ask(self, chosen: Sequence[str]) -> Updates:
        names = self._form.names()
        usual = " + ".join(names[each] for each in chosen if each in names)[:MAX_CHARACTERS]
        return {self._box: gr.update(visible=True), self._name: usual}

    def _keep(self, chosen: Sequence[str], name: str, *strengths: float) -> Updates:
        card = self._form.studio.library.mix(dict(zip(chosen, strengths, strict=False)), name)
        gr.Info(f"{html.escape(card.name)} is in the library, and chosen here.")
        return {**self._form.shown({"adapters": {card.id: 1.0}}), **self._offer([card.id])}


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
