"""What is to be learned, and how long, as widgets; read as a TrainRequest, and shown as a command."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import gradio as gr
from gradio.components import Component

from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName
from ether_diffusion.ui.numbers import read_optional, read_whole
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.create_form import Values
from ether_diffusion.ui.tabs.parts import Updates
from ether_diffusion.ui.training_request import (
    MAX_NAME_CHARACTERS,
    MAX_PROMPT_CHARACTERS,
    TrainRequest,
)

PRESET_WORDS: Mapping[PresetName, str] = {
    "fast": "a first look",
    "balanced": "for most subjects",
    "faithful": "as in the ETHER paper, with 200 pictures of its class",
}
_PLACEHOLDER = (Path("photo"),)
"""Stands for photos where only the rest of a request is looked at."""


@dataclass(frozen=True)
class TrainForm:
    """The widgets of the form, without the photos."""

    subject: gr.Textbox
    name: gr.Textbox
    preset: gr.Radio
    token: gr.Textbox
    instance_prompt: gr.Textbox
    steps: gr.Textbox
    seed: gr.Number
    samples: gr.Textbox

    def named(self) -> dict[str, Component]:
        """Return the widgets by the names under which the browser keeps their values."""
        return dict(vars(self))

    def all(self) -> list[Component]:
        """Return every widget."""
        return list(self.named().values())

    def read(self, values: Values, photos: tuple[Path, ...]) -> TrainRequest:
        """Return what the visitor asks for.

        Raises:
            ValueError: it cannot be trained.
        """
        seed = read_optional(values[self.seed], "the seed")
        samples = [line.strip() for line in (values[self.samples] or "").splitlines() if line.strip()]
        return TrainRequest(
            photos=photos,
            subject=(values[self.subject] or "").strip(),
            name=(values[self.name] or "").strip(),
            token=(values[self.token] or "").strip() or "sks",
            instance_prompt=(values[self.instance_prompt] or "").strip(),
            preset=cast(PresetName, values[self.preset]),
            steps=None if values[self.steps] in (None, "") else read_whole(values[self.steps], "steps"),
            seed=seed or 0,
            validation_prompts=tuple(samples),
        )

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            values: Values = {widget: kept[name] for name, widget in self.named().items()}
            request = self.read(values, _PLACEHOLDER)
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        return {
            self.subject: request.subject,
            self.name: request.name,
            self.preset: request.preset,
            self.token: request.token,
            self.instance_prompt: request.instance_prompt,
            self.steps: "" if request.steps is None else str(request.steps),
            self.seed: request.seed,
            self.samples: "\n".join(request.validation_prompts),
        }


def describe(form: TrainForm, values: Values, studio: Studio) -> tuple[str, str]:
    """Return HTML that says how the subject will be called, and the command that trains it."""
    if not (values[form.subject] or "").strip():
        return '<p class="quiet">Say what it is, and the prompt for its photos is made for you.</p>', ""
    try:
        request = form.read(values, _PLACEHOLDER)
    except ValueError as error:
        return f'<p class="quiet">{escape(str(error)[:1].upper() + str(error)[1:])}.</p>', ""
    token, words = escape(request.token), escape(request.trigger(studio.runs.base))
    words = words.replace(token, f"<b>{token}</b>", 1)
    said = f'<p class="prompt-made">It is learned as “{words}”: these words call it in a prompt.</p>'
    return said, shown_command(studio.runs.command(request), studio.runs.root.parent)


def shown_command(command: list[str], folder: Path) -> str:
    """Return a command as one types it in the studio's folder."""
    words = ["train-dreambooth", *(word.replace(f"{folder}/", "") for word in command[3:])]
    return shlex.join(words)


def lay_out_subject() -> tuple[gr.Textbox, gr.Textbox]:
    """Lay out what it is, and what it is called."""
    with gr.Row():
        subject = gr.Textbox(
            label="What is it?", placeholder="dog, teapot, boy …", max_lines=1, min_width=140,
            max_length=MAX_NAME_CHARACTERS, elem_id="train-subject",
        )  # fmt: skip
        name = gr.Textbox(
            label="Name in the library", placeholder="the same", max_lines=1, min_width=140,
            max_length=MAX_NAME_CHARACTERS, elem_id="train-name",
        )  # fmt: skip
    return subject, name


def lay_out_form(subject: gr.Textbox, name: gr.Textbox) -> TrainForm:
    """Lay out the rest of the form."""
    presets = [
        (f"{preset.capitalize()}: {PRESET_VALUES[preset]['max_train_steps']} steps, {words}", preset)
        for preset, words in PRESET_WORDS.items()
    ]
    preset = gr.Radio(
        cast(Any, presets), value="fast", label="How long", elem_id="train-preset", elem_classes="lines"
    )
    with gr.Accordion("Advanced", open=False, elem_id="train-advanced"):
        with gr.Row():
            token = gr.Textbox(
                "sks", label="Trigger word", max_lines=1, max_length=32, min_width=100, elem_id="train-token"
            )
            steps = gr.Textbox(  # a number that is empty would show 0 once this is opened
                label="Steps", placeholder="as above", max_lines=1, max_length=12, min_width=100,
                elem_id="train-steps",
            )  # fmt: skip
            seed = gr.Number(0, label="Seed", min_width=100, elem_id="train-seed")
        instance_prompt = gr.Textbox(
            label="Prompt of the photos", placeholder="made of the above; {token} is the trigger word",
            max_lines=2, max_length=MAX_PROMPT_CHARACTERS, elem_id="train-prompt",
        )  # fmt: skip
        samples = gr.Textbox(
            label="Pictures to draw in between", info="A prompt a line.", lines=2, max_lines=6,
            placeholder="made of the above", max_length=4 * MAX_PROMPT_CHARACTERS, elem_id="train-samples",
        )  # fmt: skip
    return TrainForm(subject, name, preset, token, instance_prompt, steps, seed, samples)
