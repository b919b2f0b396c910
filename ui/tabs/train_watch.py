"""The training runs on the page: watched through their files, whoever started them, wherever."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.restore import Restored, request_with
from ether_diffusion.ui.run_record import GONE
from ether_diffusion.ui.run_status import RunStatus
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.keep_form import browser_state
from ether_diffusion.ui.tabs.parts import Updates
from ether_diffusion.ui.tabs.train_form import shown_command
from ether_diffusion.ui.tabs.train_looks import (
    EACH,
    MEAN,
    NO_RUNS,
    loss_points,
    run_label,
    samples_html,
    status_html,
)
from ether_diffusion.ui.thumbnails import Thumbnails

SECONDS = 1.0
"""Between two looks at the files of a run."""
THUMBNAIL_SIDE = 192
Seen = dict[str, Any]
"""What the page shows by part, so that only what has changed is sent."""


class TrainWatch:
    """The widgets and what they do; made inside the tab.

    Attributes:
        chosen: the id of the run that the visitor looks at; "" is the newest, one that trains before others.
        adopted: changes when a run's adapter has come into the library.
        restored: what the visitor wants to draw after `used`.
    """

    def __init__(self, studio: Studio, *, is_small: bool) -> None:
        self._studio, self._is_small = studio, is_small
        self._thumbnails = Thumbnails(THUMBNAIL_SIDE)
        self._lay_out()
        self._tie()

    def _lay_out(self) -> None:
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
        self.seen = gr.State({})
        self.adopted, self.restored = gr.State([]), gr.State()
        self.timer = gr.Timer(SECONDS)

    def _tie(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown, state = self.shown(), [self.chosen, self.seen]
        self.timer.tick(handler(self.look), state, shown, queue=False, **quiet)
        self.list.input(handler(self.choose), [self.list], shown, queue=False, **quiet)
        self.stop.click(handler(self.stop_run), [self.seen], shown, **quiet)
        self.pause.click(handler(self.pause_run), [self.seen], shown, **quiet)
        self.resume.click(handler(self.resume_run), [self.seen], shown, **quiet)
        asking = [self.confirm, self.question]
        self.delete.click(handler(self.ask), [self.seen], asking, **quiet)
        self.keep.click(handler(self.hide_question), None, asking, **quiet)
        self.delete_now.click(handler(self.delete_run), [self.seen], [*shown, self.confirm], **quiet)
        self.used = self.use.click(handler(self.take), [self.seen], [self.restored], **quiet)
        self.taken = self.adopted.change(handler(_nothing), None, None, **quiet)

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
        run = self._run(chosen, ids, seen)
        now = {"ids": ids, **_parts_of(run)}
        if now == seen:
            return {}
        updates: Updates = {self.seen: now}
        if run is not None and run.adapter is not None and run.library_id is None:
            updates[self.adopted] = self._studio.keep_finished()
        if (now["ids"], now["state"], now["id"]) != tuple(seen.get(key) for key in ("ids", "state", "id")):
            updates |= self._frame(run, now["id"] != seen.get("id"))
        if run is not None:
            updates |= self._changed(run, now, seen)
        return updates

    def _run(self, chosen: object, ids: list[str], seen: Seen) -> RunStatus | None:
        """Return the chosen run where it is there, or the one that trains, or the newest."""
        known = seen.get("id")
        for wanted in (chosen, known):
            if isinstance(wanted, str) and wanted in ids:
                try:
                    return self._studio.runs.status(wanted)
                except (ValueError, FileNotFoundError):  # damaged, or deleted just now
                    continue
        runs = self._studio.runs.all()
        return next((run for run in runs if run.can_stop), runs[0] if runs else None)

    def _frame(self, run: RunStatus | None, is_other: bool) -> Updates:
        """Return the updates for another run, another state, or another list of runs."""
        runs = self._studio.runs.all()
        updates: Updates = {
            self.empty: gr.update(visible=run is None),
            self.page: gr.update(visible=run is not None),
            self.list: gr.update(
                choices=[(run_label(each), each.id) for each in runs],
                value=None if run is None else run.id,
                visible=len(runs) > 1,
            ),
        }
        if run is not None and is_other:
            command = shown_command(run.command, self._studio.folder)
            updates[self.command] = gr.update(value=command)
        return updates

    def _changed(self, run: RunStatus, now: Seen, seen: Seen) -> Updates:
        updates: Updates = {}
        if now["status"] != seen.get("status"):
            updates[self.status] = status_html(run)
        if now["buttons"] != seen.get("buttons"):
            updates |= {
                self.stop: gr.update(visible=run.can_stop),
                self.pause: gr.update(visible=run.can_pause),
                self.resume: gr.update(visible=run.can_resume),
                self.use: gr.update(visible=run.adapter is not None),
                self.delete: gr.update(visible=run.state not in ("starting", "running")),
            }
        if now["losses"] != seen.get("losses"):
            points = loss_points(run.losses) if len(run.losses) > 1 else None
            limits = [0, run.num_steps]
            updates[self.curve] = gr.update(value=points, x_lim=limits, visible=points is not None)
        if now["samples"] != seen.get("samples"):
            pictures = samples_html(run, self._thumbnails, is_small=self._is_small)
            updates[self.samples] = gr.update(value=pictures, visible=bool(pictures))
        return updates

    def show(self, run_id: str) -> Updates:
        """Show a run whole."""
        return {self.chosen: run_id, **self.look(run_id, {})}

    def choose(self, run_id: str | None) -> Updates:
        """Show the run that was chosen from the list."""
        return self.show(run_id or "")

    def stop_run(self, seen: Seen) -> Updates:
        """Stop the run on show."""
        self._studio.runs.stop(_shown_id(seen))
        return self.show(_shown_id(seen))

    def pause_run(self, seen: Seen) -> Updates:
        """Pause the run on show."""
        self._studio.runs.pause(_shown_id(seen))
        return self.show(_shown_id(seen))

    def resume_run(self, seen: Seen) -> Updates:
        """Go on with the run on show."""
        self._studio.resume(_shown_id(seen))
        return self.show(_shown_id(seen))

    def ask(self, seen: Seen) -> Mapping[Any, Any]:
        """Ask whether the run on show shall be deleted."""
        run = self._studio.runs.status(_shown_id(seen))
        words = "Delete this run with its photos, pictures and checkpoints?"
        kept = " Its adapter stays in the library." if run.adapter is not None else ""
        return {self.confirm: gr.update(visible=True), self.question: f"<p>{words}{kept}</p>"}

    def hide_question(self) -> Mapping[Any, Any]:
        """Delete nothing."""
        return {self.confirm: gr.update(visible=False)}

    def delete_run(self, seen: Seen) -> Mapping[Any, Any]:
        """Delete the run on show."""
        self._studio.keep_finished()
        self._studio.runs.delete(_shown_id(seen))
        return {**self.show(""), self.confirm: gr.update(visible=False)}

    def take(self, seen: Seen) -> Restored:
        """Return what draws the subject with its adapter, for the tab Create."""
        run_id = _shown_id(seen)
        card = self._studio.runs.adopt(run_id, self._studio.library)
        return request_with(self._studio, card.id, self._studio.runs.status(run_id).trigger)


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


def _nothing() -> None:
    return None
