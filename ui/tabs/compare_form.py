"""What a grid is made of, as widgets: laid out, read as a GridRequest, and brought back from a browser."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.numbers import (
    MAX_TEXT,
    read_lines,
    read_number,
    read_optional,
    read_seeds,
    read_strengths,
    read_text,
    read_whole,
)
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, GridRequest
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_form import Values, choices, lay_out_advanced, lay_out_sampling
from ether_diffusion.ui.tabs.parts import Updates

MAX_PROMPTS_TEXT = 20 * MAX_PROMPT
"""Characters of all prompts together."""


@dataclass(frozen=True)
class CompareForm:
    """The widgets."""

    prompts: gr.Textbox
    adapters: gr.Dropdown
    strengths: gr.Textbox
    seeds: gr.Textbox
    with_base: gr.Checkbox
    steps: gr.Slider
    guidance_scale: gr.Slider
    width: gr.Number
    height: gr.Number
    negative_prompt: gr.Textbox
    keep_metadata: gr.Checkbox

    def named(self) -> dict[str, Component]:
        """Return the widgets by the names under which the browser keeps their values."""
        return dict(vars(self))

    def all(self) -> list[Component]:
        """Return every widget."""
        return list(self.named().values())

    def read(self, values: Values) -> GridRequest:
        """Return the grid that the visitor asks for.

        Raises:
            ValueError: it cannot be drawn, or is larger than allowed.
        """
        prompts = read_lines(values[self.prompts] or "")
        if not prompts:
            raise ValueError("there is no prompt; write one, or several with one on each line")
        return GridRequest(
            prompts=prompts,
            seeds=read_seeds(values[self.seeds] or ""),
            adapters=tuple(values[self.adapters] or ()),
            strengths=read_strengths(values[self.strengths] or ""),
            with_base=bool(values[self.with_base]),
            steps=read_whole(values[self.steps], "steps"),
            guidance_scale=read_number(values[self.guidance_scale], "guidance"),
            width=read_optional(values[self.width], "the width"),
            height=read_optional(values[self.height], "the height"),
            negative_prompt=read_text(values[self.negative_prompt], "the negative prompt"),
            keep_metadata=bool(values[self.keep_metadata]),
        )

    def fill_from_kept(self, kept: Mapping[str, Any], names: Mapping[str, str]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        if not kept.get("prompts"):
            return {}
        try:
            request = self.read({widget: kept[name] for name, widget in self.named().items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        chosen = [adapter for adapter in request.adapters if adapter in names]
        kept_as_typed = {name: str(kept[name]) for name in ("prompts", "strengths", "seeds")}
        found = {**vars(request), **kept_as_typed}
        return {
            **{widget: found[name] for name, widget in self.named().items()},
            self.width: request.width or self.width.value,  # an empty field is shown as 0 in a tab unopened
            self.height: request.height or self.height.value,
            self.adapters: gr.update(choices=choices(names), value=chosen),
        }


def lay_out_prompts() -> gr.Textbox:
    """Lay out the first thing on the tab."""
    return gr.Textbox(
        label="Prompts",
        placeholder="One on each line",
        lines=2,
        max_lines=12,
        max_length=MAX_PROMPTS_TEXT,
        scale=5,
        elem_id="compare-prompts",
    )


def lay_out_form(studio: Studio, prompts: gr.Textbox) -> CompareForm:
    """Lay out the rest of the form."""
    with gr.Group():
        adapters = gr.Dropdown(
            choices=[],
            value=[],
            multiselect=True,
            max_choices=MAX_ADAPTERS,
            label="Adapters",
            info="Each has a column for every strength.",
            elem_id="compare-adapters",
        )
        strengths = gr.Textbox(
            "0.5, 1", label="Strengths", info="1 is as trained.", max_length=MAX_TEXT,
            elem_id="compare-strengths",
        )  # fmt: skip
        with_base = gr.Checkbox(True, label="A column of the base", elem_id="compare-base")
        seeds = gr.Textbox(
            "0-1", label="Seeds", info="Numbers or ranges: 0-3, 7", max_length=MAX_TEXT,
            elem_id="compare-seeds",
        )  # fmt: skip
    with gr.Group():
        steps, guidance, width, height = lay_out_sampling("compare", studio.engine)
    negative, keep = lay_out_advanced("compare")
    return CompareForm(
        prompts, adapters, strengths, seeds, with_base, steps, guidance, width, height, negative, keep
    )
