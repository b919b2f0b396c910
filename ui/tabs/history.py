"""The tab History: everything drawn in this folder, newest first, to look at, fetch and draw again."""

import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.ui.jobs import SavedPicture
from ether_diffusion.ui.requests import MAX_PROMPT
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.tabs.page import EMPTY, LOOK, QUIET, SAVE_AS, DeleteButton, Page, Updates
from ether_diffusion.ui.words import counted, facts_html, handler, notes_html, picture_facts

PAGE = 48
"""Pictures that are shown at first, and that each press of the button adds."""
ANY = "Any adapter"
NOTHING = EMPTY.format("Nothing here yet. What you draw is kept, and shown here.")
NOT_FOUND = EMPTY.format("No picture is like that. Change what you look for.")


class PictureDetail:
    """One picture shown large, with what it says of itself, to fetch and to draw again; hidden at first."""

    def __init__(self, prefix: str, page: Page) -> None:
        """Lay out a column inside a row and tie its events; ids begin with `prefix`."""
        self._studio = page.studio
        with gr.Column(scale=2, min_width=300, visible=False, elem_classes="results") as self.column:
            self.picture = gr.Image(elem_id=f"{prefix}-picture", **LOOK)
            self.facts = gr.HTML(elem_id=f"{prefix}-facts")
            with gr.Row(equal_height=True):
                self.use = gr.Button("Use these settings", variant="primary", elem_id=f"{prefix}-use")
                self.fetch = gr.DownloadButton("Download PNG", elem_id=f"{prefix}-download")
            close = gr.Button("Close", size="sm", elem_id=f"{prefix}-close")
            self.delete = DeleteButton(prefix, "Delete this picture …")
        self.selected = gr.State("")
        page.sendings.append(self.use.click(handler(self._take), [self.selected], [page.restored], **QUIET))
        self.shown: list[Any] = [
            self.column, self.picture, self.facts, self.fetch, self.use, self.selected, self.delete.box
        ]  # fmt: skip
        close.click(handler(self.hide), None, self.shown, **QUIET)
        ask = "Delete this picture? Its file is gone then."
        self.deleted = self.delete.tie(lambda _: ask, self._delete, self.selected, self.shown)

    def show(self, picture: SavedPicture) -> Updates:
        """Show a picture with all that it says of itself."""
        said = picture.metadata
        nothing = notes_html("This picture does not say how it was made")
        return {
            self.column: gr.update(visible=True),
            self.picture: picture.path,
            self.facts: nothing if said is None else facts_html(picture_facts(said)),
            self.fetch: gr.update(value=picture.path),
            self.use: gr.update(interactive=said is not None),
            self.selected: picture.id,
            self.delete.box: gr.update(visible=False),
        }

    def hide(self) -> Updates:
        """Show nothing."""
        return {self.column: gr.update(visible=False), self.picture: None, self.selected: ""}

    def _delete(self, picture_id: str) -> Updates:
        self._studio.history.delete(picture_id)
        return self.hide()

    def _take(self, picture_id: str) -> Restored:
        return restore(self._studio.history.picture(picture_id).path, self._studio)


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("History", id="history") as tab:
        HistoryTab(page, tab)


class HistoryTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page, tab: gr.Tab) -> None:
        self._history = page.studio.history
        with gr.Row(elem_classes="search-row"):
            words: dict[str, Any] = {"scale": 3, "min_width": 200, "elem_id": "history-text"}
            text = gr.Textbox(label="Words in the prompt", max_length=MAX_PROMPT, **words)
            narrow: dict[str, Any] = {"min_width": 160}
            any_one = {"value": ANY, "label": "Adapter", "elem_id": "history-adapter"}
            self.adapter = gr.Dropdown([ANY], **any_one, **narrow)
            of_base = {"label": "Pictures of the base, too", "elem_id": "history-base"}
            base = gr.Checkbox(False, **of_base, **narrow)
        self.empty = gr.HTML(NOTHING, elem_id="history-empty")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300):
                self.gallery = Page.thumbnails("history-gallery")
                self.more = gr.Button("Show more", visible=False, elem_id="history-more")
            self.detail = PictureDetail("history", page)
        self.all = gr.Button("Download all", visible=False, elem_id="history-all")
        self.archive = gr.DownloadButton(visible="hidden")
        self.ids, self.count = gr.State([]), gr.State(PAGE)
        wanted: list[Any] = [text, self.adapter, base]
        found: list[Any] = [
            self.adapter, self.empty, self.gallery, self.more, self.all, self.ids, self.count
        ]  # fmt: skip
        # opening the tab and typing are one event, of which the last is answered last: a tab that was opened
        # a moment ago does not show everything again when a word was typed since
        asked: list[Any] = [tab.select, text.change, self.adapter.input, base.input]
        shown = [*found, *self.detail.shown]
        gr.on(asked, handler(self._search), wanted, shown, trigger_mode="always_last", **QUIET)
        self.detail.deleted.success(handler(self._search), wanted, shown, **QUIET)
        self.more.click(handler(self._show_more), [*wanted, self.count], found, **QUIET)
        self.gallery.select(handler(self._select), [self.ids], self.detail.shown, **QUIET)
        zipped = self.all.click(handler(self._zip), wanted, [self.archive], api_visibility="private")
        zipped.success(None, [self.archive], None, js=SAVE_AS, api_visibility="private")

    def _search(self, text: str, adapter: str, with_base: bool) -> Updates:
        """Show the pictures that are looked for, and offer the adapters that any was drawn with."""
        names = gr.update(choices=[ANY, *self._history.adapters()])
        found = self._show_more(text, adapter, with_base, 0)
        return {**found, **({} if found[self.ids] else self.detail.hide()), self.adapter: names}

    def _show_more(self, text: str, adapter: str, with_base: bool, count: int) -> Updates:
        found, count = self._find(text, adapter, with_base), count + PAGE
        said = [(picture.path, picture.metadata) for picture in found[:count]]
        pictures = [(path, ((each and each.prompt) or "")[:60]) for path, each in said]
        nothing = NOT_FOUND if text or adapter != ANY else NOTHING
        words = f"Download {counted(len(found), 'picture')} as a zip"
        return {
            self.empty: gr.update(value=nothing, visible=not found),
            self.gallery: gr.update(value=pictures, visible=bool(found), selected_index=None),
            self.more: gr.update(visible=len(found) > count),
            self.all: gr.update(visible=bool(found), value=words),
            self.ids: [picture.id for picture in found[:count]],
            self.count: count,
        }

    def _select(self, ids: list[str], chosen: gr.SelectData) -> Updates:
        is_there = chosen.index in range(len(ids))
        return self.detail.show(self._history.picture(ids[chosen.index])) if is_there else {}

    def _zip(self, text: str, adapter: str, with_base: bool) -> Path:
        target = Path(self.archive.GRADIO_CACHE) / secrets.token_hex(16) / "pictures.zip"
        return self._history.write_zip(self._find(text, adapter, with_base), target)

    def _find(self, text: str, adapter: str, with_base: bool) -> list[SavedPicture]:
        name = "" if adapter == ANY else adapter
        return self._history.pictures(text=text, adapter=name, with_base=with_base)
