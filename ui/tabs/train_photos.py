"""The photos of a subject: dropped, looked at by us, shown small, and those left out with the reason."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from markupsafe import Markup
from PIL import Image

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import counted
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import browser_state
from ether_diffusion.ui.tabs.parts import Updates
from ether_diffusion.ui.uploads import Accepted, Refused, add_photos, note_photos, recall_photos

ADVICE = "Four to ten photos that show it from several sides, in several places. A zip will do, too."
_TABLE = Markup(
    '<table class="reasons"><caption>{} left out</caption><thead><tr><th scope="col">File</th>'
    '<th scope="col">Why</th></tr></thead><tbody>{}</tbody></table>'
)


class TrainPhotos:
    """The widgets and what they do; made inside the form."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self.dropped = gr.File(
            label="Photos", file_count="multiple", height=104, elem_id="train-photos", elem_classes="drop"
        )
        self.said = gr.HTML(_said([]), elem_id="train-photos-said")
        self.gallery = gr.Gallery(
            visible=False, label="Photos to learn from", show_label=False, format="png", columns=5,
            height="auto", buttons=[], allow_preview=False, interactive=False, object_fit="cover",
            elem_id="train-gallery",
        )  # fmt: skip
        with gr.Row(visible=False, elem_classes="tool-row") as self.tools:
            self.leave_out = gr.Button(
                "Leave out the chosen one", size="sm", interactive=False, elem_id="train-leave-out"
            )
            self.clear = gr.Button("Start over", size="sm", elem_id="train-clear")
        self.refused = gr.HTML(visible=False, elem_id="train-refused")
        self.kept = browser_state("photos", [])
        self.selected = gr.State(-1)
        self._tie()

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown: list[Component] = [
            self.dropped, self.said, self.gallery, self.tools, self.refused, self.kept, self.selected,
            self.leave_out,
        ]  # fmt: skip
        self.dropped.upload(
            handler(self.take), [self.dropped, self.kept], shown, api_visibility="private",
            show_progress="minimal", show_progress_on=[self.dropped],
        )  # fmt: skip
        self.gallery.select(handler(self.select), None, [self.selected, self.leave_out], **quiet)
        self.leave_out.click(handler(self.remove), [self.selected, self.kept], shown, **quiet)
        self.clear.click(handler(lambda: self._show([])), None, shown, **quiet)
        gr.context.Context.root_block.load(handler(self.recall), [self.kept], shown, **quiet)

    def accepted(self, kept: object) -> list[Accepted]:
        """Return the photos that the browser says were added and that are still there."""
        return recall_photos(kept, self._studio.runs.photos)

    def take(self, files: list[str] | None, kept: object) -> Updates:
        """Look at dropped files: show what can be used, and why the rest cannot."""
        with self._studio.reading:
            report = self._studio.runs.check_photos([Path(file) for file in files or []])
        both = add_photos(self.accepted(kept), report)
        return self._show(both.accepted, both.refused)

    def recall(self, kept: object) -> Updates:
        """Show the photos that were there before the page was loaded again."""
        photos = self.accepted(kept)
        return self._show(photos) if photos else {}

    def select(self, chosen: gr.SelectData) -> Updates:
        """Know which photo was chosen."""
        index = chosen.index if isinstance(chosen.index, int) else -1
        return {self.selected: index, self.leave_out: gr.update(interactive=index >= 0)}

    def remove(self, selected: int, kept: object) -> Updates:
        """Leave out one photo."""
        return self._show([photo for index, photo in enumerate(self.accepted(kept)) if index != selected])

    def _show(self, photos: Sequence[Accepted], refused: Sequence[Refused] = ()) -> Updates:
        pictures = [(_opened(photo.thumbnail), photo.name) for photo in photos]
        row = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
        rows = Markup("").join(row.format(each.name, each.reason) for each in refused)
        table = _TABLE.format(counted(len(refused), "file"), rows)
        return {
            self.dropped: None,
            self.said: _said(photos),
            self.gallery: gr.update(value=pictures, visible=bool(photos), selected_index=None),
            self.tools: gr.update(visible=bool(photos)),
            self.refused: gr.update(value=table, visible=bool(refused)),
            self.kept: note_photos(photos),
            self.selected: -1,
            self.leave_out: gr.update(interactive=False),
        }


def _said(photos: Sequence[Accepted]) -> str:
    words = f"{counted(len(photos), 'photo')} to learn from." if photos else ADVICE
    more = " A few more will make it better." if 0 < len(photos) < 3 else ""
    notes = [f"{photo.name} {photo.note}" for photo in photos if photo.note]
    listing = Markup("").join(Markup("<li>{}</li>").format(note) for note in notes)
    said = Markup('<p class="quiet">{}{}</p>').format(words, more)
    return said + Markup('<ul class="quiet">{}</ul>').format(listing) if notes else said


def _opened(thumbnail: Path) -> Image.Image:
    with Image.open(thumbnail) as image:
        return image.copy()
