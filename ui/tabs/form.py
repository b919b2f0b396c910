"""Fields, each described once, and the forms made of them, which the browser keeps."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import gradio as gr
from gradio.context import Context

from ether_diffusion.ui.control_images import DETECTORS
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, MAX_TEXT, NUM_IMAGES
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.page import Page, Updates, Values

Field = Callable[..., Any]
DRAW, UPLOAD = "Draw", "Upload"
STRENGTHS = [f"strength_{index}" for index in range(MAX_ADAPTERS)]
_strength = partial(gr.Slider, minimum=0, maximum=2, value=1.0, step=0.05)
_text, _check = partial(gr.Textbox, max_length=MAX_TEXT), partial(gr.Checkbox, value=True)
_prompt = partial(gr.Textbox, lines=2, max_length=MAX_PROMPT)
_file = partial(gr.File, height=104, elem_classes="drop")
_drawing = partial(gr.Textbox, value="", visible="hidden", show_label=False, container=False)
_sketch = partial(gr.HTML, js_on_load=files("ether_diffusion.ui").joinpath("sketch.js").read_text("utf-8"))
FIELDS: dict[str, Field] = {
    "prompt": partial(_prompt, label="Prompt", placeholder="What should be in the picture?", max_lines=8,
                      autofocus=True, scale=5),
    "prompts": partial(_prompt, label="Prompts", placeholder="One on each line", max_lines=12,
                       max_length=20 * MAX_PROMPT, scale=5),
    "adapters": partial(gr.Dropdown, choices=[], value=[], multiselect=True, max_choices=MAX_ADAPTERS),
    **{name: partial(_strength, label=f"Strength {index}", visible=False)
       for index, name in enumerate(STRENGTHS, 1)},
    "strengths": partial(_text, value="0.5, 1", label="Strengths", info="1 is as trained."),
    "with_base": partial(_check, label="A column of the base"),
    "seeds": partial(_text, value="0-1", label="Seeds", info="Numbers or ranges: 0-3, 7"),
    "seed": partial(gr.Number, value=0, label="Seed", min_width=110, scale=3),
    "new_seed": partial(_check, label="New seed each time"),
    "num_images": partial(gr.Slider, minimum=1, maximum=NUM_IMAGES.most, value=1, step=1, label="Pictures"),
    "steps": partial(gr.Slider, minimum=1, maximum=150, step=1, label="Steps"),
    "guidance_scale": partial(gr.Slider, minimum=0, maximum=20, step=0.1, label="Guidance"),
    # what can be drawn is said in our words, which name the field
    "width": partial(gr.Number, label="Width in px", step=8, min_width=100),
    "height": partial(gr.Number, label="Height in px", step=8, min_width=100),
    "compare_with_base": partial(_check, label="Show the base beside it"),
    "negative_prompt": partial(_prompt, value="", label="Negative prompt",
                               info="What the picture should not show."),
    "keep_metadata": partial(_check, label="Write the settings into the picture",
                             info="So that it can be made again. Without them nobody knows how it was made."),
    "adapter": partial(gr.Dropdown, choices=[], value=None, label="Control adapter",
                       info="It follows the control image."),
    "control_strength": partial(_strength, label="Strength of the control image"),
    "adapter_strength": partial(_strength, label="Strength of its adapter"),
    "source": partial(gr.Radio, choices=[DRAW, UPLOAD], value=DRAW, label="Control image"),
    "sketch": _sketch,
    "drawing": _drawing,
    "upload": partial(_file, label="Control image or photo", visible=False),
    "detector": partial(gr.Dropdown, choices=[(words, name) for name, words in DETECTORS.items()], value="",
                        label="The upload is", visible=False),
    "start_picture": partial(_file, label="Picture", file_types=["image"]),
    "start_strength": partial(gr.Slider, minimum=0.05, maximum=1, value=0.6, step=0.05,
                              label="How far from it", info="0.3 keeps its shapes, 1 nothing of it."),
    "start_sketch": partial(_sketch, visible=False),
    "start_mask": _drawing,
}  # fmt: skip
"""Every field of what is drawn by the name that requests and browsers have for it.

Sliders end where they do until a picture or a kept form brings more.
"""
CANVASES = {"drawing": "sketch", "start_mask": "start_sketch"}
"""By the fields that take what is drawn on them."""
_NOT_KEPT = (*CANVASES, *CANVASES.values(), "upload", "detector", "start_picture")
OFFERED = {"adapters": "subject", "adapter": "control"}
"""Fields that offer adapters, and of which kind."""
_IDS = {
    "with_base": "base", "guidance_scale": "guidance", "compare_with_base": "compare",
    "negative_prompt": "negative", "keep_metadata": "metadata",
}  # fmt: skip
"""Of fields that go by another name in the page than in requests."""


class Form:
    """The fields of a tab; their ids in the page begin with `prefix`."""

    def __init__(self, studio: Studio, prefix: str, fields: Mapping[str, Field] = FIELDS) -> None:
        self.studio, self.prefix, self.fields = studio, prefix, fields
        self.widgets: dict[str, Any] = {}
        self.kept = Page.browser_state(prefix)

    @property
    def _begin(self) -> dict[str, Any]:
        """What the fields begin with that suit the base."""
        engine = self.studio.engine
        size = dict.fromkeys(("width", "height"), engine.native_size)
        begin = {**size, "steps": engine.default_steps, "guidance_scale": engine.default_guidance}
        return begin if self.fields is FIELDS else {}

    def begin(self) -> None:
        """Have the fields hold what a visitor finds who has no form yet."""
        for name, value in self._begin.items():
            self[name].value = value
        for side in {"width", "height"} & self.widgets.keys():
            self[side].info = f"Up to {self.studio.engine.cost.largest_side} here."

    def __getitem__(self, name: str) -> Any:
        return self.widgets[name]

    def put(self, *names: str, **options: Any) -> None:
        """Lay out fields."""
        for name in names:
            elem_id = f"{self.prefix}-{_IDS.get(name, name.replace('_', '-'))}"
            self.widgets[name] = self.fields[name](**options, elem_id=elem_id)

    def put_sampling(self) -> None:
        """Lay out steps, guidance, width and height."""
        self.put("steps", "guidance_scale")
        with gr.Row():
            self.put("width", "height")

    def put_advanced(self) -> None:
        """Lay out what few need."""
        with gr.Accordion("Advanced", open=False, elem_id=f"{self.prefix}-advanced"):
            self.put("negative_prompt", "keep_metadata")

    def all(self) -> set[Any]:
        """Return every widget."""
        return set(self.widgets.values())

    def named(self, values: Values) -> dict[str, Any]:
        """Return values by the names of their fields."""
        return {name: values[widget] for name, widget in self.widgets.items() if widget in values}

    def asked(self, named: Mapping[str, Any]) -> Any:
        """Return what values by name ask for, but for what was uploaded or drawn, or raise a ValueError."""
        raise NotImplementedError

    def read(self, named: Mapping[str, Any]) -> Any:
        """Return what all values by name ask for, or raise a ValueError."""
        return self.asked(named)

    def plain(self) -> set[Any]:
        """Return the widgets of what is neither uploaded nor drawn."""
        return {widget for name, widget in self.widgets.items() if name not in _NOT_KEPT}

    def names(self, kind: str = "subject") -> dict[str, str]:
        """Return the adapters of a kind that can be chosen, id to name."""
        return {c.id: c.name for c in self.studio.library.cards() if c.fits_base and c.kind == kind}

    def offer(self, name: str = "adapters", **value: Any) -> Updates:
        """Return the update of a field that offers adapters."""
        names = self.names(OFFERED[name])
        return {self[name]: gr.update(choices=[(called, each) for each, called in names.items()], **value)}

    def show(self, name: str, value: Any) -> Updates:
        """Return the update that shows a value; a number is never empty, which a closed tab shows as 0.

        What follows a control image is not offered elsewhere, nor what is gone or of another base.
        """
        widget = self[name]
        if name in OFFERED:
            names = self.names(OFFERED[name])
            chosen = [each for each in ([value] if isinstance(value, str) else value or ()) if each in names]
            return self.offer(name, value=chosen if name == "adapters" else next(iter(chosen), None))
        if isinstance(widget, gr.Slider):
            least, most = min(widget.minimum, value), max(widget.maximum, value)
            return {widget: gr.update(value=value, minimum=least, maximum=most)}
        return {widget: value or self._begin.get(name, 0) if isinstance(widget, gr.Number) else value}

    def shown(self, named: Mapping[str, Any]) -> Updates:
        """Return the updates that show values by name."""
        return {widget: each for name in named for widget, each in self.show(name, named[name]).items()}

    def keep_in_browser(self) -> None:
        """Write the values to the browser as they change, which shows them again when the page is loaded.

        Nothing is sent to the server, and no field is filled that the visitor has touched before.
        """
        names = [name for name in self.widgets if name not in _NOT_KEPT]
        widgets, listed = [self[name] for name in names], json.dumps(names)
        collect = f"""(...values) => Object.fromEntries([...{listed}.map((name, i) => [name, values[i]]),
          ["base", document.querySelector("#heading [data-base]")?.dataset.base]])"""
        changes: list[Any] = [widget.change for widget in widgets]
        gr.on(changes, None, js=collect, inputs=widgets, outputs=[self.kept], api_visibility="private")
        self._restore(Context.root_block.load, [name for name in names if name not in OFFERED])

    def restore_offered(self, event: Any) -> None:
        """Show on an event which of the adapters that are offered the browser has kept."""
        self._restore(event, [name for name in OFFERED if name in self.widgets])

    def _restore(self, event: Any, names: Sequence[str]) -> None:
        limits = ("value", "minimum", "maximum", "step")
        fields = [
            {"name": name, "id": self[name].elem_id, "is_of_base": name in self._begin,
             **{limit: getattr(self[name], limit, None) for limit in limits}}
            for name in names
        ]  # fmt: skip
        restore = f"""async (kept) => {{
          while (!window.etherStudio) await new Promise(requestAnimationFrame);
          return window.etherStudio.restore({json.dumps(self.prefix)}, kept, {json.dumps(fields)}); }}"""
        event(None, [self.kept], [self[name] for name in names], js=restore, api_visibility="private")
