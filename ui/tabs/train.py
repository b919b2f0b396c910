"""The tab Train: photos of a subject, a name and a preset; the run, a process of its own, beside them."""

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup

from ether_diffusion.bases import Base
from ether_diffusion.benchmark.plan import advise, read_curves
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.captions import doubt_token
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.run import Run, State
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.option_fields import option_field, read_options, used_words
from ether_diffusion.ui.tabs.page import (
    EMPTY,
    ON_SLIDE,
    QUIET,
    DeleteButton,
    Field,
    Form,
    Page,
    Updates,
    Values,
    pair_html,
)  # fmt: skip
from ether_diffusion.ui.train_request import (
    DECLARED,
    MAX_NAME,
    MAX_PROMPT,
    SETTINGS,
    Preset,
    TrainRequest,
    in_labels,
)  # fmt: skip
from ether_diffusion.ui.uploads import (
    Accepted,
    Refused,
    crop_photo,
    data_address,
    recall_photos,
    shares_of,
    take_photos,
    whole_address,
)
from ether_diffusion.ui.words import (
    counted,
    duration,
    handler,
    notes_html,
    progress_html,
    quiet_html,
    sentence,
)
from ether_diffusion.wording import listed

TRUTH = notes_html(
    "This base is a toy that draws 48 drawn concepts",
    ["It learns drawings, as the fox. Photographs of real things cannot be learned on it: change the base."],
)
MEASURED_SECONDS = 0.075  # of an image of a step, on one core, as `ether plan` has it: 15 s for 50 steps of 4
ADVICE = "Four to ten photos that show it from several sides, in several places. A zip will do, too."
_TABLE = Markup(
    '<table class="reasons"><caption>{} left out</caption><thead><tr><th scope="col">File</th>'
    '<th scope="col">Why</th></tr></thead><tbody>{}</tbody></table>'
)
_ROW = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
_PHOTOS = Markup('<table class="photos"><tbody>{}</tbody></table>')
_PHOTO = Markup(
    '<tr><td><img alt="" src="{address}"></td><th scope="row">{photo.name}<span>{photo.note}</span>'
    '<input type="text" value="{photo.caption}" maxlength="1000" data-photo="{n}" '
    'placeholder="Caption: the prompt below" aria-label="Caption of {photo.name}"></th><td>'
    '<button type="button" data-photo="{n}" data-crop aria-label="Crop {photo.name}" title="Crop">▣</button>'
    '<button type="button" data-photo="{n}" aria-label="Leave out {photo.name}" title="Leave out">×</button>'
    "</td></tr>"
)
_SQUARE = Markup(
    '<div class="crop"><img alt="" src="{}"><i style="left:{:.1%};top:{:.1%};width:{:.1%}"></i></div>'
    '<p class="quiet">Click where the middle of the square shall be, or move it with the sliders.</p>'
)
ON_CENTRE = """element.addEventListener("click", (event) => {
  const box = element.querySelector(".crop")?.getBoundingClientRect();
  const [x, y] = [event.clientX - box?.left, event.clientY - box?.top];
  if (box) trigger("click", { x: x / box.width, y: y / box.height });
});"""
ON_CHANGE = """const tell = (event, tag, more) => {
  const found = event.target.closest(`${tag}[data-photo]`);
  if (found) trigger("click", { photo: Number(found.dataset.photo), ...more(found) });
};
const isCrop = (button) => ({ crop: "crop" in button.dataset });
element.addEventListener("click", (event) => tell(event, "button", isCrop));
element.addEventListener("change", (event) => tell(event, "input", (field) => ({ caption: field.value })));"""
PRESET_WORDS: Mapping[Preset, str] = {
    "advised": "what measurements advise", "fast": "a first look", "balanced": "for most subjects",
    "faithful": "as in the ETHER paper, with 200 pictures of its class",
}  # fmt: skip
SHOW_CROP = """() => document.getElementById("train-crop")
  ?.scrollIntoView({ block: "nearest", behavior: "smooth" })"""
SHOW_RUN = """() => { if (window.innerWidth <= 760) document.getElementById("train-watch")
  .scrollIntoView({ behavior: "smooth" }); }"""
_PLACEHOLDER = (Path("photo"),)  # stands for photos where only the rest of a request is looked at
_UNNAMED = Markup('<p class="quiet">Say what it is, and the prompt for its photos is made for you.</p>')
_NAMED = Markup('<p class="prompt-made">It is learned as “{}”: these words call it in a prompt.</p>')
SECONDS = 1.0  # between two looks at the files of a run
THUMBNAIL_SIDE, LARGE_SIDE, MAX_ROWS = 192, 768, 8
"""Of the pictures of a run, in px, and rows that are shown: a prompt with a seed each."""
STATE_WORDS: dict[State, str] = {
    "queued": "waiting", "starting": "starting", "running": "training", "paused": "paused",
    "stopped": "stopped", "crashed": "broke off", "finished": "done",
}  # fmt: skip
MEAN, EACH = "running mean", "loss"
_MEAN_OVER = 12
_PROMPT_FLAG = "--validation_prompt="
_FIGURE = Markup(
    '<figure><button type="button" data-step="{step}" data-sample="{name}">'
    '<img alt="{prompt}, {called}" src="{}"></button><figcaption>{label}</figcaption></figure>'
)
ON_SAMPLE = """element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-step]");
  if (chosen) trigger("click", { ...chosen.dataset });
});"""
_MORE = Markup("<details><summary>The same from other seeds</summary>{}</details>")
Seen = dict[str, Any]
"""The id of the run on show, and what stands for each widget's value, so that only what is new is sent."""
_LINE: dict[str, Any] = {"max_lines": 1, "min_width": 140, "max_length": MAX_NAME}
_PLAIN, _PROMPTS = SETTINGS[:3], SETTINGS[3:5]
_PRESETS = [(f"{preset.capitalize()}: {words}", preset) for preset, words in PRESET_WORDS.items()]
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
        settings = read_options(named, {name: DECLARED[name] for name in SETTINGS})
        return TrainRequest(photos, subject, name, named["preset"], settings)


class TrainPhotos:
    """The widgets and what they do; made inside the form."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        drop: dict[str, Any] = {"elem_id": "train-photos", "elem_classes": "drop", "height": 104}
        self.dropped = gr.File(label="Photos", file_count="multiple", **drop)
        self.said = gr.HTML(_said([]), elem_id="train-photos-said")
        self.table = gr.HTML(visible=False, js_on_load=ON_CHANGE, elem_id="train-gallery")
        self.clear = gr.Button("Start over", size="sm", visible=False, elem_id="train-clear")
        self.refused, self.kept = (
            gr.HTML(visible=False, elem_id="train-refused"),
            Page.browser_state("photos", []),
        )
        with gr.Column(visible=False, elem_id="train-crop", elem_classes="confirm") as self.crop:
            self.square = gr.HTML(js_on_load=ON_CENTRE, elem_id="train-square")
            shares: dict[str, Any] = {"minimum": 0, "maximum": 1, "step": 0.01, "min_width": 120}
            with gr.Row():
                self.side = gr.Slider(**shares | {"minimum": 0.1}, label="Size", elem_id="train-crop-side")
                self.across = gr.Slider(**shares, label="Left to right", elem_id="train-crop-across")
                self.down = gr.Slider(**shares, label="Top to bottom", elem_id="train-crop-down")
            with gr.Row(elem_classes="tool-row"):
                cut = gr.Button("Crop", variant="primary", elem_id="train-crop-now")
                whole = gr.Button("Whole photo", elem_id="train-crop-whole")
                leave = gr.Button("Cancel", elem_id="train-crop-not")
        self.number = gr.State(0)
        shown = self.shown = [
            self.dropped, self.said, self.table, self.clear, self.refused, self.kept, self.crop, self.square,
            self.side, self.across, self.down, self.number,
        ]  # fmt: skip
        box: list[Any] = [self.kept, self.number, self.side, self.across, self.down]
        often: dict[str, Any] = {"trigger_mode": "always_last", "queue": False, **QUIET}
        gr.on([each.change for each in box[2:]], handler(self._square), box, [self.square], **often)
        centred = [self.across, self.down]
        self.square.click(handler(self._centre), box[:3], centred, **QUIET)
        cut.click(handler(self._crop), box, shown, **QUIET)
        whole.click(handler(self._crop), box[:2], shown, **QUIET)
        leave.click(lambda: gr.update(visible=False), None, [self.crop], **QUIET)
        told: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": [self.dropped]}
        given = [self.dropped, self.kept]
        self.dropped.upload(handler(self._take), given, shown, api_visibility="private", **told)
        changed = self.table.click(handler(self._change), [self.kept], shown, **QUIET)
        changed.success(None, js=SHOW_CROP, api_visibility="private")
        self.clear.click(handler(lambda: self.show([])), None, shown, **QUIET)
        Context.root_block.load(handler(self._recall), [self.kept], shown, **QUIET)

    def accepted(self, kept: object) -> list[Accepted]:
        """Return the photos that the browser says were added and that are still there."""
        return recall_photos(kept, self._studio.runs.photos)

    def _take(self, files: list[str] | None, kept: object) -> Updates:
        earlier, paths = self.accepted(kept), [Path(file) for file in files or []]
        with self._studio.reading:
            accepted, refused = take_photos(paths, self._studio.runs.photos, earlier)
        return self.show([*earlier, *accepted], refused)

    def _recall(self, kept: object) -> Updates:
        photos, known = self.accepted(kept), len(kept) if isinstance(kept, list) else 0
        shown = self.show(photos) if known else {}
        if known > len(photos):
            lost = f"{counted(known - len(photos), 'photo')} of yours went when the studio was started again"
            shown[self.said] = notes_html(f"{lost}: add them again.", kind="warning")
        return shown

    def _change(self, event: gr.EventData, kept: object) -> Updates:
        """Leave out a photo, show what can be cut from it, or keep what was written as its caption."""
        photos, said = self.accepted(kept), event._data if isinstance(event._data, dict) else {}
        number, caption = said.get("photo"), said.get("caption")
        if not isinstance(number, int) or number not in range(len(photos)):
            return {}
        if said.get("crop"):
            return {
                **dict.fromkeys((self.across, self.down), 0.5), self.crop: gr.update(visible=True),
                self.side: 0.8, self.number: number, self.square: _square(photos[number], 0.8, 0.5, 0.5),
            }  # fmt: skip
        if not isinstance(caption, str):
            return self.show([photo for photo in photos if photo is not photos[number]])
        photos[number] = replace(photos[number], caption=" ".join(caption.split())[:MAX_PROMPT])
        return {self.kept: [photo.kept for photo in photos]}

    def _square(self, kept: object, number: int, *box: float) -> Updates:
        photos = self.accepted(kept)
        return {self.square: _square(photos[number], *box)} if number < len(photos) else {}

    def _centre(self, event: gr.EventData, kept: object, number: int, side: float) -> Updates:
        """Move the square to where the photo was clicked."""
        photos, said = self.accepted(kept), event._data if isinstance(event._data, dict) else {}
        at = [each for name in "xy" if isinstance(each := said.get(name), int | float)]
        if number >= len(photos) or len(at) < 2:
            return {}
        sizes = shares_of(photos[number], side)
        left = [(x - size / 2) / (1 - size or 1) for x, size in zip(at, sizes, strict=True)]
        where = [round(min(1.0, max(0.0, each)), 2) for each in left]
        return dict(zip((self.across, self.down), where, strict=True))

    def _crop(self, kept: object, number: int, *box: float) -> Updates:
        photos = self.accepted(kept)
        if number < len(photos):
            with self._studio.reading:
                photos[number] = crop_photo(photos[number], *(box or (1, 0, 0)))
        return self.show(photos)

    def show(self, photos: Sequence[Accepted], refused: Sequence[Refused] = ()) -> Updates:
        rows = Markup("").join(_ROW.format(*each) for each in refused)
        table = _TABLE.format(counted(len(refused), "file"), rows)
        listed = Markup("").join(
            _PHOTO.format(n=number, photo=each, address=data_address(each.thumbnail, 96))
            for number, each in enumerate(photos)
        )
        return {
            self.dropped: None,
            self.said: _said(photos),
            self.table: gr.update(value=_PHOTOS.format(listed), visible=bool(photos)),
            self.clear: gr.update(visible=bool(photos)),
            self.refused: gr.update(value=table, visible=bool(refused)),
            self.kept: [photo.kept for photo in photos],
            self.crop: gr.update(visible=False),
        }


def _square(photo: Accepted, side: float, across: float, down: float) -> Markup:
    """Return a whole photo with the square that would be cut from it."""
    width, height = shares_of(photo, side)
    left, top = (1 - width) * across, (1 - height) * down
    return _SQUARE.format(whole_address(photo, 256), left, top, width)


def _said(photos: Sequence[Accepted]) -> str:
    words = f"{counted(len(photos), 'photo')} to learn from." if photos else ADVICE
    words += " A few more will make it better." if 0 < len(photos) < 3 else ""
    return quiet_html(words)


class TrainRuns:
    """The runs on the page, watched through their files; `shown` is what `show` gives values to."""

    def __init__(self, page: Page) -> None:
        self._page, self._studio, runs = page, page.studio, page.studio.runs
        self.chosen = page.run = Page.browser_state(
            "run", ""
        )  # "" is the newest, one that trains before others
        none_yet = EMPTY.format("No training yet. Add photos, say what they show, and start.")
        self.empty, hidden = gr.HTML(none_yet, elem_id="train-empty"), {"visible": False}
        with gr.Column(visible=False, elem_id="train-run") as self.box:
            self.status = gr.HTML(elem_id="train-status")
            with gr.Row(elem_classes="tool-row"):
                self.use = gr.Button("Use in Create", variant="primary", elem_id="train-use", **hidden)
                self.resume = gr.Button("Resume", variant="primary", elem_id="train-resume", **hidden)
                self.pause = gr.Button("Pause", elem_id="train-pause", **hidden)
                self.stop = gr.Button("Stop", variant="stop", elem_id="train-stop", **hidden)
            self.samples = gr.HTML(elem_id="train-pictures", js_on_load=ON_SAMPLE, **hidden)
            with gr.Column(visible=False, elem_classes="confirm", elem_id="train-sample") as self.sample:
                self.large = gr.HTML(js_on_load=ON_SLIDE)
                with gr.Row(elem_classes="tool-row"):
                    self.use_step = gr.Button("Use this step", elem_id="train-use-step")
                    self.train_on = gr.Button("Train on", elem_id="train-on")
                    close = gr.Button("Close", elem_id="train-sample-close")
                self.step = gr.State(0)
            self.curve = gr.LinePlot(
                x="step", y="loss", color="curve", x_title="Step", y_title="Loss", color_title=" ",
                color_map={EACH: "#a3adad", MEAN: "#26868c"}, height=220, buttons=[], tooltip="axis",
                label="Loss", show_label=False, elem_id="train-curve", **hidden,
            )  # fmt: skip
            with gr.Accordion("The command of this run", open=False):
                self.command = _command_box("To be run in the studio's folder", "train-run-command")
            self.delete = DeleteButton("train", "Delete this run …", visible=False)
        self.list = gr.Radio([], label="All runs", elem_id="train-runs", elem_classes="lines", **hidden)
        self.seen, adopted = gr.State({}), gr.State([])
        self.adopted = adopted
        self.shown: list[Any] = [
            self.chosen, self.empty, self.box, self.status, self.use, self.resume, self.pause, self.stop,
            self.samples, self.curve, self.command, self.delete.button, self.delete.box, self.list, self.seen,
            adopted, self.sample,
        ]  # fmt: skip
        watched, seen = [self.chosen, self.seen], [self.seen]
        gr.Timer(SECONDS).tick(handler(self._look), watched, self.shown, queue=False, **QUIET)
        self.list.input(handler(self.show), [self.list], self.shown, queue=False, **QUIET)
        acts = {self.stop: runs.stop, self.pause: runs.pause, self.resume: runs.resume}
        for button, act in acts.items():
            button.click(handler(self._then_show(act)), seen, self.shown, **QUIET)
        self.delete.tie(self._ask, self._delete, self.seen, self.shown)
        large: list[Any] = [self.sample, self.large, self.use_step, self.train_on, self.step]
        self.samples.click(handler(self._enlarge), seen, large, **QUIET)
        close.click(lambda: gr.update(visible=False), None, [self.sample], **QUIET)
        on = handler(lambda seen, step: self.show(runs.train_on(str(seen.get("id")), step)))
        self.train_on.click(on, [self.seen, self.step], self.shown, **QUIET)
        used = [
            self.use.click(handler(self._take), seen, [page.restored], **QUIET),
            self.use_step.click(handler(self._take), [self.seen, self.step], [page.restored], **QUIET),
        ]
        page.sendings += used
        page.changes += [adopted.change(lambda: None, None, None, **QUIET), *used]

    def show(self, run_id: str | None) -> Updates:
        """Show a run whole; without an id, one that trains, or the newest."""
        return {self.chosen: run_id or "", **self._look(run_id, {})}

    def _look(self, chosen: object, seen: Seen) -> Updates:
        """Show what has changed since the last look."""
        run, ids = self._run([chosen, seen.get("id")]), self._studio.runs.ids()
        page, stand = self._shown(run), (ids, run and run.id, run and run.state)
        now: Seen = {str(widget.elem_id): hash(repr(update)) for widget, update in page.items()}
        updates = {w: update for w, update in page.items() if now[str(w.elem_id)] != seen.get(str(w.elem_id))}
        if stand[1] != seen.get("id"):  # nothing is asked of another run
            updates |= {self.delete.box: gr.update(visible=False), self.sample: gr.update(visible=False)}
        if stand != seen.get("stand"):
            runs = self._studio.runs.all()
            labels = [
                (
                    f"{each.name} · {STATE_WORDS[each.state]} · {each.created.astimezone():%d %b, %H:%M}",
                    each.id,
                )
                for each in runs
            ]
            updates[self.list] = gr.update(choices=labels, value=stand[1], visible=len(runs) > 1)
        if not updates:
            return {}
        if run is not None and run.adapter is not None and run.library_id is None:
            updates[self.adopted] = self._studio.keep_finished()
        return {**updates, self.seen: {**now, "id": stand[1], "stand": stand}}

    def _run(self, wanted: Sequence[object]) -> Run | None:
        """Return the first run of these that is there, or the one that trains, or the newest."""
        for run_id in wanted:
            with suppress(ValueError, FileNotFoundError):  # damaged, or deleted just now
                return self._studio.runs.status(str(run_id))
        runs = self._studio.runs.all()
        return next((run for run in runs if run.can_stop), runs[0] if runs else None)

    def _shown(self, run: Run | None) -> Updates:
        there = {self.empty: gr.update(visible=run is None), self.box: gr.update(visible=run is not None)}
        if run is None:
            return there
        points = loss_points(run.losses) if len(run.losses) > 1 else None
        pictures = samples_html(run)
        return there | {
            self.status: status_html(run),
            self.stop: gr.update(visible=run.can_stop),
            self.pause: gr.update(visible=run.can_pause),
            self.resume: gr.update(visible=run.can_resume),
            self.use: gr.update(visible=run.can_use),
            self.delete.button: gr.update(visible=run.process is None),
            self.curve: gr.update(value=points, x_lim=[0, run.num_steps], visible=points is not None),
            self.samples: gr.update(value=pictures, visible=bool(pictures)),
            self.command: _shown_command(self._studio, run.command),
        }

    def _then_show(self, act: Callable[[str], None]) -> Callable[[Seen], Updates]:
        """Return what does something to the run on show, and shows how it stands then."""

        def acted(seen: Seen) -> Updates:
            act(str(seen.get("id")))
            return self.show(str(seen.get("id")))

        return acted

    def _ask(self, seen: Seen) -> str:
        is_kept = self._studio.runs.status(str(seen.get("id"))).adapter is not None
        kept = " Its adapter stays in the library." * is_kept
        return f"Delete this run with its photos, pictures and checkpoints?{kept}"

    def _delete(self, seen: Seen) -> Updates:
        self._studio.keep_finished()
        self._studio.runs.delete(str(seen.get("id")))
        return self.show("")

    def _take(self, seen: Seen, step: int | None = None) -> Restored:
        run = self._studio.runs.status(str(seen.get("id")))
        adopted = self._studio.runs.adopt(run.id, self._studio.library, step)
        return request_with(self._studio, adopted.id, run.trigger)

    def _enlarge(self, event: gr.EventData, seen: Seen) -> Updates:
        """Show a picture of the run large, that of a step beside the base's of the same prompt and seed."""
        asked: dict[str, Any] = event._data if isinstance(event._data, dict) else {}
        run, name, number = (
            self._studio.runs.status(str(seen.get("id"))),
            asked.get("sample"),
            asked.get("step"),
        )
        step = int(str(number)) if str(number).isdecimal() else None
        found = [path for at, path in run.samples if at == step and path.stem == name]
        sides = [path for path in run.base_samples if path.stem == name] + found
        addresses = [address for each in sides if (address := data_address(each, LARGE_SIDE))]
        is_saved = step in run.saved_steps
        return {
            self.sample: gr.update(visible=bool(addresses)),
            self.large: pair_html(addresses, f"Step {step}"),
            self.use_step: gr.update(visible=is_saved, value=f"Use step {step}"),
            self.train_on: gr.update(visible=is_saved, value=f"Train on from {step}"),
            self.step: step or 0,
        }


def _command_box(label: str, elem_id: str) -> gr.Textbox:
    look: dict[str, Any] = {"lines": 3, "max_lines": 12, "interactive": False, "buttons": ["copy"]}
    return gr.Textbox(label=label, elem_id=elem_id, **look)


def _shown_command(studio: Studio, command: Sequence[str]) -> str:
    return shlex.join(["train-dreambooth", *(word.replace(f"{studio.folder}/", "") for word in command[3:])])


def status_html(run: Run) -> str:
    """Return how a run stands: a bar with words while it goes on, a box where something is to be done."""
    heading = Markup("<h2>{}</h2>").format(run.name)
    if run.state == "crashed":
        return heading + notes_html("The training broke off", [run.sentence], kind="warning")
    words = run.sentence
    if run.seconds_left is not None and run.step < run.num_steps:
        words = f"{words} About {duration(run.seconds_left)} left."
    word, measured = run.verdict if run.state == "finished" else ("", "")
    said = notes_html(word, [measured], kind="note" if word == "Learned" else "warning") if word else ""
    return heading + progress_html(run.done, words) + said


def loss_points(losses: Sequence[tuple[int, float]]) -> dict[str, object]:
    """Return two curves as gr.LinePlot sends them: the loss, which noise makes jump, and its running mean."""
    values = [loss for _, loss in losses]
    each = [[step, loss, EACH] for step, loss in losses]
    means = [
        [step, statistics.fmean(values[max(0, index + 1 - _MEAN_OVER) : index + 1]), MEAN]
        for index, (step, _) in enumerate(losses)
    ]
    return {
        "columns": ["step", "loss", "curve"],
        "data": each + means,
        "datatypes": {"step": "quantitative", "loss": "quantitative", "curve": "nominal"},
        "mark": "line",
    }


def samples_html(run: Run) -> str:
    """Return the pictures by step, those of the base and of step 0 first; a row is a prompt with a seed."""
    words = [word.removeprefix(_PROMPT_FLAG) for word in run.command if word.startswith(_PROMPT_FLAG)]
    prompts = {f"prompt-{number:02d}": prompt for number, prompt in enumerate(words)}
    base = {path.stem: path for path in run.base_samples}
    columns = [("Base", "", path) for path in base.values()]
    columns += [
        (f"Step {step}", str(step), path) for step, path in run.samples
        if step or path.stem not in base or not _is_same(path, base[path.stem])  # many begin as the base
    ]  # fmt: skip
    first, others = dict[str, Markup](), list[Markup]()
    for name in sorted({path.stem for *_, path in columns})[:MAX_ROWS]:  # prompt-01_seed-0
        own = name.split("_")[0]
        prompt, figures = prompts.get(own, ""), Markup("")
        for label, step, path in columns:
            if path.stem == name and (address := data_address(path, THUMBNAIL_SIDE)):
                said = {"step": step, "name": name, "prompt": prompt, "called": label.lower(), "label": label}
                figures += _FIGURE.format(address, **said)
        row = Markup('<p class="quiet">{}</p><div class="steps">{}</div>').format(prompt, figures)
        if own in first:
            others.append(row)
        else:
            first[own] = row
    if not first:
        return ""
    body = Markup("").join(first.values()) + (_MORE.format(Markup("").join(others)) if others else "")
    return Markup('<div class="samples">{}</div>').format(body)


def _is_same(one: Path, other: Path) -> bool:
    addresses = [data_address(path, THUMBNAIL_SIDE) for path in (one, other)]
    return addresses[0] == addresses[1]


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("Train", id="train"):
        TrainTab(page)


class TrainTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page) -> None:
        self._studio, self.form = page.studio, TrainForm(page.studio, "train", FIELDS)
        self._read_by: tuple[Base, Any] | None = None
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.photos = TrainPhotos(page.studio)
                fox: dict[str, Any] = {"size": "sm", "visible": False, "elem_id": "train-example"}
                example = gr.Button("Learn this fox now: take its six photos", **fox)
                self.truth = gr.HTML(visible=False, elem_id="train-truth")
                self.described = self.form.put_all()
                with gr.Accordion("Command line", open=False):
                    label = "What Start runs, in the studio's folder"
                    self.command = _command_box(label, "train-command")
                go = gr.Button("Start training", variant="primary", elem_id="train-go")
            beside: dict[str, Any] = {"elem_classes": "results", "elem_id": "train-watch"}
            with gr.Column(scale=3, min_width=300, **beside):
                self.runs = TrainRuns(page)
        fields = self.form.all()
        described = [self.described, self.command, *(self.form[name] for name in SETTINGS)]
        changes: list[Any] = [field.change for field in (self.photos.kept, *self.form.widgets.values())]
        often: dict[str, Any] = {"trigger_mode": "always_last", "queue": False, **QUIET}
        asked = {self.photos.kept, *fields}
        gr.on(changes, handler(self._describe), asked, described, **often)
        Context.root_block.load(handler(self._describe), asked, described, **QUIET)
        started = go.click(handler(self._start), asked, self.runs.shown, **QUIET)
        started.success(None, js=SHOW_RUN, api_visibility="private")
        self.form.keep_in_browser()
        taken = [*self.photos.shown, self.form["subject"], self.form["name"]]
        example.click(handler(self._take_fox), None, taken, **QUIET)

        def told() -> Updates:
            is_toy = self._studio.is_toy
            return {example: gr.update(visible=is_toy), self.truth: gr.update(value=TRUTH, visible=is_toy)}

        Context.root_block.load(handler(told), None, [example, self.truth], **QUIET)

    def _take_fox(self) -> Updates:
        """Fill in what Start needs to learn the fox of Tiny World."""
        with TemporaryDirectory(dir=self._studio.temp) as folder:
            paths = write_photos(find_concept("fox"), Path(folder))
            photos, _ = take_photos(paths, self._studio.runs.photos)
        return self.photos.show(photos) | {self.form["subject"]: "animal", self.form["name"]: "Fox"}

    def _describe(self, values: Values) -> Updates:
        """Say how the subject will be called, what command trains it, and what empty fields stand for."""
        named, runs = self.form.named(values), self._studio.runs
        if not (named["subject"] or "").strip():
            return {self.described: _UNNAMED, self.command: ""}
        try:
            request = self.form.asked(named, _PLACEHOLDER * max(1, len(values[self.photos.kept] or ())))
            config = request.config(runs.root / "ID", runs.base).resolved()
        except ValueError as error:
            return {self.described: quiet_html(sentence(error)), self.command: ""}
        before, token, after = request.trigger(runs.base).partition(request.token)
        words = Markup("{}<b>{}</b>{}" if token else "{}").format(before, token, after)
        photos, word = self.photos.accepted(values[self.photos.kept]), request.token
        doubt = doubt_token(word, self._tokenizer())
        lacking = [p.name for p in photos if p.caption and word not in p.caption.replace("{token}", word)]
        uncalled = f"the captions of {listed(lacking)} have no {{token}} in them, which calls the subject"
        command = request.command(runs.root / "ID", runs.base)
        told, used = [*map(in_labels, config.ignored(request.settings))], config.flat()
        told += [*map(sentence, filter(None, [doubt, uncalled * bool(lacking)]))]
        texts = {self.form[n]: used_words(used[n]) for n in SETTINGS if isinstance(self.form[n], gr.Textbox)}
        return {
            self.described: Markup("").join(
                [_NAMED.format(words), quiet_html(self._expected(request, config))]
                + [notes_html("Good to know", told)] * bool(told)
            ),
            self.command: _shown_command(self._studio, command),
            **{field: gr.update(placeholder=text) for field, text in texts.items()},
        }

    def _tokenizer(self) -> Any:
        """Return what reads prompts of the base, loaded once."""
        base = self._studio.engine.base
        if self._read_by is None or self._read_by[0] is not base:
            self._read_by = base, base.load_tokenizers()[0]
        return self._read_by[1]

    def _expected(self, request: TrainRequest, config: DreamBoothConfig) -> str:
        """Say how long it takes, by this machine's last training or the measured one, and what to expect."""
        steps, runs = config.optimization.max_train_steps or 0, self._studio.runs
        rate = next((each for run in runs.all() if (each := run.images_per_second)), None)
        class_images = " and 200 pictures of its class first" * (config.prior.prior_preservation != "none")
        images = steps * config.optimization.train_batch_size
        took = (
            f"about {duration(images / rate)} here" if rate else "how long is known after the first training"
        )
        if rate is None and runs.base == ALIAS:
            took = f"about {duration(images * MEASURED_SECONDS)} on the machine that was measured"
        expected = "; nothing was measured of how like it comes out"
        if request.preset == "advised" and not request.settings:
            found = advise(len(request.photos), runs.base, read_curves()).expected
            expected = (
                f"; measured with drawings of this base: {'; '.join(found[:2])}" * bool(found) or expected
            )
        return f"{counted(steps, 'step')}{class_images}: {took}{expected}."

    def _start(self, values: Values) -> Updates:
        accepted = self.photos.accepted(values[self.photos.kept])
        request = self.form.asked(self.form.named(values), tuple(photo.path for photo in accepted))
        captions = tuple(photo.caption for photo in accepted)
        return self.runs.show(self._studio.runs.start(replace(request, captions=captions)))
