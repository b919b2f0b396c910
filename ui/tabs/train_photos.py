"""The photos of a subject: dropped, looked at by us, shown small, and those left out with the reason."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import counted
from ether_diffusion.ui.photo_shelf import add_photos, note_photos, recall_photos
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.keep_form import browser_state
from ether_diffusion.ui.tabs.parts import Updates
from ether_diffusion.ui.uploads import Accepted, Refused

ADVICE = "Four to ten photos that show it from several sides, in several places. A zip will do, too."


class TrainPhotos:
    """The widgets and what they do; made inside the form."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self.dropped = gr.File(
            label="Photos",
            file_count="multiple",
            height=104,
            elem_id="train-photos",
            elem_classes="drop",
        )
        self.said = gr.HTML(f'<p class="quiet">{ADVICE}</p>', elem_id="train-photos-said")
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
        self._selected = gr.State(-1)
        self._tie()

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown = self._shown()
        self.dropped.upload(
            handler(self.take), [self.dropped, self.kept], shown, api_visibility="private",
            show_progress="minimal", show_progress_on=[self.dropped],
        )  # fmt: skip
        self.gallery.select(handler(self.select), None, [self._selected, self.leave_out], **quiet)
        self.leave_out.click(handler(self.remove), [self._selected, self.kept], shown, **quiet)
        self.clear.click(handler(self.remove_all), None, shown, **quiet)
        gr.context.Context.root_block.load(handler(self.recall), [self.kept], shown, **quiet)

    def _shown(self) -> list[Component]:
        return [
            self.dropped, self.said, self.gallery, self.tools, self.refused, self.kept, self._selected,
            self.leave_out,
        ]  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where checked photos wait until a run has its own copies."""
        return self._studio.runs.photos

    def accepted(self, kept: object) -> list[Accepted]:
        """Return the photos that the browser says were added and that are still there."""
        return recall_photos(kept, self.folder)

    def take(self, files: list[str] | None, kept: object) -> Updates:
        """Look at dropped files: show what can be used, and why the rest cannot."""
        with self._studio.reading:
            report = self._studio.runs.check_photos([Path(file) for file in files or []])
        both = add_photos(self.accepted(kept), report)
        return self._show(both.accepted, both.refused)

    def recall(self, kept: object) -> Updates:
        """Show the photos that were there before the page was loaded again."""
        photos = self.accepted(kept)
        return self._show(photos, ()) if photos else {}

    def select(self, chosen: gr.SelectData) -> Updates:
        """Know which photo was chosen."""
        index = chosen.index if isinstance(chosen.index, int) else -1
        return {self._selected: index, self.leave_out: gr.update(interactive=index >= 0)}

    def remove(self, selected: int, kept: object) -> Updates:
        """Leave out one photo."""
        photos = self.accepted(kept)
        return self._show([photo for index, photo in enumerate(photos) if index != selected], ())

    def remove_all(self) -> Updates:
        """Begin without photos."""
        return self._show([], ())

    def _show(self, photos: list[Accepted] | tuple[Accepted, ...], refused: tuple[Refused, ...]) -> Updates:
        notes = [f"{photo.name} {photo.note}" for photo in photos if photo.note]
        return {
            self.dropped: None,
            self.said: _said(len(photos), notes),
            self.gallery: gr.update(
                value=[(_opened(photo.thumbnail), photo.name) for photo in photos],
                visible=bool(photos),
                selected_index=None,
            ),
            self.tools: gr.update(visible=bool(photos)),
            self.refused: gr.update(value=refused_html(refused), visible=bool(refused)),
            self.kept: note_photos(photos),
            self._selected: -1,
            self.leave_out: gr.update(interactive=False),
        }


def refused_html(refused: tuple[Refused, ...]) -> str:
    """Return a table of the files that are not used, each with its reason."""
    if not refused:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(each.name)}</th><td>{escape(each.reason)}</td></tr>' for each in refused
    )
    heading = f"{counted(len(refused), 'file')} left out"
    return (
        f'<table class="reasons"><caption>{heading}</caption>'
        f'<thead><tr><th scope="col">File</th><th scope="col">Why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _said(num_photos: int, notes: list[str]) -> str:
    if not num_photos:
        return f'<p class="quiet">{ADVICE}</p>'
    words = f"{counted(num_photos, 'photo')} to learn from."
    if num_photos < 3:
        words += " A few more will make it better."
    listing = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<p class="quiet">{words}</p>' + (f'<ul class="quiet">{listing}</ul>' if notes else "")


def _opened(thumbnail: Path) -> Image.Image:
    with Image.open(thumbnail) as image:
        return image.copy()
