"""The tab Control: a control image says where, a prompt says what, and subjects say who."""

import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.training.plain_files import UnusableFileError, read_plain_file
from ether_diffusion.ui.control_images import canvas_html, read_control_upload, read_drawing
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.tabs.create import PictureForm, PictureTab
from ether_diffusion.ui.tabs.page import DRAW, QUIET, UPLOAD, Page, Updates, Values
from ether_diffusion.ui.uploads import MAX_PHOTO_BYTES, thumbnail_png
from ether_diffusion.ui.words import handler, notes_html

NONE_YET = "There is no control adapter yet"
IN_CREATE = "It followed no control image; the tab Create draws it as it was."
GET_ONE = "Train one with the command train-control, and add it in the tab Library."


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("Control", id="control") as tab:
        control = ControlTab(page, ControlForm(page.studio, "control"))
    refreshed = [control.form["adapter"], control.form["adapters"], control.missing]
    page.refreshes(tab, control.refresh, refreshed, control.form)


class ControlForm(PictureForm):
    """The settings of pictures whose adapters are subjects, and what says where: drawn or uploaded."""

    kinds = ("subject",)
    label, info = "Subjects", "Drawn together with the control adapter."

    def put_rest(self) -> None:
        with gr.Group():
            self.put("adapter", "source")
        side = self.studio.engine.native_size
        self.sketch = gr.HTML(
            canvas_html("palette", width=side, height=side),
            js_on_load=files("ether_diffusion.ui").joinpath("sketch.js").read_text(encoding="utf-8"),
            elem_id="control-sketch",
        )
        self.put("drawing", "upload", "detector")
        with gr.Group():
            self.put("control_strength", "adapter_strength")
        super().put_rest()

    def asked(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for, but for the control image; the control adapter is the first."""
        request, adapter = super().asked(named), named["adapter"] or "none"
        strengths = {adapter: named["adapter_strength"], **request.adapters}
        return replace(request, adapters=strengths, control_strength=named["control_strength"])

    def read(self, named: Mapping[str, Any]) -> GenerateRequest:
        request = self.asked(named)
        adapter, upload = named["adapter"], named["upload"]
        if not adapter:
            raise ValueError("there is no control adapter chosen; choose the one that shall follow")
        follower = self._follower(adapter)
        strength = named["adapter_strength"] if follower.parts else 1.0
        is_drawn, (height, width) = named["source"] == DRAW, request.size(self.studio.engine.base)
        if not is_drawn and not upload:
            raise ValueError("there is no control image; upload one, or draw it")
        with self.studio.reading:
            if is_drawn:
                image = read_drawing(named["drawing"] or "", _control_type(follower))
            else:
                how: Any = {"width": width, "height": height, "control_type": _control_type(follower)}
                image = read_control_upload(Path(upload["path"]), named["detector"] or "", **how)
        return replace(request, adapters={adapter: strength, **request.adapters}, control_image=image)

    def _follower(self, adapter_id: str) -> Adapter:
        adapter = read_adapter(self.studio.library.folder(adapter_id))
        if adapter.encoder is None:
            raise ValueError(
                "this adapter follows no control image; choose one that was trained with control"
            )
        return adapter

    def all(self) -> set[Any]:
        return {*super().all(), self.sketch}

    def follow(self, values: Values) -> Updates:
        """Suit the canvas to the classes that the chosen adapter follows, and to the size of the pictures."""
        named = self.named(values)
        follower = self._follower(named["adapter"]) if named["adapter"] else None
        shown = gr.update(visible=follower is None or bool(follower.parts))
        page = canvas_html(_control_type(follower), **self.canvas_size(named))
        return {self.sketch: gr.update(value=page), self["adapter_strength"]: shown}

    def show_source(self, source: str, **upload: Any) -> Updates:
        """Show what belongs to drawing, or to uploading; `upload` is given to the field of uploads."""
        drawn = source == DRAW
        return {
            self.sketch: gr.update(visible=drawn),
            self["upload"]: gr.update(visible=not drawn, **upload),
            self["detector"]: gr.update(visible=not drawn, **({"value": ""} if upload else {})),
        }

    def shown(self, named: Mapping[str, Any]) -> Updates:
        kept = {"value": named["adapter"]} if named["adapter"] in self.names("control") else {}
        return {**super().shown(named), self["adapter"]: self.offer("control", **kept)}

    def fill(self, request: GenerateRequest, *, is_picture: bool = True) -> Updates:
        """Return the updates that make the form say a request that follows a control image.

        One that did not come back is left to be uploaded: what was drawn on the canvas meanwhile is another.
        """
        names, image = self.names("control"), request.control_image
        adapter = next((name for name in request.adapters if name in names), None)
        kept = None if image is None else str(self.studio.engine.outputs.keep_control(image))
        strength = request.adapters.get(adapter or "", 1.0)
        return {
            **super().fill(request, is_picture=is_picture),
            self["adapter"]: self.offer("control", value=adapter),
            self["adapter_strength"]: self.show("adapter_strength", strength),
            self["control_strength"]: self.show("control_strength", request.control_strength),
            self["source"]: UPLOAD,
            **self.show_source(UPLOAD, value=kept),
        }


class ControlTab(PictureTab):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    form: ControlForm
    beside, drawing = "With control", "drawing"

    def tie(self) -> None:
        super().tie()
        form = self.form
        suiting, sketch = [form[name] for name in ("adapter", "width", "height")], form.sketch
        gr.on(
            [widget.change for widget in suiting], handler(form.follow), set(suiting),
            [sketch, form["adapter_strength"]], trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        form["upload"].upload(handler(self._preview), [form["upload"]], [self.used], **QUIET)
        sources = [sketch, form["upload"], form["detector"]]
        form["source"].change(handler(form.show_source), [form["source"]], sources, **QUIET)

    def _preview(self, path: str) -> Any:
        file = Path(path)
        with (
            suppress(UnusableFileError),
            self.studio.reading,
        ):  # what is wrong is said when it is to be followed
            data = read_plain_file(file, inside=file.parent, max_bytes=MAX_PHOTO_BYTES)
            return self.shown_control(Image.open(io.BytesIO(thumbnail_png(data, file.suffix))))
        return gr.update(visible=False)

    def refresh(self) -> Updates:
        """Show the adapters there are, those that follow and those of subjects; the only one is chosen."""
        following = self.form.names("control")
        chosen = {"value": next(iter(following))} if len(following) == 1 else {}
        return {
            self.form["adapter"]: self.form.offer("control", **chosen),
            self.form["adapters"]: self.form.offer(),
            self.missing: gr.update(value=notes_html(NONE_YET, [GET_ONE]), visible=not following),
        }

    def take(self, restored: Restored) -> Updates:
        request, followed, picture = restored.request, restored.followed_control, restored.control_picture
        if picture is not None:
            said = notes_html("It is the control image now", ["Say below what it is, and write a prompt."])
            source = {self.form["source"]: UPLOAD, **self.form.show_source(UPLOAD, value=str(picture))}
            return source | {
                self.used: self._preview(str(picture)),
                self.restored: gr.update(value=said, visible=True),
            }
        if request is None or not followed:
            return self.taken(restored, IN_CREATE if request else "")
        return self.taken(restored, "") | self.form.fill(request) | {self.used: self.followed(request)}


def _control_type(adapter: Adapter | None) -> str | None:
    return None if adapter is None or adapter.encoder is None else adapter.encoder.config.control_type
