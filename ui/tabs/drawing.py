"""Tabs that draw: what is asked for becomes a job of the server, and every look shows how it stands."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup

from ether_diffusion.ui.jobs import Job, Working
from ether_diffusion.ui.tabs.form import OFFERED
from ether_diffusion.ui.tabs.page import (
    OFTEN,
    QUIET,
    Page,
    Panel,
    Question,
    Updates,
    Values,
    all_in,
    looks,
    owner_of,
)
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


class DrawingTab(Panel):
    """A tab that draws what its form says; made inside a gr.Tab.

    Looks while drawing are in the status: a widget mounted anew at every step makes the page lose updates.
    """

    first, go_label, has_looks = "prompt", "Generate", True
    """The field beside the button, what stands on that, and whether one looks at what is being drawn."""
    make_form: type[Any]  # of the form
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
    refresh: Callable[[], Updates]  # what shows the adapters there are

    def __init__(self, page: Page, prefix: str) -> None:
        super().__init__(page, prefix)
        form = self.form = self.make_form(page.studio, prefix)
        with gr.Row(elem_classes="prompt-row", equal_height=True):
            form.put(self.first)
            with gr.Column(scale=1, min_width=150, elem_classes="go-column"):
                self.go = self.button("go", self.go_label, variant="primary")
                self.stop = self.button("stop", "Stop", variant="stop", visible=False)
        self.cost = self.html("cost")
        self.sure, self.asked = Question(f"{self.prefix}-draw", "Draw it"), gr.State()
        self.lay_out_head()
        with gr.Row(elem_classes="create-columns"):
            with gr.Column(scale=2, min_width=300, elem_classes="settings"):
                self.lay_out_settings()
            with gr.Column(scale=3, min_width=300, elem_classes="results") as self.results:
                self.lay_out_results()
        self.tie()
        self.on(self.stop.click, self._stop, [page.seen], [self.stop], queue=False)
        self.on_load(self._recall, [self.last], self.shown)
        changes: list[Any] = [Context.root_block.load, *(widget.change for widget in form.widgets.values())]
        self.on(changes, self._say_cost, form.plain(), [self.cost], preprocess=False, **OFTEN)
        form.keep_in_browser()
        page.drawing.append(self)
        form.begin()

    @property
    def shown(self) -> list[Any]:
        """What shows how a job stands."""
        return [self.stop, *all_in(self.results), *self.elsewhere]

    @property
    def offered(self) -> list[Any]:
        """What shows the adapters there are."""
        return [self.form[name] for name in OFFERED if name in self.form.widgets]

    def start(self, events: Sequence[Any], **draw: Any) -> None:
        """Draw on events."""
        gr.on(events, **draw)

    def told_of(self, told: Sequence[Any]) -> list[Any]:
        """Return what `begin` gives values to; a look that sees the job comes after all of it."""
        return [self.stop, self.asked, *self.sure.shown, *told, self.page.timer, self.page.seen]

    def draws_on(self, events: Sequence[Any], begun: Sequence[Any]) -> None:
        """Draw on events what the form says; `begun` gives values to these."""
        told, how = self.told_of(begun), {"validator": self._check, "trigger_mode": "multiple"}
        self.start(events, fn=handler(self._draw), inputs=self.form.all(), outputs=told, **how, **_RAW)
        self.on(self.sure.now.click, self.begin, [self.asked], told)

    def standing(self, job: Job) -> Updates:
        """Return what shows how a job stands."""
        stop = {"visible": not job.is_done, "interactive": not job.stop.is_set()}
        updates = {self.stop: gr.update(value="Stopping …" if job.stop.is_set() else "Stop", **stop)}
        updates |= self.drawn(job)
        if job.is_done and not job.error:
            told = self.studio.doubts(job.request.sampling().prompts, job.request.adapters)
            notes = notes_html("Good to know", told := [*told, *job.notes])
            return updates | {self.notes: gr.update(value=notes, visible=bool(told)), **self.ended(job)}
        if job.is_done:
            status = notes_html("The drawing broke off", [job.error], kind="warning")
        else:
            state = job.state or Working("Starting …")
            status = progress_html(state.done, state.words)
            if self.has_looks and state.image is not None:
                status += _LOOK.format(picture_address(state.image, "WEBP", quality=80))
        return updates | {
            self.status: gr.update(value=status, visible=True),
            self.notes: gr.update(visible=False),
        }

    def _check(self, values: Values) -> Updates:
        """Say at its field what is wrong with the form, in our words."""
        fields, wrong, said = self.form.widgets, None, ""
        try:
            self.form.asked(self.form.named(values))
        except ValueError as error:
            wrong, said = fields.get(re.split(r"[.\s]", str(error), maxsplit=1)[0]), sentence(error)
        return {widget: gr.validate(widget is not wrong, said) for widget in fields.values()}

    def _draw(self, values: Values, visitor: gr.Request) -> Updates:
        """Begin a job, which goes on whoever looks; one that takes long begins when the visitor is sure."""
        request, cost = self.form.read(self.form.named(values)), self.studio.engine.cost
        sampling = request.sampling()
        cost.check(sampling)
        seconds = cost.seconds(sampling) or cost.least_seconds(sampling)
        if seconds > SURE_SECONDS:
            question = f"This takes about {duration(seconds)} on this machine. Draw it?"
            return {self.asked: request, **self.sure.ask(question)}
        return self.begin(request, visitor)

    def begin(self, request: Any, visitor: gr.Request) -> Updates:
        """Begin a job of a visitor."""
        self.studio.engine.start(request, owner=owner_of(visitor), place=self.prefix)
        stop = gr.update(visible=True, value="Stop", interactive=True)
        look = {self.page.timer: looks(often=True), self.page.seen: {}}
        return {**look, self.stop: stop, **self.sure.hide(), **self.begun(request)}

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
        except (
            TypeError,
            ValueError,
            LookupError,
            FileNotFoundError,
        ):  # from elsewhere, or deleted meanwhile
            return {}
