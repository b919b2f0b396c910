"""The training runs on the page: watched through their files, whoever started them, wherever."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import duration, notes_html, progress_html
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.run_status import Run, State
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import browser_state
from ether_diffusion.ui.tabs.parts import QUIET, SMALL, DeleteButton, Update, Updates
from ether_diffusion.ui.uploads import data_address

SECONDS = 1.0
"""Between two looks at the files of a run."""
THUMBNAIL_SIDE = 192
STATE_WORDS: dict[State, str] = {
    "starting": "starting",
    "running": "training",
    "paused": "paused",
    "stopped": "stopped",
    "crashed": "broke off",
    "finished": "done",
}
NO_RUNS = '<div class="empty"><p>No training yet. Add photos, say what they show, and start.</p></div>'
MAX_ROWS = 8
"""Rows of pictures that are shown: a prompt with a seed each."""
MEAN, EACH = "running mean", "loss"
_MEAN_OVER = 12
_PROMPT_FLAG = "--validation_prompt="
_FIGURE = Markup('<figure><img alt="{}, {}" src="{}"><figcaption>{}</figcaption></figure>')
_MORE = Markup("<details><summary>The same from other seeds</summary>{}</details>")
Seen = dict[str, Any]
"""The id of the run on show, and what stands for each widget's value, so that only what is new is sent."""


class TrainRuns:
    """The widgets and what they do; made inside the tab.

    Attributes:
        chosen: the id of the run that the visitor looks at; "" is the newest, one that trains before others.
        shown: what `look` gives values to.
        adopted: changes when a run's adapter has come into the library, and `taken` is the event of it.
        restored: what the visitor wants to draw after `used`.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self.chosen = browser_state("run", "")
        self.empty = gr.HTML(NO_RUNS, elem_id="train-empty")
        with gr.Column(visible=False, elem_id="train-run") as self.page:
            self.status = gr.HTML(elem_id="train-status")
            with gr.Row(elem_classes="tool-row"):
                self.use = gr.Button("Use in Create", variant="primary", visible=False, elem_id="train-use")
                self.resume = gr.Button("Resume", variant="primary", visible=False, elem_id="train-resume")
                self.pause = gr.Button("Pause", visible=False, elem_id="train-pause")
                self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="train-stop")
            self.samples = gr.HTML(visible=False, elem_id="train-pictures")
            self.curve = gr.LinePlot(
                x="step", y="loss", color="curve", x_title="Step", y_title="Loss", color_title=" ",
                color_map={EACH: "#a3adad", MEAN: "#26868c"}, height=220, buttons=[], tooltip="axis",
                label="Loss", show_label=False, visible=False, elem_id="train-curve",
            )  # fmt: skip
            with gr.Accordion("The command of this run", open=False):
                self.command = gr.Textbox(
                    label="To be run in the studio's folder", lines=3, max_lines=12, interactive=False,
                    buttons=["copy"], elem_id="train-run-command",
                )  # fmt: skip
            self.delete = DeleteButton("train", "Delete this run …", visible=False)
        self.list = gr.Radio([], label="All runs", visible=False, elem_id="train-runs", elem_classes="lines")
        self.seen, self.adopted, self.restored = gr.State({}), gr.State([]), gr.State()
        widgets: list[Any] = [
            self.chosen, self.empty, self.page, self.status, self.use, self.resume, self.pause, self.stop,
            self.samples, self.curve, self.command, self.delete.button, self.delete.box, self.list, self.seen,
            self.adopted,
        ]  # fmt: skip
        self.shown, seen, runs = widgets, [self.seen], studio.runs
        watched = [self.chosen, self.seen]
        gr.Timer(SECONDS).tick(handler(self.look), watched, widgets, queue=False, **QUIET)
        self.list.input(handler(self.show), [self.list], widgets, queue=False, **QUIET)
        acts = {self.stop: runs.stop, self.pause: runs.pause, self.resume: studio.resume}
        for button, act in acts.items():
            button.click(handler(self._then_show(act)), seen, widgets, **QUIET)
        self.delete.tie(self.ask, self.delete_run, self.seen, widgets)
        self.used = self.use.click(handler(self.take), seen, [self.restored], **QUIET)
        self.taken = self.adopted.change(lambda: None, None, None, **QUIET)

    def look(self, chosen: object, seen: Seen) -> Updates:
        """Show what has changed since the last look."""
        run, ids = self._run([chosen, seen.get("id")]), self._studio.runs.ids()
        page, stand = self._page(run), (ids, None, None) if run is None else (ids, run.id, run.state)
        now: Seen = {str(widget.elem_id): hash(repr(update)) for widget, update in page.items()}
        updates = {w: update for w, update in page.items() if now[str(w.elem_id)] != seen.get(str(w.elem_id))}
        if stand[1] != seen.get("id"):  # nothing is asked of another run
            updates[self.delete.box] = gr.update(visible=False)
        if stand != seen.get("stand"):
            updates[self.list] = self._listing(stand[1])
        if not updates:
            return {}
        if run is not None and run.adapter is not None and run.library_id is None:
            updates[self.adopted] = self._studio.keep_finished()
        return {**updates, self.seen: {**now, "id": stand[1], "stand": stand}}

    def _run(self, wanted: Sequence[object]) -> Run | None:
        """Return the first run of these that is there, or the one that trains, or the newest."""
        for run_id in wanted:
            try:
                return self._studio.runs.status(str(run_id))
            except (ValueError, FileNotFoundError):  # damaged, or deleted just now
                continue
        runs = self._studio.runs.all()
        return next((run for run in runs if run.can_stop), runs[0] if runs else None)

    def _page(self, run: Run | None) -> Updates:
        """Return all that is shown of a run."""
        there = {self.empty: gr.update(visible=run is None), self.page: gr.update(visible=run is not None)}
        if run is None:
            return there
        points = loss_points(run.losses) if len(run.losses) > 1 else None
        pictures = samples_html(run, is_small=self._studio.engine.native_size < SMALL)
        return there | {
            self.status: status_html(run),
            self.stop: gr.update(visible=run.can_stop),
            self.pause: gr.update(visible=run.can_pause),
            self.resume: gr.update(visible=run.can_resume),
            self.use: gr.update(visible=run.adapter is not None),
            self.delete.button: gr.update(visible=run.process is None),
            self.curve: gr.update(value=points, x_lim=[0, run.num_steps], visible=points is not None),
            self.samples: gr.update(value=pictures, visible=bool(pictures)),
            self.command: shown_command(self._studio, run.command),
        }

    def _listing(self, chosen: str | None) -> Update:
        runs = self._studio.runs.all()
        labels = [
            (f"{run.name} · {STATE_WORDS[run.state]} · {run.created.astimezone():%d %b, %H:%M}", run.id)
            for run in runs
        ]
        return gr.update(choices=labels, value=chosen, visible=len(runs) > 1)

    def show(self, run_id: str | None) -> Updates:
        """Show a run whole; without an id, the one that `look` finds."""
        return {self.chosen: run_id or "", **self.look(run_id, {})}

    def _then_show(self, act: Callable[[str], None]) -> Callable[[Seen], Updates]:
        """Return what does something to the run on show, and shows how it stands then."""

        def acted(seen: Seen) -> Updates:
            act(_shown_id(seen))
            return self.show(_shown_id(seen))

        return acted

    def ask(self, seen: Seen) -> str:
        """Ask whether the run on show shall be deleted."""
        is_kept = self._studio.runs.status(_shown_id(seen)).adapter is not None
        kept = " Its adapter stays in the library." if is_kept else ""
        return f"Delete this run with its photos, pictures and checkpoints?{kept}"

    def delete_run(self, seen: Seen) -> Updates:
        """Delete the run on show."""
        self._studio.keep_finished()
        self._studio.runs.delete(_shown_id(seen))
        return self.show("")

    def take(self, seen: Seen) -> Restored:
        """Return what draws the subject with its adapter, for the tab Create."""
        run_id = _shown_id(seen)
        card = self._studio.runs.adopt(run_id, self._studio.library)
        return request_with(self._studio, card.id, self._studio.runs.status(run_id).trigger)


def shown_command(studio: Studio, command: Sequence[str]) -> str:
    """Return a command as one types it in the studio's folder."""
    return shlex.join(["train-dreambooth", *(word.replace(f"{studio.folder}/", "") for word in command[3:])])


def _shown_id(seen: Seen) -> str:
    return str(seen.get("id"))


def status_html(run: Run) -> str:
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
