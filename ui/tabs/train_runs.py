"""The training runs on the page: watched through their files, whoever started them, wherever."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from markupsafe import Markup

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.facts import duration, notes_html, progress_html
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.run_status import GONE, RunStatus, State
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.form import browser_state
from ether_diffusion.ui.tabs.parts import SMALL, Updates
from ether_diffusion.ui.thumbnails import data_address

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
"""What the page shows by part, so that only what has changed is sent."""


class TrainRuns:
    """The widgets and what they do; made inside the tab.

    Attributes:
        chosen: the id of the run that the visitor looks at; "" is the newest, one that trains before others.
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
            self.delete = gr.Button("Delete this run …", size="sm", visible=False, elem_id="train-delete")
            with gr.Column(visible=False, elem_classes="confirm") as self.confirm:
                self.question = gr.HTML(elem_id="train-question")
                with gr.Row(elem_classes="tool-row"):
                    self.delete_now = gr.Button("Delete", variant="stop", elem_id="train-delete-now")
                    self.keep = gr.Button("Keep it", elem_id="train-delete-not")
        self.list = gr.Radio([], label="All runs", visible=False, elem_id="train-runs", elem_classes="lines")
        self.seen, self.adopted, self.restored = gr.State({}), gr.State([]), gr.State()
        self._tie()

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown, seen = self.shown(), [self.seen]
        gr.Timer(SECONDS).tick(handler(self.look), [self.chosen, self.seen], shown, queue=False, **quiet)
        self.list.input(handler(self.show), [self.list], shown, queue=False, **quiet)
        runs = self._studio.runs
        acts = {self.stop: runs.stop, self.pause: runs.pause, self.resume: self._studio.resume}
        for button, act in acts.items():
            button.click(handler(self._then_show(act)), seen, shown, **quiet)
        self.delete.click(handler(self.ask), seen, [self.confirm, self.question], **quiet)
        self.keep.click(lambda: gr.update(visible=False), None, [self.confirm], **quiet)
        self.delete_now.click(handler(self.delete_run), seen, [*shown, self.confirm], **quiet)
        self.used = self.use.click(handler(self.take), seen, [self.restored], **quiet)
        self.taken = self.adopted.change(lambda: None, None, None, **quiet)

    def shown(self) -> list[Component]:
        """Return what `look` gives values to."""
        widgets: list[Any] = [
            self.chosen, self.empty, self.page, self.status, self.use, self.resume, self.pause, self.stop,
            self.samples, self.curve, self.command, self.delete, self.list, self.seen, self.adopted,
        ]  # fmt: skip
        return widgets

    def look(self, chosen: object, seen: Seen) -> Updates:
        """Show what has changed since the last look."""
        ids = self._studio.runs.ids()
        run = self._run([each for each in (chosen, seen.get("id")) if each in ids])
        now = {"ids": ids, **_parts_of(run)}
        if now == seen:
            return {}
        updates: Updates = {self.seen: now}
        if run is not None and run.adapter is not None and run.library_id is None:
            updates[self.adopted] = self._studio.keep_finished()
        if any(now[part] != seen.get(part) for part in ("ids", "state", "id")):
            updates |= self._frame(run)
        if run is not None:
            updates |= self._changed(run, {part for part in now if now[part] != seen.get(part)})
        return updates

    def _run(self, wanted: Sequence[Any]) -> RunStatus | None:
        """Return the first run of these that is there, or the one that trains, or the newest."""
        for run_id in wanted:
            try:
                return self._studio.runs.status(run_id)
            except (ValueError, FileNotFoundError):  # damaged, or deleted just now
                continue
        runs = self._studio.runs.all()
        return next((run for run in runs if run.can_stop), runs[0] if runs else None)

    def _frame(self, run: RunStatus | None) -> Updates:
        """Return the updates for another run, another state, or another list of runs."""
        runs = self._studio.runs.all()
        labels = [
            f"{each.name} · {STATE_WORDS[each.state]} · {each.created.astimezone():%d %b, %H:%M}"
            for each in runs
        ]
        return {
            self.empty: gr.update(visible=run is None),
            self.page: gr.update(visible=run is not None),
            self.list: gr.update(
                choices=list(zip(labels, (each.id for each in runs), strict=True)),
                value=None if run is None else run.id,
                visible=len(runs) > 1,
            ),
        }

    def _changed(self, run: RunStatus, changed: set[str]) -> Updates:
        updates: Updates = {}
        if "id" in changed:
            updates[self.command] = gr.update(value=shown_command(self._studio, run.command))
        if "status" in changed:
            updates[self.status] = status_html(run)
        if "buttons" in changed:
            updates |= {
                self.stop: gr.update(visible=run.can_stop),
                self.pause: gr.update(visible=run.can_pause),
                self.resume: gr.update(visible=run.can_resume),
                self.use: gr.update(visible=run.adapter is not None),
                self.delete: gr.update(visible=run.state not in ("starting", "running")),
            }
        if "losses" in changed:
            points = loss_points(run.losses) if len(run.losses) > 1 else None
            limits = [0, run.num_steps]
            updates[self.curve] = gr.update(value=points, x_lim=limits, visible=points is not None)
        if "samples" in changed:
            pictures = samples_html(run, is_small=self._studio.engine.native_size < SMALL)
            updates[self.samples] = gr.update(value=pictures, visible=bool(pictures))
        return updates

    def show(self, run_id: str | None) -> Updates:
        """Show a run whole; without an id, the one that `look` finds."""
        return {self.chosen: run_id or "", **self.look(run_id, {})}

    def _then_show(self, act: Callable[[str], None]) -> Callable[[Seen], Updates]:
        """Return what does something to the run on show, and shows how it stands then."""

        def acted(seen: Seen) -> Updates:
            act(_shown_id(seen))
            return self.show(_shown_id(seen))

        return acted

    def ask(self, seen: Seen) -> dict[Any, Any]:
        """Ask whether the run on show shall be deleted."""
        run = self._studio.runs.status(_shown_id(seen))
        words = "Delete this run with its photos, pictures and checkpoints?"
        kept = " Its adapter stays in the library." if run.adapter is not None else ""
        return {self.confirm: gr.update(visible=True), self.question: f"<p>{words}{kept}</p>"}

    def delete_run(self, seen: Seen) -> dict[Any, Any]:
        """Delete the run on show."""
        self._studio.keep_finished()
        self._studio.runs.delete(_shown_id(seen))
        return {**self.show(""), self.confirm: gr.update(visible=False)}

    def take(self, seen: Seen) -> Restored:
        """Return what draws the subject with its adapter, for the tab Create."""
        run_id = _shown_id(seen)
        card = self._studio.runs.adopt(run_id, self._studio.library)
        return request_with(self._studio, card.id, self._studio.runs.status(run_id).trigger)


def shown_command(studio: Studio, command: Sequence[str]) -> str:
    """Return a command as one types it in the studio's folder."""
    return shlex.join(["train-dreambooth", *(word.replace(f"{studio.folder}/", "") for word in command[3:])])


def _parts_of(run: RunStatus | None) -> Seen:
    """Return what stands for each part of a run, and is another when the part is."""
    if run is None:
        return {"id": None, "state": None}
    return {
        "id": run.id,
        "state": run.state,
        "status": [run.id, run.sentence, run.step, round(run.seconds_left or 0)],
        "buttons": [run.id, run.can_stop, run.can_pause, run.can_resume, run.state],
        "losses": [run.id, len(run.losses), *(run.losses[-1] if run.losses else ())],
        "samples": [run.id, len(run.samples), len(run.base_samples)],
        "library_id": run.library_id,
    }


def _shown_id(seen: Seen) -> str:
    shown = seen.get("id")
    if not isinstance(shown, str):
        raise FileNotFoundError(GONE)
    return shown


def status_html(run: RunStatus) -> str:
    """Return how a run stands: a bar with words while it goes on, a box where something is to be done."""
    heading = Markup("<h2>{}</h2>").format(run.name)
    if run.state == "crashed":
        return heading + Markup(notes_html("The training broke off", [run.sentence], kind="warning"))
    words = run.sentence
    if run.seconds_left is not None and run.step < run.num_steps:
        words = f"{words} About {duration(run.seconds_left)} left."
    return heading + Markup(progress_html(run.step / max(1, run.num_steps), words))


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


def samples_html(run: RunStatus, *, is_small: bool) -> str:
    """Return the pictures by step, those of the base and of step 0 first; a row is a prompt with a seed."""
    rows: dict[str, list[tuple[str, Path]]] = {}
    for label, path in [
        *(("Base", path) for path in run.base_samples),
        *((f"Step {step}", path) for step, path in run.samples),
    ]:
        rows.setdefault(path.stem, []).append((label, path))
    prompts = [word.removeprefix(_PROMPT_FLAG) for word in run.command if word.startswith(_PROMPT_FLAG)]
    first, others = dict[int, Markup](), list[Markup]()
    for name in sorted(rows)[:MAX_ROWS]:  # prompt-01_seed-0
        digits = name.removeprefix("prompt-").split("_")[0]
        number = int(digits) if digits.isdecimal() else 0
        prompt = prompts[number] if number < len(prompts) else ""
        addresses = [(label, data_address(path, THUMBNAIL_SIDE)) for label, path in rows[name]]
        figures = Markup("").join(
            _FIGURE.format(prompt, label.lower(), address, label) for label, address in addresses if address
        )
        row = Markup('<p class="quiet">{}</p><div class="steps">{}</div>').format(prompt, figures)
        if number in first:
            others.append(row)
        else:
            first[number] = row
    if not first:
        return ""
    body = Markup("").join(first.values()) + (_MORE.format(Markup("").join(others)) if others else "")
    return Markup('<div class="{}">{}</div>').format("samples sharp" if is_small else "samples", body)
