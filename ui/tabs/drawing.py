"""Tabs that draw: what is asked for becomes a job of the server, and every look shows how it stands."""

import re
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup

from ether_diffusion.ui.jobs import Job, Working
from ether_diffusion.ui.tabs.page import QUIET, Form, Page, Question, Updates, Values, owner_of
from ether_diffusion.ui.words import (
    duration,
    handler,
    notes_html,
    picture_address,
    progress_html,
    quiet_html,
    sentence,
)

SURE_SECONDS = 120.0  # of a job, beyond which the visitor is asked first
_RAW = {**QUIET, "preprocess": False}  # Gradio refuses in words of its own, which name no field
_LOOK = Markup('<div class="look"><img alt="How the picture looks by now" src="{}"></div>')


class DrawingTab:
    """A tab that draws what its form says; made inside a gr.Tab.

    Looks while drawing are in the status: a widget mounted anew at every step makes the page lose updates.
    """

    first, go_label, has_looks = "prompt", "Generate", True
    """The field beside the button, what stands on that, and whether one looks at what is being drawn."""
    nothing: str  # what is said where there is nothing to see the cost of
    status: gr.HTML
    notes: gr.HTML
    last: gr.BrowserState  # what `recall` needs when the server knows of no job any more
    # what stands between the prompt and the columns; the form's rest; `status`, what is drawn and `notes`
    lay_out_head: Callable[[], None]
    lay_out_settings: Callable[[], None]
    lay_out_results: Callable[[], None]
    tie: Callable[[], None]
    begun: Callable[[Any], Updates]  # what the form shows of a request that was taken
    drawn: Callable[[Job], Updates]  # what shows the pictures of a job, done or not
    ended: Callable[[Job], Updates]  # what is said of the end of a job
    recall: Callable[[Any], Updates]
    shows: list[Any]  # what `drawn` and `ended` give values to

    def __init__(self, page: Page, form: Form) -> None:
        self.page, self.form, self.studio, self.prefix = page, form, page.studio, form.prefix
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            form.put(self.first)
            with gr.Column(scale=1, min_width=150, elem_classes="go-column"):
                self.go = gr.Button(self.go_label, variant="primary", elem_id=f"{self.prefix}-go")
                self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id=f"{self.prefix}-stop")
        self.cost = gr.HTML(elem_id=f"{self.prefix}-cost")
        self.sure = Question(f"{self.prefix}-draw", "Draw it")
        self.lay_out_head()
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.lay_out_settings()
            with gr.Column(scale=3, min_width=300, elem_classes="results"):
                self.lay_out_results()
        self.shown: list[Any] = [self.stop, self.status, self.notes, *self.shows]
        self.tie()
        self.stop.click(handler(self._stop), [page.seen], [self.stop], queue=False, **QUIET)
        Context.root_block.load(handler(self._recall), [self.last], self.shown, **QUIET)
        changes: list[Any] = [widget.change for widget in form.widgets.values()]
        often: dict[str, Any] = {"trigger_mode": "always_last", "queue": False, **_RAW}
        gr.on(
            [*changes, Context.root_block.load], handler(self._say_cost), form.plain(), [self.cost], **often
        )
        form.keep_in_browser()
        page.drawing.append(self)
        page.forms.append(form)
        form.begin()

    def start(self, events: list[Any], **draw: Any) -> None:
        """Draw on events."""
        gr.on(events, **draw)

    def draws_on(self, events: list[Any], told: list[Any]) -> None:
        """Draw on events; `told` is what `begun` gives values to."""
        outputs, fields = [self.page.seen, self.stop, *self.sure.shown, *told], self.form.all()
        given: dict[str, Any] = {"inputs": fields, "outputs": outputs, "trigger_mode": "multiple", **_RAW}
        self.start(events, fn=handler(self._draw), validator=self._check, **given)
        self.start([self.sure.now.click], fn=handler(self._draw_surely), **given)

    def standing(self, job: Job) -> Updates:
        """Return what shows how a job stands."""
        stop = {"visible": not job.is_done, "interactive": not job.stop.is_set()}
        updates: Updates = {self.stop: gr.update(value="Stopping …" if job.stop.is_set() else "Stop", **stop)}
        if not job.is_done:
            state = job.state or Working("Starting …")
            status = progress_html(state.done, state.words)
            if self.has_looks and state.image is not None:
                status += _LOOK.format(picture_address(state.image, "WEBP", quality=80))
            said = {self.status: gr.update(value=status, visible=True), self.notes: gr.update(visible=False)}
        elif job.error:
            status = notes_html("The drawing broke off", [job.error], kind="warning")
            said = {self.status: gr.update(value=status, visible=True), self.notes: gr.update(visible=False)}
        else:
            prompts = job.request.sampling().prompts
            told = [*self.studio.doubts(prompts, job.request.adapters), *job.notes]
            notes = gr.update(value=notes_html("Good to know", told), visible=bool(told))
            said = {self.notes: notes, **self.ended(job)}
        return updates | self.drawn(job) | said

    def _check(self, values: Values) -> Updates:
        """Say at its field what is wrong with the form, in our words."""
        try:
            self.form.asked(self.form.named(values))
        except ValueError as error:
            name, found = re.split(r"[.\s]", str(error), maxsplit=1)[0], self.form.widgets
            if name in found:
                return {
                    widget: gr.validate(widget is not found[name], sentence(error))
                    for widget in found.values()
                }
        return {widget: gr.validate(True, "") for widget in self.form.widgets.values()}

    def _draw(self, values: Values, visitor: gr.Request) -> Updates:
        """Begin a job, which goes on whoever looks; one that takes long begins when the visitor is sure."""
        request, cost = self.form.read(self.form.named(values)), self.studio.engine.cost
        sampling = request.sampling()
        cost.check(sampling)
        seconds = cost.seconds(sampling) or cost.least_seconds(sampling)
        if seconds > SURE_SECONDS:
            return self.sure.ask(f"This takes about {duration(seconds)} on this machine. Draw it?")
        return self._begin(request, visitor)

    def _draw_surely(self, values: Values, visitor: gr.Request) -> Updates:
        return self._begin(self.form.read(self.form.named(values)), visitor)

    def _begin(self, request: Any, visitor: gr.Request) -> Updates:
        self.studio.engine.start(request, owner=owner_of(visitor), place=self.prefix)
        stop = gr.update(visible=True, value="Stop", interactive=True)
        return {self.page.seen: {}, self.stop: stop, **self.sure.hide(), **self.begun(request)}

    def _stop(self, seen: Any, visitor: gr.Request) -> Updates:
        job = self.page.job_of(self, seen, visitor)
        if job is not None:
            job.stop.set()
        return {self.stop: gr.update(value="Stopping …", interactive=False)}

    def _say_cost(self, values: Values) -> Updates:
        """Say what the form would cost, or why it cannot be drawn."""
        named, cost = self.form.named(values), self.studio.engine.cost
        if not (named[self.first] or "").strip():
            return {self.cost: quiet_html(self.nothing)}
        try:
            sampling = self.form.asked(named).sampling()
            cost.check(sampling)
            return {self.cost: quiet_html(cost.words(sampling))}
        except ValueError as error:
            return {self.cost: notes_html(sentence(error), kind="warning")}

    def _recall(self, last: Any, visitor: gr.Request) -> Updates:
        """Show what was drawn last where the server, started again since, knows of no job of the visitor."""
        if not last or self.page.job_of(self, {}, visitor) is not None:
            return {}
        try:
            return self.recall(last)
        except (TypeError, ValueError, KeyError, AttributeError):  # from elsewhere, or deleted meanwhile
            return {}
