"""The tab Control: a control image says where, a prompt says what, and subjects say who."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.ui.control_images import canvas_html, read_control_upload, read_drawing
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import notes_html
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.drawing_tab import PictureTab
from ether_diffusion.ui.tabs.form import DRAW, UPLOAD, PictureForm, Values, choices
from ether_diffusion.ui.tabs.parts import QUIET, TakingParts, Updates

TAKE_DRAWING = """() => {
  const canvas = document.querySelector("#control-sketch canvas");
  return canvas ? canvas.toDataURL("image/png") : "";
}"""
"""Gives the drawing as it is when the button is pressed."""
NONE_YET = "There is no control adapter yet"
IN_CREATE = "It followed no control image; the tab Create draws it as it was."
GET_ONE = "Train one with the command train-control, and add it in the tab Library."


def build(studio: Studio) -> TakingParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Control", id="control") as tab:
        page = ControlTab(ControlForm(studio, "control"))
    return page.parts(tab)


class ControlForm(PictureForm):
    """The settings of pictures whose adapters are subjects, and what says where: drawn or uploaded."""

    kinds: Sequence[str] = ("subject",)
    label = "Subjects"
    info = "Drawn together with the control adapter."

    def put_rest(self) -> None:
        """Lay out what follows, the canvas, and beside it what takes an upload."""
        with gr.Group():
            self.put("adapter", "control_strength", "adapter_strength")
        self.put("source")
        side = self.studio.engine.native_size
        self.sketch = gr.HTML(
            canvas_html("palette", width=side, height=side),
            js_on_load=files("ether_diffusion.ui").joinpath("sketch.js").read_text(encoding="utf-8"),
            elem_id="control-sketch",
        )
        self.put("drawing", "upload", "detector")
        super().put_rest()

    def read(self, values: Values) -> GenerateRequest:
        adapter = values[self["adapter"]]
        if not adapter:
            raise ValueError("there is no control adapter chosen; choose the one that shall follow")
        request, follower = super().read(values), self._follower(adapter)
        strength = self.read_fields(values, ["adapter_strength"])["adapter_strength"]
        adapters = {adapter: strength if follower.parts else 1.0, **request.adapters}
        upload, detector = values[self["upload"]], values[self["detector"]] or ""
        is_drawn, (width, height) = values[self["source"]] == DRAW, self._size(values)
        if not is_drawn and not upload:
            raise ValueError("there is no control image; upload one, or draw it")
        with self.studio.reading:
            if is_drawn:
                image = read_drawing(values[self["drawing"]] or "", _control_type(follower))
            else:
                image = read_control_upload(Path(upload), detector, width=width, height=height)
        return replace(request, adapters=adapters, control_image=image)

    def _follower(self, adapter_id: str) -> Adapter:
        adapter = read_adapter(self.studio.library.folder(adapter_id))
        if adapter.encoder is None:
            raise ValueError(
                "this adapter follows no control image; choose one that was trained with control"
            )
        return adapter

    def _size(self, values: Values) -> tuple[int, int]:
        """Return the size of the pictures that the form asks for, px."""
        native, sides = self.studio.engine.native_size, self.read_fields(values, ["width", "height"])
        return sides["width"] or native, sides["height"] or native

    def follow(self, values: Values) -> Updates:
        """Suit the canvas to the classes that the chosen adapter follows, and to the size of the pictures."""
        adapter = values[self["adapter"]]
        follower = self._follower(adapter) if adapter else None
        width, height = (max(8, min(4096, side)) for side in self._size(values))
        page = canvas_html(_control_type(follower), width=width, height=height)
        shown = gr.update(visible=follower is None or bool(follower.parts))
        return {self.sketch: gr.update(value=page), self["adapter_strength"]: shown}

    def show_source(self, source: str, **upload: Any) -> Updates:
        """Show what belongs to drawing, or to uploading; `upload` is given to the field of uploads."""
        drawn = source == DRAW
        return {
            self.sketch: gr.update(visible=drawn),
            self["upload"]: gr.update(visible=not drawn, **upload),
            self["detector"]: gr.update(visible=not drawn, **({"value": ""} if upload else {})),
        }

    def fill(self, request: GenerateRequest) -> Updates:
        """Return the updates that make the form say a request that follows a control image.

        One that did not come back is left to be uploaded: what was drawn on the canvas meanwhile is another.
        """
        following, image = self.names("control"), request.control_image
        adapter = next((name for name in request.adapters if name in following), None)
        kept = None if image is None else str(self.studio.engine.outputs.keep_control(image))
        strength = request.adapters.get(adapter or "", 1.0)
        return {
            **super().fill(request),
            self["adapter"]: gr.update(choices=choices(following), value=adapter),
            self["adapter_strength"]: self.show("adapter_strength", strength),
            self["control_strength"]: self.show("control_strength", request.control_strength),
            self["source"]: UPLOAD,
            **self.show_source(UPLOAD, value=kept),
        }

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        updates, names = super().fill_from_kept(kept), self.names("control")
        if kept.get("adapter") in names:
            updates[self["adapter"]] = gr.update(choices=choices(names), value=kept["adapter"])
        if kept.get("source") in (DRAW, UPLOAD):
            updates[self["source"]] = kept["source"]
        for name in ("control_strength", "adapter_strength"):
            if isinstance(kept.get(name), int | float) and 0 <= kept[name] <= 2:
                updates[self[name]] = kept[name]
        return updates


class ControlTab(PictureTab):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    form: ControlForm
    beside = "With control"

    def on_start(self, events: list[Any], **draw: Any) -> None:
        taken = gr.on(events, None, js=TAKE_DRAWING, outputs=[self.form["drawing"]], api_visibility="private")
        taken.then(**draw)

    def tie(self) -> None:
        super().tie()
        form = self.form
        suiting = [form[name] for name in ("adapter", "width", "height")]
        gr.on(
            [widget.change for widget in suiting],
            handler(form.follow),
            inputs=set(suiting),
            outputs=[form.sketch, form["adapter_strength"]],
            trigger_mode="always_last",
            **QUIET,
        )
        shown = [form.sketch, form["upload"], form["detector"]]
        form["source"].change(handler(form.show_source), [form["source"]], shown, **QUIET)

    def filled(self) -> list[Any]:
        return [*super().filled(), self.form.sketch]

    def refreshed(self) -> list[Any]:
        return [self.form["adapter"], *super().refreshed()]

    def refresh(self) -> Updates:
        """Show the adapters there are, those that follow and those of subjects; the only one is chosen."""
        following = self.form.names("control")
        chosen = {"value": next(iter(following))} if len(following) == 1 else {}
        return {
            self.form["adapter"]: gr.update(choices=choices(following), **chosen),
            self.form["adapters"]: gr.update(choices=choices(self.form.names())),
            self.missing: gr.update(value=notes_html(NONE_YET, [GET_ONE]), visible=not following),
        }

    def take(self, restored: Restored) -> Updates:
        request, followed = restored.request, restored.followed_control
        if request is None or not followed:
            return self.taken(restored, IN_CREATE if request else "")
        return self.taken(restored, "") | self.form.fill(request) | {self.used: self.followed(request)}


def _control_type(adapter: Adapter | None) -> str | None:
    return None if adapter is None or adapter.encoder is None else adapter.encoder.config.control_type
