"""The settings of a picture as widgets: laid out, read as a GenerateRequest, and filled from one."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.numbers import read_number, read_optional, read_text, read_whole
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, NUM_IMAGES, SEED, GenerateRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.parts import Update, Updates

MAX_STRENGTH = 2.0
MAX_STEPS = 150
MAX_GUIDANCE = 20.0
"""Where the sliders end until a picture or a kept form comes with more."""
Values = Mapping[Component, Any]


@dataclass(frozen=True)
class Form:
    """The widgets; `strengths[i]` belongs to the i-th chosen adapter."""

    prompt: gr.Textbox
    adapters: gr.Dropdown
    strengths: tuple[gr.Slider, ...]
    seed: gr.Number
    new_seed: gr.Checkbox
    steps: gr.Slider
    guidance_scale: gr.Slider
    width: gr.Number
    height: gr.Number
    num_images: gr.Slider
    negative_prompt: gr.Textbox
    compare_with_base: gr.Checkbox
    keep_metadata: gr.Checkbox

    def named(self) -> dict[str, Component]:
        """Return the widgets by the names under which the browser keeps their values."""
        widgets: dict[str, Component] = {
            name: widget for name, widget in vars(self).items() if isinstance(widget, Component)
        }
        return widgets | {f"strength_{index}": slider for index, slider in enumerate(self.strengths)}

    def all(self) -> list[Component]:
        """Return every widget."""
        return list(self.named().values())

    def read(self, values: Values) -> GenerateRequest:
        """Return what the visitor asks for, with a seed drawn here where a new one is wanted.

        Raises:
            ValueError: it cannot be drawn.
        """
        chosen = values[self.adapters] or []
        if values[self.new_seed]:
            seed = secrets.randbelow(int(SEED.most - NUM_IMAGES.most))
        elif values[self.seed] in (None, ""):
            raise ValueError("there is no seed; type a whole number, or let a new one be drawn each time")
        else:
            seed = read_whole(values[self.seed], "the seed")
        strengths = (read_number(values[slider], "the strength") for slider in self.strengths)
        return GenerateRequest(
            prompt=read_text(values[self.prompt], "the prompt"),
            adapters=dict(zip(chosen, strengths, strict=False)),
            seed=seed,
            steps=read_whole(values[self.steps], "steps"),
            guidance_scale=read_number(values[self.guidance_scale], "guidance"),
            width=read_optional(values[self.width], "the width"),
            height=read_optional(values[self.height], "the height"),
            num_images=read_whole(values[self.num_images], "the number of pictures"),
            negative_prompt=read_text(values[self.negative_prompt], "the negative prompt"),
            compare_with_base=bool(values[self.compare_with_base]),
            keep_metadata=bool(values[self.keep_metadata]),
        )

    def fill(self, request: GenerateRequest, names: Mapping[str, str]) -> Updates:
        """Return the updates that make the form say a request; `names` are those of adapters by their ids."""
        chosen = [adapter for adapter in request.adapters if adapter in names][:MAX_ADAPTERS]
        return {
            self.prompt: request.prompt,
            self.adapters: gr.update(choices=choices(names), value=chosen),
            **self.show_strengths(chosen, names, request.adapters),
            self.seed: request.seed,
            self.new_seed: False,
            self.steps: reaching(request.steps, 1, MAX_STEPS),
            self.guidance_scale: reaching(request.guidance_scale, 0, MAX_GUIDANCE),
            self.width: request.width or self.width.value,  # an empty field is shown as 0 in a tab unopened
            self.height: request.height or self.height.value,
            self.num_images: request.num_images,
            self.negative_prompt: request.negative_prompt,
        }

    def fill_from_kept(self, kept: Mapping[str, Any], names: Mapping[str, str]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            chosen = [str(adapter) for adapter in kept["adapters"] or []]
            strengths = {name: float(kept[f"strength_{index}"]) for index, name in enumerate(chosen)}
            values = {widget: kept[name] for name, widget in self.named().items()}
            request = self.read(values | {self.new_seed: False, self.seed: kept["seed"] or 0})
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        request = replace(request, adapters=strengths)
        switches = (self.new_seed, self.compare_with_base, self.keep_metadata)
        return self.fill(request, names) | {switch: bool(values[switch]) for switch in switches}

    def show_strengths(
        self, chosen: Sequence[str], names: Mapping[str, str], strengths: Mapping[str, float]
    ) -> Updates:
        """Return the updates that show one slider for each chosen adapter, under its name."""
        updates: Updates = {}
        for index, slider in enumerate(self.strengths):
            if index < len(chosen):
                label = f"Strength of {names.get(chosen[index], chosen[index])}"
                value = strengths.get(chosen[index], 1.0)
                updates[slider] = reaching(value, 0, MAX_STRENGTH) | {"visible": True, "label": label}
            else:
                updates[slider] = gr.update(visible=False, value=1.0)
        return updates


def reaching(value: float, minimum: float, maximum: float) -> Update:
    """Return the update that sets a slider, made longer where the value lies beyond its ends."""
    return gr.update(value=value, minimum=min(minimum, value), maximum=max(maximum, value))


def choices(names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return names and ids of adapters as a dropdown wants them."""
    return [(name, adapter) for adapter, name in names.items()]


def lay_out_prompt(prefix: str) -> gr.Textbox:
    """Lay out the first thing on a tab, whose ids begin with `prefix`."""
    return gr.Textbox(
        label="Prompt",
        placeholder="What should be in the picture?",
        lines=2,
        max_lines=8,
        max_length=MAX_PROMPT,
        autofocus=True,
        scale=5,
        elem_id=f"{prefix}-prompt",
    )


def lay_out_adapters(
    prefix: str, *, label: str = "Adapters", info: str = "None draws with the base alone."
) -> tuple[gr.Dropdown, tuple[gr.Slider, ...]]:
    """Lay out the choice of adapters and the sliders, which appear as adapters are chosen."""
    chosen = gr.Dropdown(
        choices=[],
        value=[],
        multiselect=True,
        max_choices=MAX_ADAPTERS,
        label=label,
        info=info,
        elem_id=f"{prefix}-adapters",
    )
    sliders = tuple(
        gr.Slider(
            0,
            MAX_STRENGTH,
            1.0,
            step=0.05,
            label=f"Strength {index + 1}",
            visible=False,
            elem_id=f"{prefix}-strength-{index}",
        )
        for index in range(MAX_ADAPTERS)
    )
    return chosen, sliders


def lay_out_form(
    prefix: str,
    studio: Studio,
    prompt: gr.Textbox,
    adapters: gr.Dropdown,
    strengths: tuple[gr.Slider, ...],
) -> tuple[Form, gr.Button, gr.Button]:
    """Lay out the rest of the form and return it with the buttons for a new seed and the last one."""
    engine = studio.engine
    with gr.Group(elem_classes="seed-group"):
        with gr.Row(elem_classes="seed-row"):
            seed = gr.Number(
                0,
                label="Seed",
                min_width=110,
                scale=3,
                elem_id=f"{prefix}-seed",
            )
            dice = gr.Button("New seed", size="sm", min_width=84, scale=1, elem_id=f"{prefix}-dice")
            reuse = gr.Button(
                "Last seed", size="sm", min_width=84, scale=1, interactive=False, elem_id=f"{prefix}-reuse"
            )
        new_seed = gr.Checkbox(True, label="New seed each time", elem_id=f"{prefix}-new-seed")
    with gr.Group():
        num_images = gr.Slider(
            1, NUM_IMAGES.most, 1, step=1, label="Pictures", elem_id=f"{prefix}-num-images"
        )
        steps, guidance, width, height = lay_out_sampling(prefix, engine)
        compare = gr.Checkbox(True, label="Show the base beside it", elem_id=f"{prefix}-compare")
    negative, keep = lay_out_advanced(prefix)
    form = Form(
        prompt, adapters, strengths, seed, new_seed, steps, guidance, width, height, num_images, negative,
        compare, keep,
    )  # fmt: skip
    return form, dice, reuse


def lay_out_sampling(prefix: str, engine: Engine) -> tuple[gr.Slider, gr.Slider, gr.Number, gr.Number]:
    """Lay out steps, guidance, width and height."""
    steps = gr.Slider(1, MAX_STEPS, engine.default_steps, step=1, label="Steps", elem_id=f"{prefix}-steps")
    guidance = gr.Slider(
        0, MAX_GUIDANCE, engine.default_guidance, step=0.1, label="Guidance", elem_id=f"{prefix}-guidance"
    )
    with gr.Row():
        side = {"step": 8, "min_width": 100}  # what can be drawn is said in our words, which name the field
        width = gr.Number(engine.native_size, label="Width in px", elem_id=f"{prefix}-width", **side)
        height = gr.Number(engine.native_size, label="Height in px", elem_id=f"{prefix}-height", **side)
    return steps, guidance, width, height


def lay_out_advanced(prefix: str) -> tuple[gr.Textbox, gr.Checkbox]:
    """Lay out what few need: the negative prompt, and whether pictures say how they were made."""
    with gr.Accordion("Advanced", open=False, elem_id=f"{prefix}-advanced"):
        negative = gr.Textbox(
            "", label="Negative prompt", info="What the picture should not show.", lines=2,
            max_length=MAX_PROMPT, elem_id=f"{prefix}-negative",
        )  # fmt: skip
        keep = gr.Checkbox(
            True,
            label="Write the settings into the picture",
            info="So that it can be made again. Without them it tells nobody how it was made.",
            elem_id=f"{prefix}-metadata",
        )
    return negative, keep
