"""One picture of ours shown large, with what it says of itself, to fetch and to draw again."""

import gradio as gr
from gradio.blocks import Block

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.events import SavedPicture
from ether_diffusion.ui.facts import facts_html, notes_html, picture_facts
from ether_diffusion.ui.restore import Restored, restore
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.parts import SMALL, Sending, Updates


class PictureDetail:
    """The widgets, which appear with the first picture."""

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
        used = self.use.click(
            handler(self.take),
            [self.selected],
            [restored],
            api_visibility="private",
            show_progress="hidden",
        )
        self.sending = Sending(used, restored)

    def all(self) -> list[Block]:
        """Return what `show` and `hide` give values to."""
        return [self.column, self.picture, self.facts, self.fetch, self.use, self.selected]

    def show(self, picture: SavedPicture) -> Updates:
        """Show a picture with all that it says of itself."""
        if picture.metadata is None:
            said = notes_html("This picture does not say how it was made", ())
        else:
            said = facts_html(picture_facts(picture.metadata))
        return {
            self.column: gr.update(visible=True),
            self.picture: picture.path,
            self.facts: said,
            self.fetch: gr.update(value=picture.path),
            self.use: gr.update(interactive=picture.metadata is not None),
            self.selected: picture.id,
        }

    def hide(self) -> Updates:
        """Show nothing."""
        return {self.column: gr.update(visible=False), self.picture: None, self.selected: ""}

    def take(self, picture_id: str) -> Restored:
        """Return the settings of the picture, to draw with."""
        return restore(self._studio.history.picture(picture_id).path, self._studio)
