"""The tab Control: a control image says where, a prompt says what, and subjects say who."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image

from ether_diffusion.ui.control_source import DETECTORS, Follower, follower_of, read_control_upload
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import notes_html
from ether_diffusion.ui.numbers import read_number
from ether_diffusion.ui.paper import paper_html, paper_of, read_drawing
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create import PRIVATE, PictureTab
from ether_diffusion.ui.tabs.form import SLIDER_ENDS, PictureForm, Values, choices, reaching
from ether_diffusion.ui.tabs.parts import TakingParts, Updates

DRAW, UPLOAD = "Draw", "Upload"
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

    kinds = ("subject",)

    def lay_out_following(self) -> None:
        """Lay out the choice of what follows, and how strongly."""
        with gr.Group():
            adapter = gr.Dropdown(
                choices=[], value=None, label="Control adapter", info="It follows the control image.",
                elem_id="control-adapter",
            )  # fmt: skip
            self.add("adapter", adapter)
            for name, of in (("control_strength", "the control image"), ("adapter_strength", "its adapter")):
                slider = gr.Slider(
                    *SLIDER_ENDS["strength"], 1.0, step=0.05, label=f"Strength of {of}",
                    elem_id=f"control-{name.replace('_', '-')}",
                )  # fmt: skip
                self.add(name, slider, read_number, f"the strength of {of}")

    def lay_out_source(self) -> None:
        """Lay out the canvas, and beside it what takes an upload."""
        side, types = self.studio.engine.native_size, [(words, name) for name, words in DETECTORS.items()]
        self.add(
            "source", gr.Radio([DRAW, UPLOAD], value=DRAW, label="Control image", elem_id="control-source")
        )
        self.sketch = gr.HTML(
            paper_html(paper_of("palette"), width=side, height=side),
            js_on_load=files("ether_diffusion.ui").joinpath("sketch.js").read_text(encoding="utf-8"),
            elem_id="control-sketch",
        )
        self.add("drawing", gr.Textbox(visible="hidden", show_label=False, container=False), is_kept=False)
        upload = gr.File(
            label="Control image or photo", visible=False, height=104, elem_id="control-upload",
            elem_classes="drop",
        )  # fmt: skip
        self.add("upload", upload, is_kept=False)
        detector = gr.Dropdown(
            types, value="", label="The upload is", visible=False, elem_id="control-detector"
        )
        self.add("detector", detector)

    def read(self, values: Values) -> GenerateRequest:
        """Return what the visitor asks for.

        Raises:
            FileNotFoundError, ValueError: it cannot be drawn.
        """
        adapter = values[self["adapter"]]
        if not adapter:
            raise ValueError("there is no control adapter chosen; choose the one that shall follow")
        request = super().read(values)
        follower = follower_of(self.studio.library.folder(adapter))
        strength = self.read_fields(values, ["adapter_strength"])["adapter_strength"]
        return replace(
            request,
            adapters={adapter: strength if follower.has_adapter else 1.0, **request.adapters},
            control_image=self._control_image(values, follower),
        )

    def _control_image(self, values: Values, follower: Follower) -> Image.Image:
        if values[self["source"]] == DRAW:
            with self.studio.reading:
                return read_drawing(values[self["drawing"]] or "", paper_of(follower.control_type))
        upload, detector = values[self["upload"]], values[self["detector"]] or ""
        if not upload:
            raise ValueError("there is no control image; upload one, or draw it")
        width, height = self._size(values)
        with self.studio.reading:
            return read_control_upload(Path(upload), detector, width=width, height=height)

    def _size(self, values: Values) -> tuple[int, int]:
        """Return the size of the pictures that the form asks for, px."""
        native, sides = self.studio.engine.native_size, self.read_fields(values, ["width", "height"])
        return sides["width"] or native, sides["height"] or native

    def follow(self, values: Values) -> Updates:
        """Suit the canvas to the classes that the chosen adapter follows, and to the size of the pictures."""
        adapter = values[self["adapter"]]
        follower = follower_of(self.studio.library.folder(adapter)) if adapter else Follower(None, True)
        width, height = (max(8, min(4096, side)) for side in self._size(values))
        page = paper_html(paper_of(follower.control_type), width=width, height=height)
        shown = gr.update(visible=follower.has_adapter)
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
        return {
            **super().fill(request),
            self["adapter"]: gr.update(choices=choices(following), value=adapter),
            self["adapter_strength"]: reaching(request.adapters.get(adapter or "", 1.0), "strength"),
            self["control_strength"]: reaching(request.control_strength, "strength"),
            self["source"]: UPLOAD,
            **self.show_source(UPLOAD, value=kept),
        }

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept."""
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
    beside, adapters, info = "With control", "Subjects", "Drawn together with the control adapter."

    def _lay_out_source(self) -> None:
        self.form.lay_out_following()
        self.form.lay_out_source()

    def _on_start(self, events: list[Any], **draw: Any) -> None:
        taken = gr.on(events, None, js=TAKE_DRAWING, outputs=[self.form["drawing"]], api_visibility="private")
        taken.then(**draw)

    def _tie(self) -> None:
        super()._tie()
        form = self.form
        suiting = [form[name] for name in ("adapter", "width", "height")]
        gr.on(
            [widget.change for widget in suiting],
            handler(form.follow),
            inputs=set(suiting),
            outputs=[form.sketch, form["adapter_strength"]],
            trigger_mode="always_last",
            **PRIVATE,
        )
        shown = [form.sketch, form["upload"], form["detector"]]
        form["source"].change(handler(form.show_source), [form["source"]], shown, **PRIVATE)

    def filled(self) -> list[Component]:
        """Return what `take` gives values to."""
        return [*super().filled(), self.form.sketch]

    def refreshed(self) -> list[Component]:
        """Return what `refresh` gives values to."""
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
        """Fill the form with restored settings, and say what is not as it was."""
        request = restored.request
        if request is None or not restored.followed_control:
            filled = {} if request is None else PictureForm.fill(self.form, request)
            return {**filled, **self._tell(restored, [IN_CREATE] if request else [])}
        return {**self.form.fill(request), **self._tell(restored, []), self.used: self._followed(request)}
