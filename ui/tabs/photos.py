"""The photos of a training: dropped, said what is wrong with, captioned, cropped and left out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.tabs.page import OFTEN, ON_PRESS, Page, Panel, Updates, told_by
from ether_diffusion.ui.train_request import MAX_PROMPT
from ether_diffusion.ui.uploads import (
    Accepted,
    Refused,
    crop_photo,
    data_address,
    recall_photos,
    shares_of,
    take_photos,
    whole_address,
)
from ether_diffusion.ui.words import counted, notes_html, quiet_html

ADVICE = "Four to ten photos that show it from several sides, in several places. A zip will do, too."
_TABLE = Markup(
    '<table class="reasons"><caption>{} left out</caption><thead><tr><th scope="col">File</th>'
    '<th scope="col">Why</th></tr></thead><tbody>{}</tbody></table>'
)
_ROW = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
_PHOTOS = Markup('<table class="photos"><tbody>{}</tbody></table>')
_PHOTO = Markup(
    '<tr><td><img alt="" src="{address}"></td><th scope="row">{photo.name}<span>{photo.note}</span>'
    '<input type="text" value="{photo.caption}" maxlength="1000" data-photo="{n}" '
    'placeholder="Caption: the prompt below" aria-label="Caption of {photo.name}"></th><td>'
    '<button type="button" data-photo="{n}" data-crop aria-label="Crop {photo.name}" title="Crop">▣</button>'
    '<button type="button" data-photo="{n}" aria-label="Leave out {photo.name}" title="Leave out">×</button>'
    "</td></tr>"
)
_SQUARE = Markup(
    '<div class="crop"><img alt="" src="{}"><i style="left:{:.1%};top:{:.1%};width:{:.1%}"></i></div>'
    '<p class="quiet">Click where the middle of the square shall be, or move it with the sliders.</p>'
)
ON_CENTRE = """element.addEventListener("click", (event) => {
  const box = element.querySelector(".crop")?.getBoundingClientRect();
  const [x, y] = [event.clientX - box?.left, event.clientY - box?.top];
  if (box) trigger("click", { x: x / box.width, y: y / box.height });
});"""
ON_CHANGE = """
element.addEventListener("change", ({ target }) => {
  if (target.dataset.photo) trigger("click", { ...target.dataset, caption: target.value });
});"""
SHOW_CROP = """() => document.getElementById("train-crop")
  ?.scrollIntoView({ block: "nearest", behavior: "smooth" })"""


class TrainPhotos(Panel):
    """The widgets and what they do; made where the form begins."""

    def __init__(self, page: Page) -> None:
        super().__init__(page, "train")
        drop: dict[str, Any] = {"elem_id": "train-photos", "elem_classes": "drop", "height": 104}
        self.dropped = gr.File(label="Photos", file_count="multiple", **drop)
        self.said = self.html("photos-said", _said([]))
        self.table = self.html("gallery", visible=False, js_on_load=ON_PRESS + ON_CHANGE)
        self.clear = self.button("clear", "Start over", size="sm", visible=False)
        self.refused, self.added = self.html("refused", visible=False), self.kept("photos", [])
        with gr.Column(visible=False, elem_id="train-crop", elem_classes="confirm") as self.crop:
            self.square = self.html("square", js_on_load=ON_CENTRE)
            shares: dict[str, Any] = {"minimum": 0, "maximum": 1, "step": 0.01, "min_width": 120}
            with gr.Row():
                self.side = gr.Slider(**shares | {"minimum": 0.1}, label="Size", elem_id="train-crop-side")
                self.across = gr.Slider(**shares, label="Left to right", elem_id="train-crop-across")
                self.down = gr.Slider(**shares, label="Top to bottom", elem_id="train-crop-down")
            with gr.Row(elem_classes="tool-row"):
                cut = self.button("crop-now", "Crop", variant="primary")
                whole, leave = self.button("crop-whole", "Whole photo"), self.button("crop-not", "Cancel")
        self.number = gr.State(0)
        box: list[Any] = [self.added, self.number, self.side, self.across, self.down]
        self.on([each.change for each in box[2:]], self._show_square, box, [self.square], **OFTEN)
        self.on(self.square.click, self._centre, box[:3])
        self.on(cut.click, self._crop, box)
        self.on(whole.click, self._crop, box[:2])
        self.closes(leave, self.crop)
        told = {"show_progress": "minimal", "show_progress_on": [self.dropped]}
        self.on(self.dropped.upload, self._take, [self.dropped, self.added], **told)
        changed = self.on(self.table.click, self._change, [self.added])
        changed.success(None, js=SHOW_CROP, api_visibility="private")
        self.on(self.clear.click, lambda: self.show([]))
        self.on_load(self._recall, [self.added])

    def accepted(self, kept: object) -> list[Accepted]:
        """Return the photos that the browser says were added and that are still there."""
        return recall_photos(kept, self.studio.runs.photos)

    def _take(self, files: list[str] | None, kept: object) -> Updates:
        earlier, paths = self.accepted(kept), [Path(file) for file in files or []]
        with self.studio.reading:
            accepted, refused = take_photos(paths, self.studio.runs.photos, earlier)
        return self.show([*earlier, *accepted], refused)

    def _recall(self, kept: object) -> Updates:
        photos, known = self.accepted(kept), len(kept) if isinstance(kept, list) else 0
        shown = self.show(photos) if known else {}
        if known > len(photos):
            lost = f"{counted(known - len(photos), 'photo')} of yours went when the studio was started again"
            shown[self.said] = notes_html(f"{lost}: add them again.", kind="warning")
        return shown

    def _change(self, event: gr.EventData, kept: object) -> Updates:
        """Leave out a photo, show what can be cut from it, or keep what was written as its caption."""
        photos, told = self.accepted(kept), told_by(event)
        number, caption = int(n) if (n := str(told.get("photo"))).isdecimal() else -1, told.get("caption")
        if number not in range(len(photos)):
            return {}
        if "crop" in told:
            begin = {self.side: 0.8, self.across: 0.5, self.down: 0.5}
            shown = {self.number: number, self.crop: gr.update(visible=True)}
            return {**begin, **shown, **self._show_square(kept, number, *begin.values())}
        if not isinstance(caption, str):
            return self.show([photo for photo in photos if photo is not photos[number]])
        photos[number] = replace(photos[number], caption=" ".join(caption.split())[:MAX_PROMPT])
        return {self.added: [photo.kept for photo in photos]}

    def _show_square(self, kept: object, number: int, side: float, across: float, down: float) -> Updates:
        """Show a whole photo with the square that would be cut from it."""
        photos = self.accepted(kept)
        if number >= len(photos):
            return {}
        width, height = shares_of(photos[number], side)
        left, top = (1 - width) * across, (1 - height) * down
        return {self.square: _SQUARE.format(whole_address(photos[number], 256), left, top, width)}

    def _centre(self, event: gr.EventData, kept: object, number: int, side: float) -> Updates:
        """Move the square to where the photo was clicked."""
        photos, told = self.accepted(kept), told_by(event)
        at = [each for name in "xy" if isinstance(each := told.get(name), int | float)]
        if number >= len(photos) or len(at) < 2:
            return {}
        sizes = shares_of(photos[number], side)
        left = [(x - size / 2) / (1 - size or 1) for x, size in zip(at, sizes, strict=True)]
        where = [round(min(1.0, max(0.0, each)), 2) for each in left]
        return dict(zip((self.across, self.down), where, strict=True))

    def _crop(self, kept: object, number: int, *box: float) -> Updates:
        photos = self.accepted(kept)
        if number < len(photos):
            with self.studio.reading:
                photos[number] = crop_photo(photos[number], *(box or (1, 0, 0)))
        return self.show(photos)

    def show(self, photos: Sequence[Accepted], refused: Sequence[Refused] = ()) -> Updates:
        """Show the photos that were added, and what was left out of those that came last."""
        rows = Markup("").join(_ROW.format(*each) for each in refused)
        table = _TABLE.format(counted(len(refused), "file"), rows)
        addresses = [data_address(each.thumbnail, 96) for each in photos]
        listed = (_PHOTO.format(n=n, photo=photo, address=addresses[n]) for n, photo in enumerate(photos))
        return {
            self.dropped: None,
            self.said: _said(photos),
            self.table: gr.update(value=_PHOTOS.format(Markup("").join(listed)), visible=bool(photos)),
            self.clear: gr.update(visible=bool(photos)),
            self.refused: gr.update(value=table, visible=bool(refused)),
            self.added: [photo.kept for photo in photos],
            self.crop: gr.update(visible=False),
        }


def _said(photos: Sequence[Accepted]) -> str:
    words = f"{counted(len(photos), 'photo')} to learn from." if photos else ADVICE
    return quiet_html(words + " A few more will make it better." * (0 < len(photos) < 3))
