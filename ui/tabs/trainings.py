"""The trainings on the page, each a process of its own that is watched through its files."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.run import Run, State
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.page import (
    EMPTY,
    ON_PRESS,
    ON_SLIDE,
    SECONDS,
    DeleteButton,
    Page,
    Panel,
    Updates,
    looks,
    news,
    pair_html,
    told_by,
)
from ether_diffusion.ui.uploads import data_address
from ether_diffusion.ui.words import duration, notes_html, progress_html

NONE_YET = EMPTY.format("No training yet. Add photos, say what they show, and start.")
THUMBNAIL_SIDE, LARGE_SIDE, MAX_ROWS = 192, 768, 8
"""Of the pictures of a run, in px, and rows that are shown: a prompt with a seed each."""
STATE_WORDS: dict[State, str] = {
    "queued": "waiting", "starting": "starting", "running": "training", "paused": "paused",
    "stopped": "stopped", "crashed": "broke off", "finished": "done",
}  # fmt: skip
MEAN, EACH, _MEAN_OVER = "running mean", "loss", 12
_PROMPT_FLAG = "--validation_prompt="
_FIGURE = Markup(
    '<figure><button type="button" data-step="{step}" data-sample="{name}">'
    '<img alt="{prompt}, {called}" src="{}"></button><figcaption>{label}</figcaption></figure>'
)
_MORE = Markup("<details><summary>The same from other seeds</summary>{}</details>")
Seen = dict[str, Any]
"""The id of the run on show, and what stands for each widget's value, so that only what is new is sent."""


class Trainings(Panel):
    """The widgets and what they do; made inside the column that they fill."""

    def __init__(self, page: Page) -> None:
        super().__init__(page, "train")
        runs, hidden = page.studio.runs, dict[str, Any](visible=False)
        self.chosen = page.run = self.kept("run", "")  # "" is the newest, one that trains before others
        self.empty = self.html("empty", NONE_YET)
        with gr.Column(visible=False, elem_id="train-run") as self.box:
            self.status = self.html("status")
            with gr.Row(elem_classes="tool-row"):
                self.use = self.button("use", "Use in Create", variant="primary", **hidden)
                self.resume = self.button("resume", "Resume", variant="primary", **hidden)
                self.pause = self.button("pause", "Pause", **hidden)
                self.stop = self.button("stop", "Stop", variant="stop", **hidden)
            self.samples = self.html("pictures", js_on_load=ON_PRESS, **hidden)
            with gr.Column(visible=False, elem_classes="confirm", elem_id="train-sample") as self.sample:
                self.large = gr.HTML(js_on_load=ON_SLIDE)
                with gr.Row(elem_classes="tool-row"):
                    self.use_step = self.button("use-step", "Use this step")
                    self.train_on = self.button("on", "Train on")
                    close = self.button("sample-close", "Close")
                self.step = gr.State(0)
            self.curve = gr.LinePlot(
                x="step", y="loss", color="curve", x_title="Step", y_title="Loss", color_title=" ",
                color_map={EACH: "#a3adad", MEAN: "#26868c"}, height=220, buttons=[], tooltip="axis",
                label="Loss", show_label=False, elem_id="train-curve", visible=False,
            )  # fmt: skip
            with gr.Accordion("The command of this run", open=False):
                self.command = command_box("To be run in the studio's folder", "train-run-command")
            self.delete = DeleteButton("train", "Delete this run …", visible=False)
        lines: dict[str, Any] = {"elem_id": "train-runs", "elem_classes": "lines", "visible": False}
        self.list, self.adopted = gr.Radio([], label="All runs", **lines), gr.State([])
        self.seen, self.run_id = gr.State({}), gr.State("")
        self.timer = gr.Timer(SECONDS)
        self.elsewhere.append(self.timer)
        self.on(self.timer.tick, self._look, [self.chosen, self.seen], queue=False)
        self.on(self.list.input, self.show, [self.list], queue=False)
        acts = {self.stop: runs.stop, self.pause: runs.pause, self.resume: runs.resume}
        for button, act in acts.items():
            self.on(button.click, partial(self._act, act), [self.run_id])
        self.on(self.train_on.click, partial(self._act, runs.train_on), [self.run_id, self.step])
        self.delete.tie(self, self._ask, self._delete, self.run_id)
        self.on(self.samples.click, self._enlarge, [self.run_id])
        self.closes(close, self.sample)
        page.changes += [
            self.on(self.adopted.change, lambda: None, None, []),
            self.sends(self.use.click, self._take, [self.run_id]),
            self.sends(self.use_step.click, self._take, [self.run_id, self.step]),
        ]

    def show(self, run_id: str | None) -> Updates:
        """Show a run whole; without an id, one that trains, or the newest."""
        return {self.chosen: run_id or "", **self._look(run_id, {})}

    def _look(self, chosen: object, seen: Seen) -> Updates:
        """Show what has changed since the last look."""
        run, ids = self._run([chosen, seen.get("id")]), self.studio.runs.ids()
        (updates, now), run_id = news(self._shown(run), seen), run.id if run else ""
        stand = (ids, run_id, run and run.state)
        if run_id != seen.get("id"):  # nothing is asked of another run
            closed = gr.update(visible=False)
            updates |= {self.run_id: run_id, self.delete.box: closed, self.sample: closed}
        if stand != seen.get("stand"):
            runs = self.studio.runs.all()
            choices = [(_called(each), each.id) for each in runs]
            updates[self.list] = gr.update(choices=choices, value=run_id or None, visible=len(runs) > 1)
        if not updates:
            return {}
        if run is not None and run.adapter is not None and run.library_id is None:
            updates[self.adopted] = self.studio.keep_finished()
        return {**updates, self.seen: {**now, "id": run_id, "stand": stand}}

    def _run(self, wanted: Sequence[object]) -> Run | None:
        """Return the first run of these that is there, or the one that trains, or the newest."""
        for run_id in wanted:
            with suppress(ValueError, FileNotFoundError):  # damaged, or deleted just now
                return self.studio.runs.status(str(run_id))
        runs = self.studio.runs.all()
        return next((run for run in runs if run.can_stop), runs[0] if runs else None)

    def _shown(self, run: Run | None) -> Updates:
        there = {self.empty: gr.update(visible=run is None), self.box: gr.update(visible=run is not None)}
        there[self.timer] = looks(often=run is not None and run.can_stop)
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
            self.command: shown_command(self.studio, run.command),
        }

    def _act(self, act: Callable[..., str | None], run_id: str, *more: int) -> Updates:
        """Do something to the run on show, and show how it stands then, or the one that this began."""
        return self.show(act(run_id, *more) or run_id)

    def _ask(self, run_id: str) -> str:
        kept = " Its adapter stays in the library." * (self.studio.runs.status(run_id).adapter is not None)
        return f"Delete this run with its photos, pictures and checkpoints?{kept}"

    def _delete(self, run_id: str) -> Updates:
        self.studio.keep_finished()
        self.studio.runs.delete(run_id)
        return self.show("")

    def _take(self, run_id: str, step: int | None = None) -> Restored:
        run = self.studio.runs.status(run_id)
        adopted = self.studio.runs.adopt(run_id, self.studio.library, step)
        return request_with(self.studio, adopted.id, run.trigger)

    def _enlarge(self, event: gr.EventData, run_id: str) -> Updates:
        """Show a picture of the run large, that of a step beside the base's of the same prompt and seed."""
        asked, run = told_by(event), self.studio.runs.status(run_id)
        name, number = asked.get("sample"), str(asked.get("step"))
        step = int(number) if number.isdecimal() else None
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


def _called(run: Run) -> str:
    return f"{run.name} · {STATE_WORDS[run.state]} · {run.created.astimezone():%d %b, %H:%M}"


def command_box(label: str, elem_id: str) -> gr.Textbox:
    """Lay out a command to be copied."""
    look: dict[str, Any] = {"lines": 3, "max_lines": 12, "interactive": False, "buttons": ["copy"]}
    return gr.Textbox(label=label, elem_id=elem_id, **look)


def shown_command(studio: Studio, command: Sequence[str]) -> str:
    """Return a command of ours as it is typed in the studio's folder."""
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
