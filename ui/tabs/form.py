"""Forms: each field is described once, by its component and how it is read; kept in the browser."""

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context

from ether_diffusion.ui.control_images import DETECTORS
from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.numbers import (
    MAX_TEXT,
    read_lines,
    read_number,
    read_optional,
    read_seeds,
    read_strengths,
    read_switch,
    read_text,
    read_whole,
)
from ether_diffusion.ui.requests import (
    MAX_ADAPTERS,
    MAX_PROMPT,
    NUM_IMAGES,
    SEED,
    GenerateRequest,
    GridRequest,
)
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.parts import QUIET, Update, Updates

Values = Mapping[Component, Any]
DRAW, UPLOAD = "Draw", "Upload"
_SECRET = "kept in this browser only"
"""Gradio encrypts what it keeps under a key that it sends to the page; it must not change between servers."""


Read = Callable[[Any, str], Any]


class Field:
    """A component with its options; `read` checks a value, and errors call it by the label.

    Sliders end where they do until a picture or a kept form comes with more.
    """

    def __init__(
        self, kind: Callable[..., Any], read: Read, /, *, id: str = "", is_kept: bool = True, **options: Any
    ) -> None:
        self.kind, self.read, self.id, self.is_kept, self.options = kind, read, id, is_kept, options


def _as_it_is(value: Any, called: str) -> Any:
    return value


def _read_prompts(text: object, called: str) -> tuple[str, ...]:
    prompts = read_lines(read_text(text, called))
    if not prompts:
        raise ValueError("there is no prompt; write one, or several with one on each line")
    return prompts


STRENGTH: dict[str, Any] = {"minimum": 0, "maximum": 2, "value": 1.0, "step": 0.05}
STRENGTHS = [f"strength_{index}" for index in range(MAX_ADAPTERS)]
FIELDS: dict[str, Field] = {
    "prompt": Field(
        gr.Textbox, read_text, label="Prompt", placeholder="What should be in the picture?", lines=2,
        max_lines=8, max_length=MAX_PROMPT, autofocus=True, scale=5,
    ),
    "prompts": Field(
        gr.Textbox, _read_prompts, label="Prompts", placeholder="One on each line", lines=2, max_lines=12,
        max_length=20 * MAX_PROMPT, scale=5,
    ),
    "adapters": Field(
        gr.Dropdown, lambda ids, _: tuple(ids or ()), choices=[], value=[], multiselect=True,
        max_choices=MAX_ADAPTERS,
    ),
    **{
        name: Field(gr.Slider, read_number, **STRENGTH, label=f"Strength {index + 1}", visible=False)
        for index, name in enumerate(STRENGTHS)
    },
    "strengths": Field(
        gr.Textbox, lambda text, _: read_strengths(text or ""), value="0.5, 1", label="Strengths",
        info="1 is as trained.", max_length=MAX_TEXT,
    ),
    "with_base": Field(gr.Checkbox, _as_it_is, id="base", value=True, label="A column of the base"),
    "seeds": Field(
        gr.Textbox, lambda text, _: read_seeds(text or ""), value="0-1", label="Seeds",
        info="Numbers or ranges: 0-3, 7", max_length=MAX_TEXT,
    ),
    "seed": Field(gr.Number, read_whole, value=0, label="Seed", min_width=110, scale=3),
    "new_seed": Field(gr.Checkbox, read_switch, value=True, label="New seed each time"),
    "num_images": Field(
        gr.Slider, read_whole, minimum=1, maximum=NUM_IMAGES.most, value=1, step=1, label="Pictures"
    ),
    "steps": Field(gr.Slider, read_whole, minimum=1, maximum=150, step=1, label="Steps"),
    "guidance_scale": Field(
        gr.Slider, read_number, id="guidance", minimum=0, maximum=20, step=0.1, label="Guidance"
    ),
    # what can be drawn is said in our words, which name the field
    "width": Field(gr.Number, read_optional, label="Width in px", step=8, min_width=100),
    "height": Field(gr.Number, read_optional, label="Height in px", step=8, min_width=100),
    "compare_with_base": Field(
        gr.Checkbox, read_switch, id="compare", value=True, label="Show the base beside it"
    ),
    "negative_prompt": Field(
        gr.Textbox, read_text, id="negative", value="", label="Negative prompt",
        info="What the picture should not show.", lines=2, max_length=MAX_PROMPT,
    ),
    "keep_metadata": Field(
        gr.Checkbox, read_switch, id="metadata", value=True, label="Write the settings into the picture",
        info="So that it can be made again. Without them it tells nobody how it was made.",
    ),
    "adapter": Field(
        gr.Dropdown, _as_it_is, choices=[], value=None, label="Control adapter",
        info="It follows the control image.",
    ),
    "control_strength": Field(gr.Slider, read_number, **STRENGTH, label="Strength of the control image"),
    "adapter_strength": Field(gr.Slider, read_number, **STRENGTH, label="Strength of its adapter"),
    "source": Field(gr.Radio, _as_it_is, choices=[DRAW, UPLOAD], value=DRAW, label="Control image"),
    "drawing": Field(
        gr.Textbox, read_text, is_kept=False, visible="hidden", show_label=False, container=False
    ),
    "upload": Field(
        gr.File, _as_it_is, is_kept=False, label="Control image or photo", visible=False, height=104,
        elem_classes="drop",
    ),
    "detector": Field(
        gr.Dropdown, read_text, choices=[(words, name) for name, words in DETECTORS.items()], value="",
        label="The upload is", visible=False,
    ),
}  # fmt: skip
"""Every field by the name that requests and browsers have for it."""


class Form:
    """The fields of a tab; their ids in the page begin with `prefix`."""

    first: str
    """The field beside the button."""
    kinds: Sequence[str] = ("subject",)
    """Of the adapters that are offered."""

    def __init__(self, studio: Studio, prefix: str) -> None:
        self.studio, self.prefix, engine = studio, prefix, studio.engine
        self._begin: dict[str, Any] = {
            "steps": engine.default_steps,
            "guidance_scale": engine.default_guidance,
        }
        self._begin |= dict.fromkeys(("width", "height"), engine.native_size)
        self.widgets: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.widgets[name]

    def put(self, *names: str, **options: Any) -> None:
        """Lay out fields."""
        for name in names:
            field = FIELDS[name]
            found = field.options | ({"value": self._begin[name]} if name in self._begin else {}) | options
            elem_id = f"{self.prefix}-{field.id or name.replace('_', '-')}"
            self.widgets[name] = field.kind(**found, elem_id=elem_id)

    def put_sampling(self) -> None:
        """Lay out steps, guidance, width and height."""
        self.put("steps", "guidance_scale")
        with gr.Row():
            self.put("width", "height")

    def put_advanced(self) -> None:
        """Lay out what few need."""
        with gr.Accordion("Advanced", open=False, elem_id=f"{self.prefix}-advanced"):
            self.put("negative_prompt", "keep_metadata")

    def all(self) -> set[Component]:
        """Return every widget."""
        return set(self.widgets.values())

    def kept(self) -> dict[str, Component]:
        """Return the widgets whose values the browser keeps, by the names it keeps them under."""
        return {name: widget for name, widget in self.widgets.items() if FIELDS[name].is_kept}

    def read_fields(self, values: Values, names: Iterable[str]) -> dict[str, Any]:
        """Return the values of fields by their names.

        Raises:
            ValueError: one cannot be what it should; it is named.
        """
        widgets = {name: self[name] for name in names}
        return {n: FIELDS[n].read(values[w], f"the {(w.label or n).lower()}") for n, w in widgets.items()}

    def names(self, *kinds: str) -> dict[str, str]:
        """Return the adapters that can be chosen, id to name."""
        cards, kinds = self.studio.library.cards(), kinds or tuple(self.kinds)
        return {card.id: card.name for card in cards if card.fits_base and card.kind in kinds}

    def show(self, name: str, value: Any) -> Update:
        """Return the update that shows a value; a side is never empty, which a tab unopened shows as 0."""
        widget = self[name]
        if name == "adapters":
            names = self.names()
            chosen = [adapter for adapter in value if adapter in names][:MAX_ADAPTERS]
            return gr.update(choices=choices(names), value=chosen)
        if isinstance(widget, gr.Slider):
            least, most = min(widget.minimum, value), max(widget.maximum, value)
            return gr.update(value=value, minimum=least, maximum=most)
        return value or self._begin[name] if name in ("width", "height") else value

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            return self._from_kept(kept)
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}

    def _from_kept(self, kept: Mapping[str, Any]) -> Updates:
        raise NotImplementedError

    def read(self, values: Values) -> GenerateRequest | GridRequest:
        """Return what the visitor asks for.

        Raises:
            FileNotFoundError, ValueError: it cannot be drawn.
        """
        raise NotImplementedError


class GridForm(Form):
    """What a grid is made of."""

    first = "prompts"

    def put_rest(self) -> None:
        """Lay out what stands below the prompts."""
        with gr.Group():
            self.put("adapters", label="Adapters", info="Each has a column for every strength.")
            self.put("strengths", "with_base", "seeds")
        with gr.Group():
            self.put_sampling()
        self.put_advanced()

    def read(self, values: Values) -> GridRequest:
        return GridRequest(**self.read_fields(values, self.widgets))

    def _from_kept(self, kept: Mapping[str, Any]) -> Updates:
        self.read({widget: kept[name] for name, widget in self.kept().items()})
        return {widget: self.show(name, kept[name]) for name, widget in self.kept().items()}


class PictureForm(Form):
    """The settings of pictures of one prompt, with a strength for each chosen adapter."""

    first = "prompt"
    kinds: Sequence[str] = ("subject", "control")
    label = "Adapters"
    info = "None draws with the base alone."

    def put_rest(self) -> None:
        """Lay out what stands below the prompt; sliders appear as adapters are chosen."""
        with gr.Group():
            self.put("adapters", label=self.label, info=self.info)
            self.put(*STRENGTHS)
        small: dict[str, Any] = {"size": "sm", "min_width": 84, "scale": 1}
        with gr.Group(elem_classes="seed-group"):
            with gr.Row(elem_classes="seed-row"):
                self.put("seed")
                self.dice = gr.Button("New seed", elem_id=f"{self.prefix}-dice", **small)
                reuse = f"{self.prefix}-reuse"
                self.reuse = gr.Button("Last seed", interactive=False, elem_id=reuse, **small)
            self.put("new_seed")
        with gr.Group():
            self.put("num_images")
            self.put_sampling()
            self.put("compare_with_base")
        self.put_advanced()

    def tie(self) -> None:
        """Tie the buttons of the seed, and a slider to every chosen adapter."""
        seed, strengths = self["seed"], [self[name] for name in STRENGTHS]
        self.dice.click(None, js=f"() => Math.floor(Math.random() * {2**32})", outputs=[seed], **QUIET)
        seed.input(None, js="() => false", outputs=[self["new_seed"]], **QUIET)
        self["adapters"].input(handler(self.choose), [self["adapters"]], strengths, **QUIET)

    def choose(self, chosen: list[str] | None, strengths: Mapping[str, float] | None = None) -> Updates:
        """Show a slider for every chosen adapter."""
        names, updates = self.names(), Updates()
        shown = [adapter for adapter in chosen or [] if adapter in names or strengths is None]
        for index, slider in enumerate(STRENGTHS):
            update = gr.update(visible=False, value=1.0)
            if index < len(shown):
                strength = (strengths or {}).get(shown[index], 1.0)
                label = f"Strength of {names.get(shown[index], shown[index])}"
                update = self.show(slider, strength) | {"visible": True, "label": label}
            updates[self[slider]] = update
        return updates

    def read(self, values: Values) -> GenerateRequest:
        """Return what the visitor asks for, with a seed drawn here where a new one is wanted."""
        if values[self["new_seed"]]:
            values = {**values, self["seed"]: secrets.randbelow(int(SEED.most - NUM_IMAGES.most))}
        elif values[self["seed"]] in (None, ""):
            raise ValueError("there is no seed; type a whole number, or let a new one be drawn each time")
        found = self.read_fields(values, GenerateRequest.__dataclass_fields__.keys() & self.widgets.keys())
        strengths = self.read_fields(values, STRENGTHS).values()
        return GenerateRequest(**found | {"adapters": dict(zip(found["adapters"], strengths, strict=False))})

    def fill(self, request: GenerateRequest) -> Updates:
        """Return the updates that make the form say a request."""
        taken = (
            "prompt", "adapters", "seed", "steps", "guidance_scale", "width", "height", "num_images",
            "negative_prompt",
        )  # fmt: skip
        return {
            **{self[name]: self.show(name, getattr(request, name)) for name in taken},
            **self.choose(list(request.adapters), request.adapters),
            self["new_seed"]: False,
        }

    def _from_kept(self, kept: Mapping[str, Any]) -> Updates:
        names = enumerate(kept["adapters"] or [])
        strengths = {str(name): float(kept[STRENGTHS[index]]) for index, name in names}
        values = {widget: kept[name] for name, widget in self.kept().items()}
        seed = {self["new_seed"]: False, self["seed"]: kept["seed"] or 0}
        request = replace(PictureForm.read(self, values | seed), adapters=strengths)
        switches = self.read_fields(values, ["new_seed", "compare_with_base", "keep_metadata"])
        return PictureForm.fill(self, request) | {self[name]: value for name, value in switches.items()}


def choices(names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return names and ids of adapters as a dropdown wants them."""
    return [(name, adapter) for adapter, name in names.items()]


def browser_state(name: str, default: Any = None) -> gr.BrowserState:
    """Return a value that the browser keeps, outside the tabs: what is in a closed one is not there yet."""
    inside = Context.block
    Context.block = Context.root_block
    try:
        return gr.BrowserState(default, storage_key=f"ether-studio-{name}", secret=_SECRET)
    finally:
        Context.block = inside


def keep_in_browser(
    name: str, widgets: Mapping[str, Component], restore: Callable[[Mapping[str, Any]], Updates]
) -> None:
    """Write the values of widgets to the browser as they change, and give them to `restore` on loading.

    Nothing is sent to the server to keep them. What comes back is whatever the browser holds: `restore` must
    check it.
    """
    kept, names, values = browser_state(name), json.dumps(list(widgets)), list(widgets.values())
    gr.on(
        [widget.change for widget in values],
        None,
        js=f"(...values) => Object.fromEntries({names}.map((name, index) => [name, values[index]]))",
        inputs=values,
        outputs=[kept],
        api_visibility="private",
    )

    @handler
    def load(found: object) -> Updates:
        return restore(found) if isinstance(found, dict) else {}

    Context.root_block.load(load, [kept], values, **QUIET)
