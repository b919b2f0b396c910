"""The tab Train: photos of a subject, a name and a preset; the run, a process of its own, beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import gradio as gr
from gradio.components import Component
from markupsafe import Markup

from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName
from ether_diffusion.ui.errors import handler, sentence
from ether_diffusion.ui.numbers import read_lines, read_optional, read_whole
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import Values, keep_in_browser
from ether_diffusion.ui.tabs.parts import Sending, TabParts, Updates
from ether_diffusion.ui.tabs.train_photos import TrainPhotos
from ether_diffusion.ui.tabs.train_runs import TrainRuns, shown_command
from ether_diffusion.ui.training_request import MAX_NAME_CHARACTERS, MAX_PROMPT_CHARACTERS, TrainRequest

PRESET_WORDS: Mapping[PresetName, str] = {
    "fast": "a first look",
    "balanced": "for most subjects",
    "faithful": "as in the ETHER paper, with 200 pictures of its class",
}
SHOW_RUN = """() => { if (window.innerWidth <= 760) document.getElementById("train-watch")
  .scrollIntoView({ behavior: "smooth" }); }"""
_PLACEHOLDER = (Path("photo"),)
"""Stands for photos where only the rest of a request is looked at."""
_UNNAMED = Markup('<p class="quiet">Say what it is, and the prompt for its photos is made for you.</p>')
_NAMED = Markup('<p class="prompt-made">It is learned as “{}”: these words call it in a prompt.</p>')


def build(studio: Studio) -> TabParts:
    """Lay out the tab and tie its events."""
    with gr.Tab("Train", id="train") as tab:
        runs = TrainTab(studio).runs
    return TabParts(
        tab, sendings=[Sending(runs.used, runs.restored)], adapter_changes=[runs.taken, runs.used]
    )


class TrainTab:
    """The widgets of the tab and what they do; made inside a gr.Tab.

    Attributes:
        fields: the widgets of the form, without the photos, by the names of a TrainRequest.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.photos = TrainPhotos(studio)
                self._lay_out_form()
                with gr.Accordion("Command line", open=False):
                    self.command = gr.Textbox(
                        label="What Start runs, in the studio's folder", lines=3, max_lines=12,
                        interactive=False, buttons=["copy"], elem_id="train-command",
                    )  # fmt: skip
                self.go = gr.Button("Start training", variant="primary", elem_id="train-go")
            with gr.Column(scale=3, min_width=300, elem_classes="results", elem_id="train-watch"):
                self.runs = TrainRuns(studio)
        self._tie()
        keep_in_browser("train", self.fields, self.fill_from_kept)

    def _lay_out_form(self) -> None:
        presets = [
            (f"{preset.capitalize()}: {PRESET_VALUES[preset]['max_train_steps']} steps, {words}", preset)
            for preset, words in PRESET_WORDS.items()
        ]
        line: dict[str, Any] = {"max_lines": 1, "min_width": 140, "max_length": MAX_NAME_CHARACTERS}
        with gr.Row():
            subject = gr.Textbox(
                label="What is it?", placeholder="dog, teapot, boy …", elem_id="train-subject", **line
            )
            name = gr.Textbox(
                label="Name in the library", placeholder="the same", elem_id="train-name", **line
            )
        self.described = gr.HTML(elem_id="train-described")
        preset = gr.Radio(
            cast(Any, presets), value="fast", label="How long", elem_id="train-preset", elem_classes="lines"
        )
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced"):
            with gr.Row():
                token = gr.Textbox(
                    "sks", label="Trigger word", max_lines=1, max_length=32, min_width=100,
                    elem_id="train-token",
                )  # fmt: skip
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
                placeholder="made of the above", max_length=4 * MAX_PROMPT_CHARACTERS,
                elem_id="train-samples",
            )  # fmt: skip
        self.fields: dict[str, Component] = {
            "subject": subject, "name": name, "preset": preset, "token": token,
            "instance_prompt": instance_prompt, "steps": steps, "seed": seed, "samples": samples,
        }  # fmt: skip

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        fields, described = set(self.fields.values()), [self.described, self.command]
        gr.on(
            [field.change for field in self.fields.values()],
            handler(self.describe), fields, described, trigger_mode="always_last", queue=False, **quiet,
        )  # fmt: skip
        gr.context.Context.root_block.load(handler(self.describe), fields, described, **quiet)
        started = self.go.click(handler(self.start), {self.photos.kept, *fields}, self.runs.shown(), **quiet)
        started.success(None, js=SHOW_RUN, api_visibility="private")

    def read(self, values: Mapping[str, Any], photos: tuple[Path, ...]) -> TrainRequest:
        """Return what the visitor asks for, of the values of `fields` by name.

        Raises:
            ValueError: it cannot be trained.
        """
        texts = {
            name: (values[name] or "").strip() for name in ("subject", "name", "token", "instance_prompt")
        }
        return TrainRequest(
            photos=photos,
            **(texts | {"token": texts["token"] or "sks"}),
            preset=cast(PresetName, values["preset"]),
            steps=None if values["steps"] in (None, "") else read_whole(values["steps"], "steps"),
            seed=read_optional(values["seed"], "the seed") or 0,
            validation_prompts=read_lines(values["samples"] or ""),
        )

    def _named(self, values: Values) -> dict[str, Any]:
        return {name: values[widget] for name, widget in self.fields.items()}

    def describe(self, values: Values) -> tuple[str, str]:
        """Say how the subject will be called, and what command trains it."""
        named = self._named(values)
        if not (named["subject"] or "").strip():
            return _UNNAMED, ""
        try:
            request = self.read(named, _PLACEHOLDER)
        except ValueError as error:
            return Markup('<p class="quiet">{}</p>').format(sentence(error)), ""
        before, token, after = request.trigger(self._studio.runs.base).partition(request.token)
        words = Markup("{}<b>{}</b>{}" if token else "{}").format(before, token, after)
        return _NAMED.format(words), shown_command(self._studio, self._studio.runs.command(request))

    def start(self, values: Values) -> Updates:
        """Start a run of what the form says, and show it."""
        photos = tuple(photo.path for photo in self.photos.accepted(values[self.photos.kept]))
        return self.runs.show(self._studio.train(self.read(self._named(values), photos)))

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            request = self.read(kept, _PLACEHOLDER)
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        steps = "" if request.steps is None else str(request.steps)
        found = {**vars(request), "steps": steps, "samples": "\n".join(request.validation_prompts)}
        return {widget: found[name] for name, widget in self.fields.items()}
