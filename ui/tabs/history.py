"""The tab History: everything drawn in this folder, newest first, to look at, fetch and draw again."""

import secrets
from pathlib import Path

import gradio as gr
from gradio.blocks import Block

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import counted, facts_html, notes_html, picture_facts
from ether_diffusion.ui.jobs import SavedPicture
from ether_diffusion.ui.requests import MAX_PROMPT
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.drawing_tab import EMPTY, thumbnails
from ether_diffusion.ui.tabs.parts import QUIET, SMALL, Sending, TabParts, Updates

PAGE = 48
"""Pictures that are shown at first, and that each press of the button adds."""
ANY = "Any adapter"
NOTHING = EMPTY.format("Nothing here yet. What you draw is kept, and shown here.")
NOT_FOUND = EMPTY.format("No picture is like that. Change what you look for.")
SAVE_AS = """(file) => { if (!file) return; const link = document.createElement("a");
  link.href = file.url; link.download = file.orig_name; link.click(); }"""


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("History", id="history") as tab:
        page = HistoryTab(studio)
    page.tie(tab)
    return TabParts(tab, sendings=[page.detail.sending])


class PictureDetail:
    """One picture shown large, with what it says of itself, to fetch and to draw again; hidden at first."""

    def __init__(self, prefix: str, studio: Studio) -> None:
        """Lay out a column inside a row and tie its events; ids begin with `prefix`."""
        self._studio = studio
        look = ["picture", "sharp"] if studio.engine.native_size < SMALL else ["picture"]
        with gr.Column(scale=2, min_width=300, visible=False, elem_classes="results") as self.column:
            self.picture = gr.Image(
                label="Picture", show_label=False, format="png", type="filepath", buttons=["fullscreen"],
                interactive=False, elem_id=f"{prefix}-picture", elem_classes=look,
            )  # fmt: skip
            self.facts = gr.HTML(elem_id=f"{prefix}-facts")
            with gr.Row(equal_height=True):
                self.use = gr.Button("Use these settings", variant="primary", elem_id=f"{prefix}-use")
                self.fetch = gr.DownloadButton("Download PNG", elem_id=f"{prefix}-download")
        self.selected, restored = gr.State(""), gr.State()
        used = self.use.click(handler(self.take), [self.selected], [restored], **QUIET)
        self.sending = Sending(used, restored)

    def all(self) -> list[Block]:
        """Return what `show` and `hide` give values to."""
        return [self.column, self.picture, self.facts, self.fetch, self.use, self.selected]

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
        }

    def hide(self) -> Updates:
        """Show nothing."""
        return {self.column: gr.update(visible=False), self.picture: None, self.selected: ""}

    def take(self, picture_id: str) -> Restored:
        """Return the settings of the picture, to draw with."""
        return restore(self._studio.history.picture(picture_id).path, self._studio)


class HistoryTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, studio: Studio) -> None:
        self._history = studio.history
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
        self.empty = gr.HTML(NOTHING, elem_id="history-empty")
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=3, min_width=300):
                self.gallery = thumbnails("history-gallery")
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
        wanted = [self.text, self.adapter, self.base]
        found = [self.adapter, self.empty, self.gallery, self.more, self.all, self.ids, self.count]
        gr.on(
            [tab.select, self.text.change, self.adapter.input, self.base.input],
            handler(self.search), wanted, found, trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.more.click(handler(self.show_more), [*wanted, self.count], found, **QUIET)
        self.gallery.select(handler(self.select), [self.ids], self.detail.all(), **QUIET)
        zipped = self.all.click(handler(self.zip), wanted, [self.archive], api_visibility="private")
        zipped.success(None, [self.archive], None, js=SAVE_AS, api_visibility="private")

    def search(self, text: str, adapter: str, with_base: bool) -> Updates:
        """Show the pictures that are looked for, and offer the adapters that any was drawn with."""
        names = gr.update(choices=[ANY, *self._history.adapters()])
        return {**self.show_more(text, adapter, with_base, 0), self.adapter: names}

    def show_more(self, text: str, adapter: str, with_base: bool, count: int) -> Updates:
        """Show a page more of what was found."""
        found, count = self._find(text, adapter, with_base), count + PAGE
        pictures = [(picture.path, _caption(picture)) for picture in found[:count]]
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

    def select(self, ids: list[str], chosen: gr.SelectData) -> Updates:
        """Show a picture large with all that it says of itself."""
        is_there = chosen.index in range(len(ids))
        return self.detail.show(self._history.picture(ids[chosen.index])) if is_there else {}

    def zip(self, text: str, adapter: str, with_base: bool) -> Path:
        """Return a zip of all the pictures that are looked for."""
        target = Path(self.archive.GRADIO_CACHE) / secrets.token_hex(16) / "pictures.zip"
        return self._history.write_zip(self._find(text, adapter, with_base), target)

    def _find(self, text: str, adapter: str, with_base: bool) -> list[SavedPicture]:
        name = "" if adapter == ANY else adapter
        return self._history.pictures(text=text, adapter=name, with_base=with_base)


def _caption(picture: SavedPicture) -> str:
    said = picture.metadata
    return "" if said is None or not said.prompt else said.prompt[:60]
