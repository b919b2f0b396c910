"""The tab History: everything drawn in this folder, newest first, to look at, fetch and draw again."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import SavedPicture
from ether_diffusion.ui.facts import counted
from ether_diffusion.ui.requests import MAX_PROMPT
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.parts import TabParts, Updates
from ether_diffusion.ui.tabs.picture_detail import PictureDetail

PAGE = 48
"""Pictures that are shown at first, and that each press of the button adds."""
ANY = "Any adapter"
EMPTY = '<div class="empty"><p>Nothing here yet. What you draw is kept, and shown here.</p></div>'
NOT_FOUND = '<div class="empty"><p>No picture is like that. Change what you look for.</p></div>'
SAVE_AS = """(file) => { if (!file) return; const link = document.createElement("a");
  link.href = file.url; link.download = file.orig_name; link.click(); }"""


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("History", id="history") as tab:
        page = HistoryTab(studio)
    page.tie(tab)
    return TabParts(tab, sendings=[page.detail.sending])


class HistoryTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        with gr.Row(elem_classes="search-row"):
            self.text = gr.Textbox(
                label="Words in the prompt", max_length=MAX_PROMPT, scale=3, min_width=200,
                elem_id="history-text",
            )  # fmt: skip
            self.adapter = gr.Dropdown(
                [ANY], value=ANY, label="Adapter", min_width=160, elem_id="history-adapter"
            )
            self.base = gr.Checkbox(
                False, label="Pictures of the base, too", min_width=160, elem_id="history-base"
            )
        self.empty = gr.HTML(EMPTY, elem_id="history-empty")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300):
                self.gallery = gr.Gallery(
                    visible=False, label="Pictures", show_label=False, format="png", columns=4, height="auto",
                    buttons=[], allow_preview=False, interactive=False, object_fit="cover",
                    elem_id="history-gallery",
                )  # fmt: skip
                self.more = gr.Button("Show more", visible=False, elem_id="history-more")
            self.detail = PictureDetail("history", studio)
        self.all = gr.Button("Download all", visible=False, elem_id="history-all")
        self.archive = gr.DownloadButton(visible="hidden")
        self.ids, self.count = gr.State([]), gr.State(PAGE)

    def tie(self, tab: gr.Tab) -> None:
        """Tie the events.

        Opening the tab and typing are one event, of which the last is answered last: a tab that was opened
        a moment ago does not show everything again when a word was typed since.
        """
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        looked_for = [self.text, self.adapter, self.base]
        found = [self.adapter, self.empty, self.gallery, self.more, self.all, self.ids, self.count]
        gr.on(
            [tab.select, self.text.change, self.adapter.input, self.base.input],
            handler(self.search), looked_for, found, trigger_mode="always_last", **quiet,
        )  # fmt: skip
        self.more.click(handler(self.show_more), [*looked_for, self.count], found, **quiet)
        self.gallery.select(handler(self.select), [self.ids], self.detail.all(), **quiet)
        zipped = self.all.click(handler(self.zip), looked_for, [self.archive], api_visibility="private")
        zipped.success(None, [self.archive], None, js=SAVE_AS, api_visibility="private")

    def search(self, text: str, adapter: str, with_base: bool) -> Updates:
        """Show the pictures that are looked for, and offer the adapters that any was drawn with."""
        names = [ANY, *self._studio.history.adapters()]
        nothing = NOT_FOUND if text or adapter != ANY else EMPTY
        shown = self._show(self._find(text, adapter, with_base), PAGE, nothing)
        return {self.adapter: gr.update(choices=names), **shown}

    def show_more(self, text: str, adapter: str, with_base: bool, count: int) -> Updates:
        """Show more of what was found."""
        return self._show(self._find(text, adapter, with_base), count + PAGE, NOT_FOUND)

    def _find(self, text: str, adapter: str, with_base: bool) -> list[SavedPicture]:
        name = "" if adapter == ANY else adapter
        return self._studio.history.pictures(text=text, adapter=name, with_base=with_base)

    def _show(self, found: list[SavedPicture], count: int, nothing: str) -> Updates:
        shown = found[:count]
        pictures = [(picture.path, _caption(picture)) for picture in shown]
        words = f"Download {counted(len(found), 'picture')} as a zip"
        return {
            self.empty: gr.update(value=nothing, visible=not found),
            self.gallery: gr.update(value=pictures, visible=bool(found), selected_index=None),
            self.more: gr.update(visible=len(found) > count),
            self.all: gr.update(visible=bool(found), value=words),
            self.ids: [picture.id for picture in shown],
            self.count: count,
        }

    def select(self, ids: list[str], chosen: gr.SelectData) -> Mapping[Any, Any]:
        """Show a picture large with all that it says of itself."""
        if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(ids):
            return {}
        return self.detail.show(self._studio.history.picture(ids[chosen.index]))

    def zip(self, text: str, adapter: str, with_base: bool) -> Path:
        """Return a zip of all the pictures that are looked for."""
        target = Path(self.archive.GRADIO_CACHE) / secrets.token_hex(16) / "pictures.zip"
        return self._studio.history.write_zip(self._find(text, adapter, with_base), target)


def _caption(picture: SavedPicture) -> str:
    said = picture.metadata
    return "" if said is None or not said.prompt else said.prompt[:60]
