"""The tab Train: photos of a subject, a name and a preset; the run, a process of its own, beside them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.bases import Base
from ether_diffusion.benchmark.plan import advise, read_curves
from ether_diffusion.options import Declared
from ether_diffusion.tiny_world import ALIAS, SECOND_ALIAS
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.captions import doubt_token
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.ui.requests import MAX_TEXT, read_lines
from ether_diffusion.ui.tabs.form import Field, Form
from ether_diffusion.ui.tabs.page import OFTEN, Page, Panel, Updates, Values
from ether_diffusion.ui.tabs.photos import TrainPhotos
from ether_diffusion.ui.tabs.trainings import Trainings, command_box, shown_command
from ether_diffusion.ui.train_request import DECLARED, MAX_NAME, SETTINGS, Preset, TrainRequest, in_labels
from ether_diffusion.ui.uploads import take_photos
from ether_diffusion.ui.words import counted, duration, notes_html, quiet_html, sentence
from ether_diffusion.wording import listed

TRUTH = "It learns drawings, as the fox. Photographs of real things cannot be learned on it: change the base."
MEASURED_SECONDS = 0.075  # of an image of a step, on one core, as `ether plan` has it: 15 s for 50 steps of 4
PRESET_WORDS: Mapping[Preset, str] = {
    "advised": "what measurements advise", "fast": "a first look", "balanced": "for most subjects",
    "faithful": "as in the ETHER paper, with 200 pictures of its class",
}  # fmt: skip
SHOW_RUN = """() => { if (window.innerWidth <= 760) document.getElementById("train-watch")
  .scrollIntoView({ behavior: "smooth" }); }"""
AS_ABOVE = ("as above", "")
_PLACEHOLDER = (Path("photo"),)  # stands for photos where only the rest of a request is looked at
_UNNAMED = Markup('<p class="quiet">Say what it is, and the prompt for its photos is made for you.</p>')
_NAMED = Markup('<p class="prompt-made">It is learned as “{}”: these words call it in a prompt.</p>')
_LINE: dict[str, Any] = {"max_lines": 1, "min_width": 140, "max_length": MAX_NAME}
_PLAIN, _PROMPTS = SETTINGS[:3], SETTINGS[3:5]
_PRESETS = [(f"{preset.capitalize()}: {words}", preset) for preset, words in PRESET_WORDS.items()]


def option_field(each: Declared, *, is_told: bool = True) -> Field:
    """Return what makes the field of an option, with its help where `is_told`; empty, it says nothing."""
    look: dict[str, Any] = {"label": each.label, "min_width": 130}
    look |= {"info": each.help, "min_width": 170} if is_told else {}
    if choices := each.kind.choices or ("on", "off") * (each.kind.base is bool):
        return partial(gr.Dropdown, [AS_ABOVE, *((word, word) for word in choices)], value="", **look)
    many = {"lines": 2, "info": "One a line."} if each.kind.is_many else {}
    return partial(gr.Textbox, **{**look, **many}, max_lines=6 if many else 1, max_length=MAX_TEXT)


FIELDS: dict[str, Field] = {
    "subject": partial(gr.Textbox, label="What is it?", placeholder="dog, teapot, boy …", **_LINE),
    "name": partial(gr.Textbox, label="Name in the library", placeholder="the same", **_LINE),
    "preset": partial(gr.Radio, choices=_PRESETS, value="advised", label="How long", elem_classes="lines"),
    **{name: option_field(DECLARED[name], is_told=name not in _PLAIN + _PROMPTS) for name in SETTINGS},
}  # fmt: skip
"""All but the photos, by the names of a TrainRequest and its settings, and of browsers."""


class TrainForm(Form):
    """What is learned, and how long."""

    def put_all(self) -> gr.HTML:
        """Lay out the fields, and return the line among them that describes what is learned."""
        with gr.Row():
            self.put("subject", "name")
        described = gr.HTML(elem_id="train-described")
        self.put("preset")
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced"):
            with gr.Row():
                self.put(*_PLAIN)
            self.put(*_PROMPTS)
            with gr.Accordion("More", open=False, elem_id="train-more"), gr.Row():
                self.put(*SETTINGS[5:])
        return described

    def asked(self, named: Mapping[str, Any], photos: tuple[Path, ...] = _PLACEHOLDER) -> TrainRequest:
        subject, name = ((named[each] or "").strip() for each in ("subject", "name"))
        return TrainRequest(photos, subject, name, named["preset"], read_settings(named))


def read_settings(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the fields that say something; what is none is refused by its label."""
    found = dict[str, Any]()
    for name in SETTINGS:
        each, text = DECLARED[name], (named[name] or "").strip()
        try:
            lines = read_lines(text) if each.kind.is_many else [text]
            values = tuple(each.kind.read(line) for line in lines if line)
        except ValueError as error:
            raise ValueError(f"{each.label} {error}") from None
        if values:
            found[name] = values if each.kind.is_many else values[0]
    return found


def used_words(value: object) -> str:
    """Return a value that an empty field stands for, as it shows it."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "on", False: "off"}[value]
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class TrainTab(Panel):
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page, prefix: str) -> None:
        super().__init__(page, prefix)
        self.form = TrainForm(page.studio, prefix, FIELDS)
        self._read_by: tuple[Base, Any] | None = None
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.photos = TrainPhotos(page)
                self.example = self.button(
                    "example", "Learn this fox now: take its six photos", size="sm", visible=False
                )
                self.truth = self.html("truth", visible=False)
                self.described = self.form.put_all()
                with gr.Accordion("Command line", open=False):
                    label = "What Start runs, in the studio's folder"
                    self.command = command_box(label, "train-command")
                go = self.button("go", "Start training", variant="primary")
            beside: dict[str, Any] = {"elem_classes": "results", "elem_id": "train-watch"}
            with gr.Column(scale=3, min_width=300, **beside):
                self.trainings = Trainings(page)
        asked = {self.photos.added, *self.form.all()}
        described = [self.described, self.command, *(self.form[name] for name in SETTINGS)]
        changes: list[Any] = [field.change for field in (self.photos.added, *self.form.widgets.values())]
        self.on(changes, self._describe, asked, described, **OFTEN)
        self.on_load(self._describe, asked, described)
        started = self.on(go.click, self._start, asked, self.trainings.widgets)
        started.success(None, js=SHOW_RUN, api_visibility="private")
        self.form.keep_in_browser()
        self.on(self.example.click, self._take_fox, None, self.photos.widgets)
        self.on_load(self._tell, None, [self.example, self.truth])

    def _tell(self) -> Updates:
        toy = {"visible": self.studio.is_toy}
        truth = notes_html(f"This base is a toy that draws {len(self.studio.known)} drawn concepts", [TRUTH])
        return {self.example: gr.update(**toy), self.truth: gr.update(value=truth, **toy)}

    def _take_fox(self) -> Updates:
        """Fill in what Start needs to learn the fox of Tiny World."""
        with TemporaryDirectory(dir=self.studio.temp) as folder:
            write_photos(find_concept("fox"), Path(folder), size=self.studio.engine.native_size)
            photos, _ = take_photos(sorted(Path(folder).iterdir()), self.studio.runs.photos)
        return self.photos.show(photos) | {self.form["subject"]: "animal", self.form["name"]: "Fox"}

    def _describe(self, values: Values) -> Updates:
        """Say how the subject will be called, what command trains it, and what empty fields stand for."""
        named, runs, kept = self.form.named(values), self.studio.runs, values[self.photos.added]
        if not (named["subject"] or "").strip():
            return {self.described: _UNNAMED, self.command: ""}
        try:
            request = self.form.asked(named, _PLACEHOLDER * max(1, len(kept or ())))
            config = request.config(runs.root / "ID", runs.base).resolved()
        except ValueError as error:
            return {self.described: quiet_html(sentence(error)), self.command: ""}
        before, token, after = request.trigger(runs.base).partition(request.token)
        words = Markup("{}<b>{}</b>{}" if token else "{}").format(before, token, after)
        photos, word = self.photos.accepted(kept), request.token
        lacking = [p.name for p in photos if p.caption and word not in p.caption.replace("{token}", word)]
        uncalled = f"the captions of {listed(lacking)} have no {{token}} in them, which calls the subject"
        doubts = [doubt_token(word, self._tokenizer()), uncalled * bool(lacking)]
        told = [*map(in_labels, config.ignored(request.settings)), *map(sentence, filter(None, doubts))]
        said = _NAMED.format(words) + quiet_html(self._expected(request, config))
        used, texts = config.flat(), [name for name in SETTINGS if isinstance(self.form[name], gr.Textbox)]
        return {
            self.described: said + notes_html("Good to know", told) if told else said,
            self.command: shown_command(self.studio, request.command(runs.root / "ID", runs.base)),
            **{self.form[name]: gr.update(placeholder=used_words(used[name])) for name in texts},
        }

    def _tokenizer(self) -> Any:
        """Return what reads prompts of the base, loaded once."""
        base = self.studio.engine.base
        if self._read_by is None or self._read_by[0] is not base:
            self._read_by = base, base.load_tokenizers()[0]
        return self._read_by[1]

    def _expected(self, request: TrainRequest, config: DreamBoothConfig) -> str:
        """Say how long it takes, by this machine's last training or the measured one, and what to expect."""
        steps, runs = config.optimization.max_train_steps or 0, self.studio.runs
        rate = next((each for run in runs.all() if (each := run.images_per_second)), None)
        images = steps * config.optimization.train_batch_size
        class_images = " and 200 pictures of its class first" * (config.prior.prior_preservation != "none")
        took = "how long is known after the first training"
        if rate:
            took = f"about {duration(images / rate)} of steps here"
        elif runs.base in (ALIAS, SECOND_ALIAS):  # their UNets are of one shape
            took = f"about {duration(images * MEASURED_SECONDS)} of steps on the machine that was measured"
        found = list[str]()
        if request.preset == "advised" and not request.settings:
            found = list(advise(len(request.photos), runs.base, read_curves()).expected[:2])
        measured = f"measured with drawings of this base: {'; '.join(found)}"
        expected = measured if found else "nothing was measured of how like it comes out"
        return f"{counted(steps, 'step')}{class_images}: {took}; {expected}."

    def _start(self, values: Values) -> Updates:
        accepted = self.photos.accepted(values[self.photos.added])
        request = self.form.asked(self.form.named(values), tuple(photo.path for photo in accepted))
        captions = tuple(photo.caption for photo in accepted)
        return self.trainings.show(self.studio.runs.start(replace(request, captions=captions)))
