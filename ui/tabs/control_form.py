"""What says where things are, as widgets: an adapter that follows, and a control image, drawn or uploaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import gradio as gr
from gradio.components import Component
from PIL import Image

from ether_diffusion.ui.control_source import DETECTORS, Follower, follower_of, read_control_upload
from ether_diffusion.ui.numbers import read_number, read_optional
from ether_diffusion.ui.paper import paper_html, paper_of, read_drawing
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_form import MAX_STRENGTH, Form, Values, choices, reaching
from ether_diffusion.ui.tabs.parts import Updates

DRAW, UPLOAD = "Draw", "Upload"
TAKE_DRAWING = """() => {
  const canvas = document.querySelector("#control-sketch canvas");
  return canvas ? canvas.toDataURL("image/png") : "";
}"""
"""Gives the drawing as it is when the button is pressed."""


@dataclass(frozen=True)
class ControlForm:
    """The widgets; `rest` are those of any picture, whose adapters are the subjects."""

    adapter: gr.Dropdown
    control_strength: gr.Slider
    adapter_strength: gr.Slider
    source: gr.Radio
    sketch: gr.HTML
    drawing: gr.Textbox
    upload: gr.File
    detector: gr.Dropdown
    rest: Form

    def named(self) -> dict[str, Component]:
        """Return the widgets that the browser keeps the values of, by the names it keeps them under."""
        own = {"adapter": self.adapter, "control_strength": self.control_strength}
        own |= {"adapter_strength": self.adapter_strength, "source": self.source, "detector": self.detector}
        return own | self.rest.named()

    def all(self) -> list[Component]:
        """Return every widget that is read."""
        return [*self.named().values(), self.drawing, self.upload]

    def read(self, values: Values, studio: Studio) -> GenerateRequest:
        """Return what the visitor asks for.

        Raises:
            FileNotFoundError, ValueError: it cannot be drawn.
        """
        adapter = values[self.adapter]
        if not adapter:
            raise ValueError("there is no control adapter chosen; choose the one that shall follow")
        request = self.rest.read(values)
        follower = follower_of(studio.library.folder(adapter))
        strength = read_number(values[self.adapter_strength], "the strength of the adapter")
        return replace(
            request,
            adapters={adapter: strength if follower.has_adapter else 1.0, **request.adapters},
            control_image=self._control_image(values, follower, studio),
            control_strength=read_number(values[self.control_strength], "the strength of the control image"),
        )

    def _control_image(self, values: Values, follower: Follower, studio: Studio) -> Image.Image:
        if values[self.source] == DRAW:
            with studio.reading:
                return read_drawing(values[self.drawing] or "", paper_of(follower.control_type))
        if not values[self.upload]:
            raise ValueError("there is no control image; upload one, or draw it")
        width, height = self.size(values, studio)
        with studio.reading:
            return read_control_upload(
                Path(values[self.upload]), values[self.detector] or "", width=width, height=height
            )

    def size(self, values: Values, studio: Studio) -> tuple[int, int]:
        """Return the size of the pictures that the form asks for, px."""
        native = studio.engine.native_size
        width = read_optional(values[self.rest.width], "the width")
        return width or native, read_optional(values[self.rest.height], "the height") or native

    def follow(self, values: Values, studio: Studio) -> Updates:
        """Return the updates that suit the form to the adapter that is chosen and to the size."""
        adapter = values[self.adapter]
        follower = follower_of(studio.library.folder(adapter)) if adapter else Follower(None, True)
        width, height = (max(8, min(4096, side)) for side in self.size(values, studio))
        return {
            self.sketch: gr.update(
                value=paper_html(paper_of(follower.control_type), width=width, height=height)
            ),
            self.adapter_strength: gr.update(visible=follower.has_adapter),
        }

    def fill(
        self,
        request: GenerateRequest,
        studio: Studio,
        *,
        following: Mapping[str, str],
        subjects: Mapping[str, str],
    ) -> Updates:
        """Return the updates that make the form say a request that follows a control image.

        `following` and `subjects` are names of adapters by their ids. A control image that did not come back
        is left to be uploaded: what was drawn on the canvas meanwhile is another.
        """
        adapter = next((name for name in request.adapters if name in following), None)
        image = request.control_image
        kept = None if image is None else str(studio.engine.outputs.keep_control(image))
        return {
            **self.rest.fill(request, subjects),
            self.adapter: gr.update(choices=choices(following), value=adapter),
            self.adapter_strength: reaching(request.adapters.get(adapter or "", 1.0), 0, MAX_STRENGTH),
            self.control_strength: reaching(request.control_strength, 0, MAX_STRENGTH),
            self.source: UPLOAD,
            self.sketch: gr.update(visible=False),
            self.upload: gr.update(visible=True, value=kept),
            self.detector: gr.update(visible=True, value=""),
        }

    def show_source(self, source: str) -> Updates:
        """Show what belongs to drawing, or to uploading."""
        is_drawing = source == DRAW
        return {
            self.sketch: gr.update(visible=is_drawing),
            self.upload: gr.update(visible=not is_drawing),
            self.detector: gr.update(visible=not is_drawing),
        }


def lay_out_following() -> tuple[gr.Dropdown, gr.Slider, gr.Slider]:
    """Lay out the choice of what follows, and how strongly."""
    with gr.Group():
        adapter = gr.Dropdown(
            choices=[], value=None, label="Control adapter", info="It follows the control image.",
            elem_id="control-adapter",
        )  # fmt: skip
        control_strength = gr.Slider(
            0, MAX_STRENGTH, 1.0, step=0.05, label="Strength of the control image",
            elem_id="control-control-strength",
        )  # fmt: skip
        adapter_strength = gr.Slider(
            0, MAX_STRENGTH, 1.0, step=0.05, label="Strength of its adapter",
            elem_id="control-adapter-strength",
        )  # fmt: skip
    return adapter, control_strength, adapter_strength


def lay_out_source(studio: Studio) -> tuple[gr.Radio, gr.HTML, gr.Textbox, gr.File, gr.Dropdown]:
    """Lay out the canvas, and beside it what takes an upload."""
    side = studio.engine.native_size
    source = gr.Radio([DRAW, UPLOAD], value=DRAW, label="Control image", elem_id="control-source")
    sketch = gr.HTML(
        paper_html(paper_of("palette"), width=side, height=side),
        js_on_load=files("ether_diffusion.ui").joinpath("sketch.js").read_text(encoding="utf-8"),
        elem_id="control-sketch",
    )
    drawing = gr.Textbox(visible="hidden", show_label=False, container=False)
    upload = gr.File(
        label="Control image or photo", visible=False, height=104, elem_id="control-upload",
        elem_classes="drop",
    )  # fmt: skip
    detector = gr.Dropdown(
        [(words, name) for name, words in DETECTORS.items()],
        value="",
        label="The upload is",
        visible=False,
        elem_id="control-detector",
    )
    return source, sketch, drawing, upload, detector
