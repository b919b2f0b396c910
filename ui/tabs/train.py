"""The tab Train: photos of a subject, a name and a preset; the run, a process of its own, beside them."""

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup
from PIL import Image

from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName
from ether_diffusion.ui.requests import read_lines
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.runs import MAX_NAME, MAX_PROMPT, Run, State, TrainRequest, train_command
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.page import EMPTY, QUIET, DeleteButton, Form, Page, Updates, Values
from ether_diffusion.ui.uploads import Accepted, Refused, data_address, recall_photos, take_photos
from ether_diffusion.ui.words import counted, duration, handler, notes_html, progress_html, sentence

ADVICE = "Four to ten photos that show it from several sides, in several places. A zip will do, too."
_TABLE = Markup(
    '<table class="reasons"><caption>{} left out</caption><thead><tr><th scope="col">File</th>'
    '<th scope="col">Why</th></tr></thead><tbody>{}</tbody></table>'
)
_ROW = Markup('<tr><th scope="row">{}</th><td>{}</td></tr>')
PRESET_WORDS: Mapping[PresetName, str] = {
    "fast": "a first look", "balanced": "for most subjects",
    "faithful": "as in the ETHER paper, with 200 pictures of its class",
}  # fmt: skip
SHOW_RUN = """() => { if (window.innerWidth <= 760) document.getElementById("train-watch")
  .scrollIntoView({ behavior: "smooth" }); }"""
_PLACEHOLDER = (Path("photo"),)  # stands for photos where only the rest of a request is looked at
_UNNAMED = Markup('<p class="quiet">Say what it is, and the prompt for its photos is made for you.</p>')
_NAMED = Markup('<p class="prompt-made">It is learned as “{}”: these words call it in a prompt.</p>')
SECONDS = 1.0  # between two looks at the files of a run
THUMBNAIL_SIDE, MAX_ROWS = 192, 8
"""Of the pictures of a run, in px, and rows that are shown: a prompt with a seed each."""
STATE_WORDS: dict[State, str] = {
    "starting": "starting", "running": "training", "paused": "paused", "stopped": "stopped",
    "crashed": "broke off", "finished": "done",
}  # fmt: skip
MEAN, EACH = "running mean", "loss"
_MEAN_OVER = 12
_PROMPT_FLAG = "--validation_prompt="
_FIGURE = Markup('<figure><img alt="{}, {}" src="{}"><figcaption>{}</figcaption></figure>')
_MORE = Markup("<details><summary>The same from other seeds</summary>{}</details>")
Seen = dict[str, Any]
"""The id of the run on show, and what stands for each widget's value, so that only what is new is sent."""
_LINE: dict[str, Any] = {"max_lines": 1, "min_width": 140, "max_length": MAX_NAME}
_PRESETS = [
    (f"{preset.capitalize()}: {PRESET_VALUES[preset]['max_train_steps']} steps, {words}", preset)
    for preset, words in PRESET_WORDS.items()
]
FIELDS = {
    "subject": partial(gr.Textbox, label="What is it?", placeholder="dog, teapot, boy …", **_LINE),
    "name": partial(gr.Textbox, label="Name in the library", placeholder="the same", **_LINE),
    "preset": partial(gr.Radio, choices=_PRESETS, value="fast", label="How long", elem_classes="lines"),
    "token": partial(
        gr.Textbox, value="sks", label="Trigger word", max_lines=1, max_length=32, min_width=100
    ),
    "steps": partial(  # a number that is empty would show 0 once this is opened
        gr.Textbox, label="Steps", placeholder="as above", max_lines=1, max_length=12, min_width=100
    ),
    "seed": partial(gr.Number, value=0, label="Seed", min_width=100),
    "instance_prompt": partial(
        gr.Textbox, label="Prompt of the photos", max_lines=2,
        placeholder="made of the above; {token} is the trigger word", max_length=MAX_PROMPT,
    ),
    "samples": partial(
        gr.Textbox, label="Pictures to draw in between", info="A prompt a line.", lines=2, max_lines=6,
        placeholder="made of the above", max_length=4 * MAX_PROMPT,
    ),
}  # fmt: skip
"""All but the photos, by the names of a TrainRequest, and of browsers."""


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
                self.put("token", "steps", "seed")
            self.put("instance_prompt", "samples")
        return described

    def read(self, named: Mapping[str, Any], photos: tuple[Path, ...] = _PLACEHOLDER) -> TrainRequest:
        texts = {name: (named[name] or "").strip() for name in ("subject", "name", "instance_prompt")}
        return TrainRequest(
            photos=photos, **texts, token=(named["token"] or "").strip() or "sks", preset=named["preset"],
            steps=named["steps"] or None, seed=named["seed"] or 0,
            validation_prompts=read_lines(named["samples"] or ""),
        )  # fmt: skip


class TrainPhotos:
    """The widgets and what they do; made inside the form."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        drop: dict[str, Any] = {"elem_id": "train-photos", "elem_classes": "drop", "height": 104}
        self.dropped = gr.File(label="Photos", file_count="multiple", **drop)
        self.said = gr.HTML(_said([]), elem_id="train-photos-said")
        self.gallery = Page.thumbnails("train-gallery", "Photos to learn from", columns=5)
        with gr.Row(visible=False, elem_classes="tool-row") as self.tools:
            chosen: dict[str, Any] = {"interactive": False, "elem_id": "train-leave-out"}
            self.leave_out = gr.Button("Leave out the chosen one", size="sm", **chosen)
            clear = gr.Button("Start over", size="sm", elem_id="train-clear")
        self.refused = gr.HTML(visible=False, elem_id="train-refused")
        self.kept, self.selected = Page.browser_state("photos", []), gr.State(-1)
        shown: list[Any] = [
            self.dropped, self.said, self.gallery, self.tools, self.refused, self.kept, self.selected,
            self.leave_out,
        ]  # fmt: skip
        told: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": [self.dropped]}
        given = [self.dropped, self.kept]
        self.dropped.upload(handler(self._take), given, shown, api_visibility="private", **told)
        self.gallery.select(handler(self._select), None, [self.selected, self.leave_out], **QUIET)
        self.leave_out.click(handler(self._remove), [self.selected, self.kept], shown, **QUIET)
        clear.click(handler(lambda: self._show([])), None, shown, **QUIET)
        Context.root_block.load(handler(self._recall), [self.kept], shown, **QUIET)

    def accepted(self, kept: object) -> list[Accepted]:
        """Return the photos that the browser says were added and that are still there."""
        return recall_photos(kept, self._studio.runs.photos)

    def _take(self, files: list[str] | None, kept: object) -> Updates:
        """Look at dropped files: show what can be used, and why the rest cannot."""
        earlier, paths = self.accepted(kept), [Path(file) for file in files or []]
        with self._studio.reading:
            accepted, refused = take_photos(paths, self._studio.runs.photos, earlier)
        return self._show([*earlier, *accepted], refused)

    def _recall(self, kept: object) -> Updates:
        """Show the photos that were there before the page was loaded again."""
        photos = self.accepted(kept)
        return self._show(photos) if photos else {}

    def _select(self, chosen: gr.SelectData) -> Updates:
        index = chosen.index if isinstance(chosen.index, int) else -1
        return {self.selected: index, self.leave_out: gr.update(interactive=index >= 0)}

    def _remove(self, selected: int, kept: object) -> Updates:
        return self._show([photo for index, photo in enumerate(self.accepted(kept)) if index != selected])

    def _show(self, photos: Sequence[Accepted], refused: Sequence[Refused] = ()) -> Updates:
        rows = Markup("").join(_ROW.format(*each) for each in refused)
        table = _TABLE.format(counted(len(refused), "file"), rows)
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
    words += " A few more will make it better." if 0 < len(photos) < 3 else ""
    notes = [Markup("<li>{} {}</li>").format(photo.name, photo.note) for photo in photos if photo.note]
    said = Markup('<p class="quiet">{}</p>').format(words)
    return said + Markup('<ul class="quiet">{}</ul>').format(Markup("").join(notes)) if notes else said


def _opened(thumbnail: Path) -> Image.Image:
    with Image.open(thumbnail) as image:
        return image.copy()


class TrainRuns:
    """The runs on the page, watched through their files; `shown` is what `show` gives values to."""

    def __init__(self, page: Page) -> None:
        self._page, self._studio, runs = page, page.studio, page.studio.runs
        self.chosen = Page.browser_state("run", "")  # "" is the newest, one that trains before others
        none_yet = EMPTY.format("No training yet. Add photos, say what they show, and start.")
        self.empty, hidden = gr.HTML(none_yet, elem_id="train-empty"), {"visible": False}
        with gr.Column(visible=False, elem_id="train-run") as self.box:
            self.status = gr.HTML(elem_id="train-status")
            with gr.Row(elem_classes="tool-row"):
                self.use = gr.Button("Use in Create", variant="primary", elem_id="train-use", **hidden)
                self.resume = gr.Button("Resume", variant="primary", elem_id="train-resume", **hidden)
                self.pause = gr.Button("Pause", elem_id="train-pause", **hidden)
                self.stop = gr.Button("Stop", variant="stop", elem_id="train-stop", **hidden)
            self.samples = gr.HTML(elem_id="train-pictures", **hidden)
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
            adopted,
        ]  # fmt: skip
        watched, seen = [self.chosen, self.seen], [self.seen]
        gr.Timer(SECONDS).tick(handler(self._look), watched, self.shown, queue=False, **QUIET)
        self.list.input(handler(self.show), [self.list], self.shown, queue=False, **QUIET)
        acts = {self.stop: runs.stop, self.pause: runs.pause, self.resume: page.studio.resume}
        for button, act in acts.items():
            button.click(handler(self._then_show(act)), seen, self.shown, **QUIET)
        self.delete.tie(self._ask, self._delete, self.seen, self.shown)
        used = self.use.click(handler(self._take), seen, [page.restored], **QUIET)
        page.sendings.append(used)
        page.changes += [adopted.change(lambda: None, None, None, **QUIET), used]

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
            updates[self.delete.box] = gr.update(visible=False)
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
        """Return all that is shown of a run."""
        there = {self.empty: gr.update(visible=run is None), self.box: gr.update(visible=run is not None)}
        if run is None:
            return there
        points = loss_points(run.losses) if len(run.losses) > 1 else None
        pictures = samples_html(run, is_small=self._page.is_small)
        return there | {
            self.status: _status_html(run),
            self.stop: gr.update(visible=run.can_stop),
            self.pause: gr.update(visible=run.can_pause),
            self.resume: gr.update(visible=run.can_resume),
            self.use: gr.update(visible=run.adapter is not None),
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

    def _take(self, seen: Seen) -> Restored:
        """Return what draws the subject with its adapter, for the tab Create."""
        run = self._studio.runs.status(str(seen.get("id")))
        return request_with(
            self._studio, self._studio.runs.adopt(run.id, self._studio.library).id, run.trigger
        )


def _command_box(label: str, elem_id: str) -> gr.Textbox:
    look: dict[str, Any] = {"lines": 3, "max_lines": 12, "interactive": False, "buttons": ["copy"]}
    return gr.Textbox(label=label, elem_id=elem_id, **look)


def _shown_command(studio: Studio, command: Sequence[str]) -> str:
    """Return a command as one types it in the studio's folder."""
    return shlex.join(["train-dreambooth", *(word.replace(f"{studio.folder}/", "") for word in command[3:])])


def _status_html(run: Run) -> str:
    """Return how a run stands: a bar with words while it goes on, a box where something is to be done."""
    heading = Markup("<h2>{}</h2>").format(run.name)
    if run.state == "crashed":
        return heading + notes_html("The training broke off", [run.sentence], kind="warning")
    words = run.sentence
    if run.seconds_left is not None and run.step < run.num_steps:
        words = f"{words} About {duration(run.seconds_left)} left."
    return heading + progress_html(run.step / max(1, run.num_steps), words)


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


def samples_html(run: Run, *, is_small: bool) -> str:
    """Return the pictures by step, those of the base and of step 0 first; a row is a prompt with a seed."""
    words = [word.removeprefix(_PROMPT_FLAG) for word in run.command if word.startswith(_PROMPT_FLAG)]
    prompts = {f"prompt-{number:02d}": prompt for number, prompt in enumerate(words)}
    columns = [("Base", path) for path in run.base_samples]
    columns += [(f"Step {step}", path) for step, path in run.samples]
    first, others = dict[str, Markup](), list[Markup]()
    for name in sorted({path.stem for _, path in columns})[:MAX_ROWS]:  # prompt-01_seed-0
        own = name.split("_")[0]
        prompt = prompts.get(own, "")
        addresses = [
            (label, data_address(path, THUMBNAIL_SIDE)) for label, path in columns if path.stem == name
        ]
        figures = Markup("").join(
            _FIGURE.format(prompt, label.lower(), address, label) for label, address in addresses if address
        )
        row = Markup('<p class="quiet">{}</p><div class="steps">{}</div>').format(prompt, figures)
        if own in first:
            others.append(row)
        else:
            first[own] = row
    if not first:
        return ""
    body = Markup("").join(first.values()) + (_MORE.format(Markup("").join(others)) if others else "")
    return Markup('<div class="{}">{}</div>').format("samples sharp" if is_small else "samples", body)


def build(page: Page) -> None:
    """Lay out the tab and tie its events."""
    with gr.Tab("Train", id="train"):
        TrainTab(page)


class TrainTab:
    """The widgets of the tab and what they do; made inside a gr.Tab."""

    def __init__(self, page: Page) -> None:
        self._studio, self.form = page.studio, TrainForm(page.studio, "train", FIELDS)
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.photos = TrainPhotos(page.studio)
                self.described = self.form.put_all()
                with gr.Accordion("Command line", open=False):
                    label = "What Start runs, in the studio's folder"
                    self.command = _command_box(label, "train-command")
                go = gr.Button("Start training", variant="primary", elem_id="train-go")
            beside: dict[str, Any] = {"elem_classes": "results", "elem_id": "train-watch"}
            with gr.Column(scale=3, min_width=300, **beside):
                self.runs = TrainRuns(page)
        fields, described = self.form.all(), [self.described, self.command]
        changes: list[Any] = [field.change for field in self.form.widgets.values()]
        often: dict[str, Any] = {"trigger_mode": "always_last", "queue": False, **QUIET}
        gr.on(changes, handler(self._describe), fields, described, **often)
        Context.root_block.load(handler(self._describe), fields, described, **QUIET)
        started = go.click(handler(self._start), {self.photos.kept, *fields}, self.runs.shown, **QUIET)
        started.success(None, js=SHOW_RUN, api_visibility="private")
        self.form.keep_in_browser()

    def _describe(self, values: Values) -> tuple[str, str]:
        """Say how the subject will be called, and what command trains it."""
        named, runs = self.form.named(values), self._studio.runs
        if not (named["subject"] or "").strip():
            return _UNNAMED, ""
        try:
            request = self.form.read(named)
        except ValueError as error:
            return Markup('<p class="quiet">{}</p>').format(sentence(error)), ""
        before, token, after = request.trigger(runs.base).partition(request.token)
        words = Markup("{}<b>{}</b>{}" if token else "{}").format(before, token, after)
        command = train_command(request, runs.root / "ID", runs.base)
        return _NAMED.format(words), _shown_command(self._studio, command)

    def _start(self, values: Values) -> Updates:
        """Start a run of what the form says, and show it."""
        photos = tuple(photo.path for photo in self.photos.accepted(values[self.photos.kept]))
        return self.runs.show(self._studio.train(self.form.read(self.form.named(values), photos)))
