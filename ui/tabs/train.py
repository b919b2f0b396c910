"""The tab Train: photos of a subject, a name and a preset; the run, a process of its own, beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from markupsafe import Markup
from PIL import Image

from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName
from ether_diffusion.ui.errors import handler, sentence
from ether_diffusion.ui.facts import counted
from ether_diffusion.ui.numbers import read_lines, read_optional, read_whole
from ether_diffusion.ui.runs import (
    MAX_NAME_CHARACTERS,
    MAX_PROMPT_CHARACTERS,
    TrainRequest,
    train_command,
)
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import Values, browser_state, keep_in_browser
from ether_diffusion.ui.tabs.parts import QUIET, Sending, TabParts, Updates
from ether_diffusion.ui.tabs.train_runs import TrainRuns, shown_command
from ether_diffusion.ui.uploads import Accepted, Refused, recall_photos, take_photos

ADVICE = "Four to ten photos that show it from several sides, in several places. A zip will do, too."
_TABLE = Markup(
    '<table class="reasons"><caption>{} left out</caption><thead><tr><th scope="col">File</th>'
    '<th scope="col">Why</th></tr></thead><tbody>{}</tbody></table>'
)
_ROW = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
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


class TrainPhotos:
    """The widgets and what they do; made inside the form."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self.dropped = gr.File(
            label="Photos", file_count="multiple", height=104, elem_id="train-photos", elem_classes="drop"
        )
        self.said = gr.HTML(_said([]), elem_id="train-photos-said")
        self.gallery = gr.Gallery(
            visible=False, label="Photos to learn from", show_label=False, format="png", columns=5,
            height="auto", buttons=[], allow_preview=False, interactive=False, object_fit="cover",
            elem_id="train-gallery",
        )  # fmt: skip
        with gr.Row(visible=False, elem_classes="tool-row") as self.tools:
            self.leave_out = gr.Button(
                "Leave out the chosen one", size="sm", interactive=False, elem_id="train-leave-out"
            )
            clear = gr.Button("Start over", size="sm", elem_id="train-clear")
        self.refused = gr.HTML(visible=False, elem_id="train-refused")
        self.kept, self.selected = browser_state("photos", []), gr.State(-1)
        shown: list[Any] = [
            self.dropped, self.said, self.gallery, self.tools, self.refused, self.kept, self.selected,
            self.leave_out,
        ]  # fmt: skip
        self.dropped.upload(
            handler(self.take), [self.dropped, self.kept], shown, api_visibility="private",
            show_progress="minimal", show_progress_on=[self.dropped],
        )  # fmt: skip
        self.gallery.select(handler(self.select), None, [self.selected, self.leave_out], **QUIET)
        self.leave_out.click(handler(self.remove), [self.selected, self.kept], shown, **QUIET)
        clear.click(handler(lambda: self._show([])), None, shown, **QUIET)
        gr.context.Context.root_block.load(handler(self.recall), [self.kept], shown, **QUIET)

    def accepted(self, kept: object) -> list[Accepted]:
        """Return the photos that the browser says were added and that are still there."""
        return recall_photos(kept, self._studio.runs.photos)

    def take(self, files: list[str] | None, kept: object) -> Updates:
        """Look at dropped files: show what can be used, and why the rest cannot."""
        earlier, paths = self.accepted(kept), [Path(file) for file in files or []]
        with self._studio.reading:
            report = take_photos(paths, self._studio.runs.photos, earlier)
        return self._show([*earlier, *report.accepted], report.refused)

    def recall(self, kept: object) -> Updates:
        """Show the photos that were there before the page was loaded again."""
        photos = self.accepted(kept)
        return self._show(photos) if photos else {}

    def select(self, chosen: gr.SelectData) -> Updates:
        """Know which photo was chosen."""
        index = chosen.index if isinstance(chosen.index, int) else -1
        return {self.selected: index, self.leave_out: gr.update(interactive=index >= 0)}

    def remove(self, selected: int, kept: object) -> Updates:
        """Leave out one photo."""
        return self._show([photo for index, photo in enumerate(self.accepted(kept)) if index != selected])

    def _show(self, photos: Sequence[Accepted], refused: Sequence[Refused] = ()) -> Updates:
        table = _TABLE.format(
            counted(len(refused), "file"), Markup("").join(_ROW.format(*r) for r in refused)
        )
        pictures = [(_opened(photo.thumbnail), photo.name) for photo in photos]
        return {
            self.dropped: None,
            self.said: _said(photos),
            self.gallery: gr.update(value=pictures, visible=bool(photos), selected_index=None),
            self.tools: gr.update(visible=bool(photos)),
            self.refused: gr.update(value=table, visible=bool(refused)),
            self.kept: [photo.kept for photo in photos],
            self.selected: -1,
            self.leave_out: gr.update(interactive=False),
        }


def _said(photos: Sequence[Accepted]) -> str:
    words = f"{counted(len(photos), 'photo')} to learn from." if photos else ADVICE
    more = " A few more will make it better." if 0 < len(photos) < 3 else ""
    notes = [Markup("<li>{} {}</li>").format(photo.name, photo.note) for photo in photos if photo.note]
    said = Markup('<p class="quiet">{}{}</p>').format(words, more)
    return said + Markup('<ul class="quiet">{}</ul>').format(Markup("").join(notes)) if notes else said


def _opened(thumbnail: Path) -> Image.Image:
    with Image.open(thumbnail) as image:
        return image.copy()


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
                go = gr.Button("Start training", variant="primary", elem_id="train-go")
            with gr.Column(scale=3, min_width=300, elem_classes="results", elem_id="train-watch"):
                self.runs = TrainRuns(studio)
        fields, described = set(self.fields.values()), [self.described, self.command]
        gr.on(
            [field.change for field in self.fields.values()],
            handler(self.describe), fields, described, trigger_mode="always_last", queue=False, **QUIET,
        )  # fmt: skip
        gr.context.Context.root_block.load(handler(self.describe), fields, described, **QUIET)
        started = go.click(handler(self.start), {self.photos.kept, *fields}, self.runs.shown, **QUIET)
        started.success(None, js=SHOW_RUN, api_visibility="private")
        keep_in_browser("train", self.fields, self.fill_from_kept)

    def _lay_out_form(self) -> None:
        presets: list[Any] = [
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
            presets, value="fast", label="How long", elem_id="train-preset", elem_classes="lines"
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

    def read(self, values: Mapping[str, Any], photos: tuple[Path, ...] = _PLACEHOLDER) -> TrainRequest:
        """Return what the visitor asks for, of the values of `fields` by name.

        Raises:
            ValueError: it cannot be trained.
        """
        texts = {name: (values[name] or "").strip() for name in ("subject", "name", "instance_prompt")}
        return TrainRequest(
            photos=photos,
            **texts,
            token=(values["token"] or "").strip() or "sks",
            preset=values["preset"],
            steps=None if values["steps"] in (None, "") else read_whole(values["steps"], "steps"),
            seed=read_optional(values["seed"], "the seed") or 0,
            validation_prompts=read_lines(values["samples"] or ""),
        )

    def _named(self, values: Values) -> dict[str, Any]:
        return {name: values[widget] for name, widget in self.fields.items()}

    def describe(self, values: Values) -> tuple[str, str]:
        """Say how the subject will be called, and what command trains it."""
        named, runs = self._named(values), self._studio.runs
        if not (named["subject"] or "").strip():
            return _UNNAMED, ""
        try:
            request = self.read(named)
        except ValueError as error:
            return Markup('<p class="quiet">{}</p>').format(sentence(error)), ""
        before, token, after = request.trigger(runs.base).partition(request.token)
        words = Markup("{}<b>{}</b>{}" if token else "{}").format(before, token, after)
        command = train_command(request, runs.root / "ID", runs.base)
        return _NAMED.format(words), shown_command(self._studio, command)

    def start(self, values: Values) -> Updates:
        """Start a run of what the form says, and show it."""
        photos = tuple(photo.path for photo in self.photos.accepted(values[self.photos.kept]))
        return self.runs.show(self._studio.train(self.read(self._named(values), photos)))

    def fill_from_kept(self, kept: Mapping[str, Any]) -> Updates:
        """Return the updates that bring back what a browser kept; none of them where it kept nonsense."""
        try:
            request = self.read(kept)
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
        steps = "" if request.steps is None else str(request.steps)
        found = {**vars(request), "steps": steps, "samples": "\n".join(request.validation_prompts)}
        return {widget: found[name] for name, widget in self.fields.items()}
