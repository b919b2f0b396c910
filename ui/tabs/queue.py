"""What runs and waits, over all tabs: a visitor's drawing and everybody's training, each to cancel."""

import time
from typing import Any

import gradio as gr
from markupsafe import Markup

from ether_diffusion.ui.jobs import Job
from ether_diffusion.ui.requests import GridRequest
from ether_diffusion.ui.run import Run
from ether_diffusion.ui.tabs.base import BasePanel
from ether_diffusion.ui.tabs.page import ON_PRESS, Page, Panel, Updates, looks, news, owner_of, told_by
from ether_diffusion.ui.words import counted, duration
from ether_diffusion.wording import printable

RUN_SECONDS, MAX_DONE = 1.0, 4
"""Between two looks at trainings; and jobs that ended which are listed still."""
_PANEL = Markup("<details{}><summary>{}</summary><ul>{}</ul></details>")
_ROW = Markup(
    '<li><button type="button" class="show" data-show="{id}"><b>{name}</b><span>{how}</span></button>'
    "{cancel}</li>"
)
_CANCEL = Markup('<button type="button" class="cancel" data-cancel="{0}" aria-label="Cancel {1}">×</button>')


class QueuePanel(Panel):
    """The panel, and the looks that keep all tabs that draw up to date; made after them."""

    def __init__(self, page: Page, tabs: gr.Tabs, base: BasePanel) -> None:
        super().__init__(page, "queue")
        self._tabs, self._base, self._runs = tabs, base, (0.0, list[Run]())
        self.panel = gr.HTML(visible=False, js_on_load=ON_PRESS, elem_id="queue", elem_classes="queue")
        drawn = [widget for tab in page.drawing for widget in tab.shown]
        looked = [page.timer, base.heading, self.panel, page.seen, *drawn]
        self.on(page.timer.tick, self._look, [page.seen], looked, queue=False)
        pressed = [self.panel, page.seen, page.run, tabs]
        self.on(self.panel.click, self._press, [page.seen], pressed, queue=False)

    def _look(self, seen: Any, visitor: gr.Request) -> Updates:
        """Show what has changed since the last look."""
        page, stand = {self.panel: self._listed(visitor)}, list[Any]()
        for tab in self.page.drawing:
            job = self.page.job_of(tab, seen, visitor)
            if job is not None:
                page |= tab.standing(job)
                stand.append((job.id, job.is_done))
        is_busy = bool(self._training()) or not all(is_done for _, is_done in stand)
        page |= {self.page.timer: looks(often=is_busy), self._base.heading: self._base.said()}
        if seen.get("stand") != stand:  # what came between two looks is shown again
            seen = {tab.prefix: seen[tab.prefix] for tab in self.page.drawing if tab.prefix in seen}
        updates, now = news(page, seen)
        return {**updates, self.page.seen: {**seen, **now, "stand": stand}} if updates else {}

    def _press(self, event: gr.EventData, seen: Any, visitor: gr.Request) -> Updates:
        """Cancel a job or a training, or show it in its tab."""
        asked = told_by(event)
        wanted = str(asked.get("cancel") or asked.get("show"))
        job = next((job for job in self._jobs(visitor) if job.id == wanted), None)
        if "cancel" not in asked:
            chosen = {self.page.run: wanted} if job is None else {self.page.seen: {job.place: job.id}}
            return {**chosen, self._tabs: gr.Tabs(selected="train" if job is None else job.place)}
        if job is None:
            self.studio.runs.stop(wanted)
        else:
            job.stop.set()
        return {self.panel: self._listed(visitor)}

    def _jobs(self, visitor: gr.Request) -> list[Job]:
        return [job for job in self.studio.engine.jobs if job.owner == owner_of(visitor) and job.place]

    def _listed(self, visitor: gr.Request) -> Any:
        """Return what lists jobs that end earlier first, with when each begins and ends."""
        mine, before, rows, busy, engine = self._jobs(visitor), 0.0, Markup(""), 0, self.studio.engine
        for number, job in enumerate(job for job in engine.jobs if not job.is_done):
            if job in mine:
                words = "stopping" if job.stop.is_set() else job.state.words if job.state else "starting"
                words = f"number {number} in line{_begins(before)}" if number else words
                rows += _row(job.id, _name(job), words, can_cancel=not job.stop.is_set())
                busy += 1
            before += engine.seconds_left(job) or 0.0
        runs = self._training()
        ends = max((run.seconds_left or 0.0 for run in runs), default=0.0)
        for run in runs:
            words = f"training, step {run.step} of {run.num_steps}" if run.state == "running" else run.state
            if run.seconds_left is not None:
                words += f", about {duration(run.seconds_left)} left"
            elif run.state == "queued":
                words = f"waits to be trained{_begins(ends)}"
            rows += _row(run.id, run.name, words, can_cancel=True)
        for job in [job for job in reversed(mine) if job.is_done][:MAX_DONE]:
            kept = counted(len(job.pictures), "picture")
            words = "broke off" if job.error else f"stopped, {kept}" if job.stopped else kept
            rows += _row(job.id, _name(job), words, can_cancel=False)
        busy += len(runs)
        said = f"{counted(busy, 'job')} in work" if busy else "All jobs are done"
        opened = Markup(" open") if busy else ""
        return gr.update(value=_PANEL.format(opened, said, rows), visible=bool(rows))

    def _training(self) -> list[Run]:
        """Return the trainings that run, then those that wait, as of a moment ago."""
        if time.monotonic() - self._runs[0] > RUN_SECONDS:
            states = ("running", "starting", "queued")
            found = [run for run in reversed(self.studio.runs.all()) if run.state in states]
            self._runs = time.monotonic(), sorted(found, key=lambda run: states.index(run.state) > 1)
        return self._runs[1]


def _name(job: Job) -> str:
    is_grid = isinstance(job.request, GridRequest)
    prompt = printable(job.request.prompts[0] if is_grid else job.request.prompt, 60) or "no prompt"
    return f"Grid: {prompt}" if is_grid else prompt


def _begins(seconds: float) -> str:
    return f", begins in about {duration(seconds)}" if seconds else ""


def _row(job_id: str, name: str, how: str, *, can_cancel: bool) -> Markup:
    cancel = _CANCEL.format(job_id, name) if can_cancel else ""
    return _ROW.format(id=job_id, name=name, how=how, cancel=cancel)
