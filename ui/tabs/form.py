"""A form: each field is described once, by its widget and how it is read; filled, and kept in the browser."""

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.numbers import read_number, read_optional, read_switch, read_text, read_whole
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, NUM_IMAGES, SEED, GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.parts import Update, Updates

SLIDER_ENDS = {"strength": (0, 2), "steps": (1, 150), "guidance_scale": (0, 20)}
"""Where sliders end until a picture or a kept form comes with more."""
Values = Mapping[Component, Any]
_SECRET = "kept in this browser only"
"""Gradio encrypts what it keeps under a key that it sends to the page; it must not change between servers."""


@dataclass(frozen=True)
class Field:
    """A widget; `read` checks its value, and calls it by the name it is given in an error."""

    widget: Any
    read: Callable[[Any, str], Any]
    called: str
    is_kept: bool


class Form:
    """The fields of a tab by the names that requests and browsers have for them; ids begin with `prefix`."""

    kinds: Sequence[str] = ("subject",)
    """Of the adapters that are offered."""

    def __init__(self, studio: Studio, prefix: str) -> None:
        self.studio, self.prefix = studio, prefix
        self.fields: dict[str, Field] = {}

    def add(
        self,
        name: str,
        widget: Any,
        read: Callable[[Any, str], Any] = lambda value, called: value,
        called: str = "",
        *,
        is_kept: bool = True,
    ) -> Any:
        """Take a widget as a field, and return it."""
        self.fields[name] = Field(widget, read, called or name, is_kept)
        return widget

    def __getitem__(self, name: str) -> Any:
        return self.fields[name].widget

    def all(self) -> list[Component]:
        """Return every widget."""
        return [field.widget for field in self.fields.values()]

    def kept(self) -> dict[str, Component]:
        """Return the widgets whose values the browser keeps, by the names it keeps them under."""
        return {name: field.widget for name, field in self.fields.items() if field.is_kept}

    def read_fields(self, values: Values, names: Iterable[str]) -> dict[str, Any]:
        """Return the values of fields by their names.

        Raises:
            ValueError: one cannot be what it should; it is named.
        """
        found = ((name, self.fields[name]) for name in names)
        return {name: field.read(values[field.widget], field.called) for name, field in found}

    def names(self, *kinds: str) -> dict[str, str]:
        """Return the adapters that can be chosen, id to name."""
        cards, kinds = self.studio.library.cards(), kinds or tuple(self.kinds)
        return {card.id: card.name for card in cards if card.fits_base and card.kind in kinds}

    def lay_out_choice(self, label: str, info: str) -> gr.Dropdown:
        """Lay out the choice of adapters."""
        return self.add(
            "adapters",
            gr.Dropdown(
                choices=[], value=[], multiselect=True, max_choices=MAX_ADAPTERS, label=label, info=info,
                elem_id=f"{self.prefix}-adapters",
            ),
        )  # fmt: skip

    def lay_out_sampling(self) -> None:
        """Lay out steps, guidance, width and height."""
        engine, prefix = self.studio.engine, self.prefix
        self.add(
            "steps",
            gr.Slider(
                *SLIDER_ENDS["steps"], engine.default_steps, step=1, label="Steps", elem_id=f"{prefix}-steps"
            ),
            read_whole,
        )  # fmt: skip
        self.add(
            "guidance_scale",
            gr.Slider(
                *SLIDER_ENDS["guidance_scale"], engine.default_guidance, step=0.1, label="Guidance",
                elem_id=f"{prefix}-guidance",
            ),
            read_number,
            "guidance",
        )  # fmt: skip
        with gr.Row():
            for side in ("width", "height"):  # what can be drawn is said in our words, which name the field
                label = f"{side.capitalize()} in px"
                number = gr.Number(
                    engine.native_size, label=label, step=8, min_width=100, elem_id=f"{prefix}-{side}"
                )
                self.add(side, number, read_optional, f"the {side}")

    def lay_out_advanced(self) -> None:
        """Lay out what few need: the negative prompt, and whether pictures say how they were made."""
        with gr.Accordion("Advanced", open=False, elem_id=f"{self.prefix}-advanced"):
            negative = gr.Textbox(
                "", label="Negative prompt", info="What the picture should not show.", lines=2,
                max_length=MAX_PROMPT, elem_id=f"{self.prefix}-negative",
            )  # fmt: skip
            keep = gr.Checkbox(
                True,
                label="Write the settings into the picture",
                info="So that it can be made again. Without them it tells nobody how it was made.",
                elem_id=f"{self.prefix}-metadata",
            )
        self.add("negative_prompt", negative, read_text, "the negative prompt")
        self.add("keep_metadata", keep, read_switch)

    def fill_sides(self, width: int | None, height: int | None) -> Updates:
        """Return the updates of the sides; an empty field would be shown as 0 in a tab unopened."""
        found = {"width": width, "height": height}
        return {self[side]: value or self[side].value for side, value in found.items()}


class PictureForm(Form):
    """The settings of pictures of one prompt, with a strength for each chosen adapter."""

    kinds: Sequence[str] = ("subject", "control")

    def lay_out_prompt(self) -> None:
        """Lay out the first thing on a tab."""
        prompt = gr.Textbox(
            label="Prompt", placeholder="What should be in the picture?", lines=2, max_lines=8,
            max_length=MAX_PROMPT, autofocus=True, scale=5, elem_id=f"{self.prefix}-prompt",
        )  # fmt: skip
        self.add("prompt", prompt, read_text, "the prompt")

    def lay_out_adapters(self, label: str, info: str) -> None:
        """Lay out the choice of adapters and the sliders, which appear as adapters are chosen."""
        self.lay_out_choice(label, info)
        self.strengths = [
            self.add(
                f"strength_{index}",
                gr.Slider(
                    *SLIDER_ENDS["strength"], 1.0, step=0.05, label=f"Strength {index + 1}", visible=False,
                    elem_id=f"{self.prefix}-strength-{index}",
                ),
                read_number,
                "the strength",
            )
            for index in range(MAX_ADAPTERS)
        ]  # fmt: skip

    def lay_out_rest(self) -> None:
        """Lay out the seed with its buttons, the number of pictures, and what all forms have."""
        prefix, small = self.prefix, {"size": "sm", "min_width": 84, "scale": 1}
        with gr.Group(elem_classes="seed-group"):
            with gr.Row(elem_classes="seed-row"):
                seed = gr.Number(0, label="Seed", min_width=110, scale=3, elem_id=f"{prefix}-seed")
                self.dice = gr.Button("New seed", elem_id=f"{prefix}-dice", **small)
                self.reuse = gr.Button("Last seed", interactive=False, elem_id=f"{prefix}-reuse", **small)
            new_seed = gr.Checkbox(True, label="New seed each time", elem_id=f"{prefix}-new-seed")
        self.add("seed", seed, read_whole, "the seed")
        self.add("new_seed", new_seed, read_switch)
        with gr.Group():
            most, name = NUM_IMAGES.most, f"{prefix}-num-images"
            images = gr.Slider(1, most, 1, step=1, label="Pictures", elem_id=name)
            self.add("num_images", images, read_whole, "the number of pictures")
            self.lay_out_sampling()
            compare = gr.Checkbox(True, label="Show the base beside it", elem_id=f"{prefix}-compare")
            self.add("compare_with_base", compare, read_switch)
        self.lay_out_advanced()

    def tie(self, last_seed: Callable[..., Any], shown: gr.State, private: Mapping[str, Any]) -> None:
        """Tie the buttons of the seed, and a slider to every chosen adapter."""
        seeds = [self["seed"], self["new_seed"]]
        self.dice.click(None, js=f"() => Math.floor(Math.random() * {2**32})", outputs=seeds[:1], **private)
        self["seed"].input(None, js="() => false", outputs=seeds[1:], **private)
        self.reuse.click(handler(last_seed), [shown], seeds, **private)
        self["adapters"].input(handler(self.choose), [self["adapters"]], self.strengths, **private)

    def choose(self, chosen: list[str] | None) -> Updates:
        """Show a slider for every chosen adapter."""
        return self._show_strengths(chosen or [], self.names(), {})

    def read(self, values: Values) -> GenerateRequest:
        """Return what the visitor asks for, with a seed drawn here where a new one is wanted.

        Raises:
            FileNotFoundError, ValueError: it cannot be drawn.
        """
        if values[self["new_seed"]]:
            values = {**values, self["seed"]: secrets.randbelow(int(SEED.most - NUM_IMAGES.most))}
        elif values[self["seed"]] in (None, ""):
            raise ValueError("there is no seed; type a whole number, or let a new one be drawn each time")
        names = [name for name in GenerateRequest.__dataclass_fields__ if name in self.fields]
        found = self.read_fields(values, names)
        strengths = self.read_fields(values, [f"strength_{index}" for index in range(MAX_ADAPTERS)])
        adapters = dict(zip(found.pop("adapters") or [], strengths.values(), strict=False))
        return GenerateRequest(adapters=adapters, **found)

    def fill(self, request: GenerateRequest) -> Updates:
        """Return the updates that make the form say a request."""
        names = self.names()
        chosen = [adapter for adapter in request.adapters if adapter in names][:MAX_ADAPTERS]
        return {
            self["prompt"]: request.prompt,
            self["adapters"]: gr.update(choices=choices(names), value=chosen),
            **self._show_strengths(chosen, names, request.adapters),
            self["seed"]: request.seed,
            self["new_seed"]: False,
            self["steps"]: reaching(request.steps, "steps"),
            self["guidance_scale"]: reaching(request.guidance_scale, "guidance_scale"),
            **self.fill_sides(request.width, request.height),
            self["num_images"]: request.num_images,
            self["negative_prompt"]: request.negative_prompt,
        }

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            strengths = {
                str(name): float(kept[f"strength_{n}"]) for n, name in enumerate(kept["adapters"] or [])
            }
            values = {widget: kept.get(name) for name, widget in self.kept().items()}
            seed = {self["new_seed"]: False, self["seed"]: kept["seed"] or 0}
            request = replace(PictureForm.read(self, values | seed), adapters=strengths)
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        switches = [self[name] for name in ("new_seed", "compare_with_base", "keep_metadata")]
        return PictureForm.fill(self, request) | {switch: bool(values[switch]) for switch in switches}

    def _show_strengths(
        self, chosen: Sequence[str], names: Mapping[str, str], strengths: Mapping[str, float]
    ) -> Updates:
        updates: Updates = {}
        for index, slider in enumerate(self.strengths):
            if index < len(chosen):
                label = f"Strength of {names.get(chosen[index], chosen[index])}"
                value = strengths.get(chosen[index], 1.0)
                updates[slider] = reaching(value, "strength") | {"visible": True, "label": label}
            else:
                updates[slider] = gr.update(visible=False, value=1.0)
        return updates


def reaching(value: float, what: str) -> Update:
    """Return the update that sets a slider, made longer where the value lies beyond its ends."""
    least, most = SLIDER_ENDS[what]
    return gr.update(value=value, minimum=min(least, value), maximum=max(most, value))


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
    name: str,
    widgets: Mapping[str, Component],
    restore: Callable[[Mapping[str, Any]], Updates],
) -> None:
    """Write the values of widgets to the browser as they change, and give them to `restore` on loading.

    Nothing is sent to the server to keep them. What comes back is whatever the browser holds: `restore` must
    check it.
    """
    kept = browser_state(name)
    names = json.dumps(list(widgets))
    gr.on(
        [widget.change for widget in widgets.values()],
        None,
        js=f"(...values) => Object.fromEntries({names}.map((name, index) => [name, values[index]]))",
        inputs=list(widgets.values()),
        outputs=[kept],
        api_visibility="private",
    )

    @handler
    def load(found: object) -> Updates:
        return restore(found) if isinstance(found, dict) else {}

    Context.root_block.load(
        load, [kept], list(widgets.values()), api_visibility="private", show_progress="hidden"
    )
