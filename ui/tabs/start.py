"""Pictures that begin as others: a start picture with a brush in the form, and what is done with a result."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
from PIL import Image
from PIL.Image import Resampling

from ether_diffusion.pipelines.sampling import SIDE, Settings, Start
from ether_diffusion.ui.control_images import MASK, canvas_html, read_mask, read_start
from ether_diffusion.ui.jobs import SavedPicture
from ether_diffusion.ui.outputs import plain_png
from ether_diffusion.ui.requests import NUM_IMAGES, SEED, GenerateRequest
from ether_diffusion.ui.restore import Restored, restore_metadata
from ether_diffusion.ui.tabs.create import PictureForm, PictureTab
from ether_diffusion.ui.tabs.page import QUIET, Updates, Values
from ether_diffusion.ui.words import handler, notes_html, picture_address, quiet_html, sentence

VARIED, ENLARGED = 0.5, 0.3
"""How far a picture is from the one that it varies, and from the one that it is twice as large as."""


class StartForm(PictureForm):
    """The settings of pictures that may begin as another, in whole or where it was painted over."""

    def put_rest(self) -> None:
        panel = f"{self.prefix}-start"
        with gr.Accordion("Begin with a picture", open=False, elem_id=panel) as self.panel:
            self.put("start_picture", "start_strength")
            script = files("ether_diffusion.ui").joinpath("sketch.js").read_text(encoding="utf-8")
            self.sketch = gr.HTML(visible=False, js_on_load=script, elem_id=f"{self.prefix}-sketch")
            self.put("start_mask")
        self.around = [self.panel]
        super().put_rest()

    def read(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for; what the browser kept has no picture to begin with."""
        request, picture = self.asked(named), named.get("start_picture")
        if not picture:
            return request
        with self.studio.reading:
            start = read_start(Path(picture["path"]), named["start_strength"])
            start = start.fitted(*request.size(self.studio.engine.base))
            mask = read_mask(named["start_mask"] or "")
        return replace(request, start=replace(start, mask=mask))

    def suit(self, path: str) -> Updates:
        """Give the pictures the shape of an upload, of which nothing is painted over yet."""
        with self.studio.reading:
            height, width = Settings(start=read_start(Path(path))).size(self.studio.engine.base)
        return {self["width"]: width // 8 * 8, self["height"]: height // 8 * 8, self["start_mask"]: ""}

    def lay_under(self, values: Values) -> Updates:
        """Lay the start picture under the canvas, at the size of the pictures."""
        named = self.named(values)
        if not named["start_picture"]:
            return {self.sketch: gr.update(visible=False)}
        size = self.canvas_size(named)
        with self.studio.reading:
            fitted = read_start(Path(named["start_picture"])).fitted(size["height"], size["width"])
        drawn = named["start_mask"] if str(named["start_mask"]).startswith("data:image/png;base64,") else ""
        page = canvas_html(MASK, **size, under=fitted.image, drawn=drawn)
        return {self.sketch: gr.update(value=page, visible=True), self.panel: gr.update(open=True)}

    def all(self) -> set[Any]:
        return {*super().all(), self.sketch}

    def begin_with(self, start: Start | None) -> Updates:
        """Return the updates that put a picture and what is painted over it into the form."""
        if start is None:
            return {self["start_picture"]: None, self["start_mask"]: ""}
        image, mask = start.image, "" if start.mask is None else picture_address(start.mask, "PNG")
        page = canvas_html(MASK, width=image.width, height=image.height, under=image, drawn=mask)
        return {
            self["start_mask"]: mask,
            self["start_strength"]: self.show("start_strength", start.strength),
            self["start_picture"]: str(self.studio.engine.outputs.keep_control(image)),
            self.sketch: gr.update(value=page, visible=True),
            self.panel: gr.update(open=True),
        }


class StartTab(PictureTab):
    """A tab whose pictures may begin as others, and whose results are varied, enlarged, begun with."""

    form: StartForm
    drawing = "start_mask"
    offers: ClassVar = {"begin": "Begin with it", "vary": "Vary", "enlarge": "Upscale 2×"}

    def tie(self) -> None:
        super().tie()
        form, on_show = self.form, {self.pictures, self.selected}
        sides, picture = [form["width"], form["height"]], form["start_picture"]
        picture.upload(handler(form.suit), [picture], [*sides, form["start_mask"]], **QUIET)
        gr.on(
            [widget.change for widget in (picture, *sides)], handler(form.lay_under),
            {picture, form["start_mask"], *sides}, [form.sketch, form.panel],
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.tools["begin"].click(handler(self._begin_with), on_show, [*form.all(), *form.around], **QUIET)
        begun = [self.page.seen, *self.sure.shown, form["seed"], *self.shown]
        for name, draw in (("vary", self._vary), ("enlarge", self._enlarge)):
            self.tools[name].click(handler(draw), {*form.plain(), *on_show}, begun, **QUIET)

    def take(self, restored: Restored) -> Updates:
        taken, request = super().take(restored), restored.request
        return taken if request is None or restored.heading else taken | self.form.begin_with(request.start)

    def _on_show(self, values: Values) -> tuple[SavedPicture, Image.Image]:
        (own, _), index = values[self.pictures], values[self.selected]
        if index >= len(own):
            raise ValueError("there is no picture on show; draw one")
        with Image.open(own[index].path) as image:
            return own[index], image.convert("RGB")

    def _asked(self, values: Values, shown: SavedPicture, **changes: Any) -> GenerateRequest:
        """Return what drew the picture on show, as far as that is known, with changes."""
        said, named = shown.metadata, self.form.named(values)
        found = None if said is None else restore_metadata(said, self.studio).request
        kept = {"keep_metadata": named["keep_metadata"], "compare_with_base": False}
        return replace(found or self.form.asked(named), **{**kept, **changes})

    def _begin_with(self, values: Values) -> Updates:
        shown, image = self._on_show(values)
        start = Start(image, strength=self.form["start_strength"].value, name=shown.path.name)
        sides = {self.form["width"]: image.width, self.form["height"]: image.height}
        return self.form.begin_with(start) | sides

    def _vary(self, values: Values, visitor: gr.Request) -> Updates:
        """Draw the picture on show again from itself and other noise, as many as the form says."""
        shown, image = self._on_show(values)
        many, seed = values[self.form["num_images"]], secrets.randbelow(int(SEED.most - NUM_IMAGES.most))
        start = Start(image, strength=VARIED, name=shown.path.name)
        return self._begin(self._asked(values, shown, start=start, seed=seed, num_images=many), visitor)

    def _enlarge(self, values: Values, visitor: gr.Request) -> Updates:
        """Draw the picture on show at twice its size from itself, or only enlarge it where that cannot be."""
        shown, image = self._on_show(values)
        width, height = 2 * image.width, 2 * image.height
        start = Start(image, strength=ENLARGED, name=shown.path.name)
        try:
            if self.studio.is_toy:
                raise ValueError("the embedded base knows things at one size alone")
            if width > SIDE.most or height > SIDE.most:
                raise ValueError(f"at most {SIDE.most:g} px are drawn")
            asked = self._asked(values, shown, start=start, num_images=1, width=width, height=height)
            self.studio.engine.cost.check(asked.sampling())
        except ValueError as error:
            outputs = self.studio.engine.outputs
            large, (job, day) = image.resize((width, height), Resampling.LANCZOS), outputs.new_job()
            path = outputs.write(day, f"{job}-i00.png", plain_png(large))
            said = f"Enlarged twice by Lanczos alone, as the base cannot draw that: {sentence(error)}"
            notes = gr.update(value=notes_html("Good to know", [said]), visible=True)
            saved = SavedPicture(path.stem, path, None)
            return self._shown([saved], []) | {
                self.notes: notes,
                self.status: quiet_html("1 picture enlarged"),
            }
        gr.Info(f"Enlarged twice by Lanczos, and drawn over at strength {ENLARGED:g}.")
        return self._begin(asked, visitor)
