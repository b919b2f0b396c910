"""The form of pictures of one prompt: adapters at their strengths, and a picture that they may begin as."""

import html
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ether_diffusion.pipelines.sampling import Settings, Start
from ether_diffusion.ui.control_images import MASK, canvas_html, read_mask, read_start
from ether_diffusion.ui.requests import NUM_IMAGES, SEED, GenerateRequest
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.tabs.form import STRENGTHS, Form
from ether_diffusion.ui.tabs.page import QUIET, Panel, Updates, Values
from ether_diffusion.ui.words import MAX_CHARACTERS, picture_address


def new_seed() -> int:
    """Return a seed that leaves room for as many pictures as are drawn at once."""
    return secrets.randbelow(int(SEED.most - NUM_IMAGES.most))


class PictureForm(Form):
    """The settings of pictures that may begin as another, in whole or where it was painted over."""

    label, info = "Adapters", "None draws with the base alone."

    def put_rest(self, panel: Panel) -> None:
        """Lay out what stands below the prompt, and tie it; sliders appear as adapters are chosen."""
        start = f"{self.prefix}-start"
        with gr.Accordion("Begin with a picture", open=False, elem_id=start) as self.accordion:
            self.put("start_picture", "start_strength", "start_sketch", "start_mask")
        with gr.Group():
            self.put("adapters", label=self.label, info=self.info)
            self.put(*STRENGTHS)
        MixBox(panel, self)
        small: dict[str, Any] = {"size": "sm", "min_width": 84, "scale": 1}
        with gr.Group(elem_classes="seed-group"):
            with gr.Row(elem_classes="seed-row"):
                self.put("seed")
                dice = panel.button("dice", "New seed", **small)
                self.reuse = panel.button("reuse", "Last seed", interactive=False, **small)
            self.put("new_seed")
        with gr.Group():
            self.put("num_images")
            self.put_sampling()
            self.put("compare_with_base")
        self.put_advanced()
        dice.click(None, js=f"() => Math.floor(Math.random() * {2**32})", outputs=[self["seed"]], **QUIET)
        self["seed"].input(None, js="() => false", outputs=[self["new_seed"]], **QUIET)
        adapters, sliders = self["adapters"], [self[name] for name in STRENGTHS]
        panel.on(adapters.input, lambda chosen: self.sliders(chosen, {}), [adapters], sliders)
        panel.on(adapters.change, self.sliders, [adapters], sliders)  # what the browser kept is chosen, too
        sides, picture = [self["width"], self["height"]], self["start_picture"]
        panel.on(picture.upload, self._suit, [picture], [*sides, self["start_mask"]])
        changes, laid = [each.change for each in (picture, *sides)], {picture, self["start_mask"], *sides}
        shown = [self["start_sketch"], self.accordion]
        panel.on(changes, self._lay_under, laid, shown, trigger_mode="always_last")

    def sliders(self, chosen: Sequence[str] | None, strengths: Mapping[str, float] | None = None) -> Updates:
        """Show a slider for each chosen adapter, at its strength or else as trained; None leaves them."""
        names, updates = self.names(), Updates()
        shown = [adapter for adapter in chosen or [] if adapter in names]
        for index, name in enumerate(STRENGTHS):
            adapter = shown[index] if index < len(shown) else ""
            update = gr.update(visible=bool(adapter), label=f"Strength of {names.get(adapter, index + 1)}")
            if strengths is not None:
                update |= self.show(name, strengths.get(adapter, 1.0))[self[name]]
            updates[self[name]] = update
        return updates

    def asked(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for, with a seed drawn here where a new one is wanted."""
        found = {name: named[name] for name in GenerateRequest.__dataclass_fields__.keys() & named.keys()}
        if named["new_seed"]:
            found["seed"] = new_seed()
        elif named["seed"] in (None, ""):
            raise ValueError("seed is missing; type a whole number, or let a new one be drawn each time")
        strengths = (named[name] for name in STRENGTHS)
        found["adapters"] = dict(zip(found["adapters"] or [], strengths, strict=False))
        return GenerateRequest(**found)

    def read(self, named: Mapping[str, Any]) -> GenerateRequest:
        """Return what the visitor asks for; what the browser kept has no picture to begin with."""
        request, picture = self.asked(named), named["start_picture"]
        if not picture:
            return request
        with self.studio.reading:
            start = read_start(Path(picture["path"]), named["start_strength"])
            start = start.fitted(*request.size(self.studio.engine.base))
            mask = read_mask(named["start_mask"] or "")
        return replace(request, start=replace(start, mask=mask))

    def canvas_size(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return width and height (px) of what is drawn on, whatever stands in their fields."""
        native = self.studio.engine.native_size
        return {side: max(8, min(4096, int(named[side] or native))) for side in ("width", "height")}

    def shown(self, named: Mapping[str, Any]) -> Updates:
        chosen = named["adapters"] or []
        by_place = zip(chosen, (named.get(name, 1.0) for name in STRENGTHS), strict=False)
        strengths = chosen if isinstance(chosen, Mapping) else dict(by_place)
        rest = {name: value for name, value in named.items() if name not in STRENGTHS}
        return {**super().shown(rest), **self.sliders(list(chosen), strengths)}

    def fill(self, restored: Restored) -> Updates:
        """Return the updates that make the form say a request, or only what it is of, and with what."""
        request, taken = restored.request, ["prompt", "adapters"]
        if request is None:
            return {}
        if not restored.heading:
            taken += ["seed", "steps", "guidance_scale", "width", "height", "num_images", "negative_prompt"]
        named = {name: getattr(request, name) for name in taken}
        if restored.heading:
            return PictureForm.shown(self, named)
        return PictureForm.shown(self, {**named, "new_seed": False}) | self.begin_with(request.start)

    def begin_with(self, start: Start | None) -> Updates:
        """Return the updates that put a picture and what is painted over it into the form."""
        if start is None:
            return {self["start_picture"]: None, self["start_mask"]: ""}
        image, mask = start.image, "" if start.mask is None else picture_address(start.mask, "PNG")
        page = canvas_html(MASK, width=image.width, height=image.height, under=image, drawn=mask)
        return {
            self["start_mask"]: mask,
            **self.show("start_strength", start.strength),
            self["start_picture"]: str(self.studio.engine.outputs.keep_control(image)),
            self["start_sketch"]: gr.update(value=page, visible=True),
            self.accordion: gr.update(open=True),
        }

    def _suit(self, path: str) -> Updates:
        """Give the pictures the shape of an upload, of which nothing is painted over yet."""
        with self.studio.reading:
            height, width = Settings(start=read_start(Path(path))).size(self.studio.engine.base)
        return {self["width"]: width // 8 * 8, self["height"]: height // 8 * 8, self["start_mask"]: ""}

    def _lay_under(self, values: Values) -> Updates:
        """Lay the start picture under the canvas, at the size of the pictures."""
        named = self.named(values)
        if not named["start_picture"]:
            return {self["start_sketch"]: gr.update(visible=False)}
        size = self.canvas_size(named)
        with self.studio.reading:
            fitted = read_start(Path(named["start_picture"])).fitted(size["height"], size["width"])
        drawn = named["start_mask"] if str(named["start_mask"]).startswith("data:image/png;base64,") else ""
        page = canvas_html(MASK, **size, under=fitted.image, drawn=drawn)
        return {
            self["start_sketch"]: gr.update(value=page, visible=True),
            self.accordion: gr.update(open=True),
        }


class MixBox:
    """A button that appears with the second adapter, and what it asks; made inside the form."""

    def __init__(self, panel: Panel, form: Form) -> None:
        self._form, chosen = form, form["adapters"]
        self._open = panel.button("mix", "Save this mix …", size="sm", visible=False)
        box = f"{form.prefix}-mix-box"
        with gr.Column(visible=False, elem_classes="confirm", elem_id=box) as self._box:
            name = f"{form.prefix}-mix-name"
            one = {"max_lines": 1, "max_length": MAX_CHARACTERS}
            self._name = gr.Textbox(label="Name of the mix", elem_id=name, **one)
            with gr.Row(elem_classes="tool-row"):
                save, leave = (
                    panel.button("mix-save", "Save", variant="primary"),
                    panel.button("mix-not", "Cancel"),
                )
        sliders, offered = [form[name] for name in STRENGTHS], [self._open, self._box]
        panel.on(chosen.change, self._offer, [chosen], offered)
        panel.on(self._open.click, self._ask, [chosen], [self._box, self._name])
        panel.closes(leave, self._box)
        given, shown = [chosen, self._name, *sliders], [chosen, *sliders, *offered]
        told = {"show_progress": "minimal", "show_progress_on": [save]}
        panel.page.changes.append(panel.on([save.click, self._name.submit], self._keep, given, shown, **told))

    def _offer(self, chosen: Sequence[str] | None) -> Updates:
        return {self._open: gr.update(visible=len(chosen or []) > 1), self._box: gr.update(visible=False)}

    def _ask(self, chosen: Sequence[str]) -> Updates:
        names = self._form.names()
        usual = " + ".join(names[each] for each in chosen if each in names)[:MAX_CHARACTERS]
        return {self._box: gr.update(visible=True), self._name: usual}

    def _keep(self, chosen: Sequence[str], name: str, *strengths: float) -> Updates:
        """Save it, and choose it instead of what it was made of."""
        card = self._form.studio.library.mix(dict(zip(chosen, strengths, strict=False)), name)
        gr.Info(f"{html.escape(card.name)} is in the library, and chosen here.")
        return {**self._form.shown({"adapters": {card.id: 1.0}}), **self._offer([card.id])}
