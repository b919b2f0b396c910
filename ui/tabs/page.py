"""What tabs are made of: parts of the page, questions before something is done, and what ties tabs together.

A tab lays itself out inside `with gr.Tab(…)`. Pictures in outputs/ are returned as the
paths of ours, all others as PIL images, as adapters/ and runs/ cannot be read through the browser.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.blocks import BlockContext
from gradio.components import Component
from gradio.context import Context
from gradio.events import Dependency
from gradio.layouts import Form as Frame
from markupsafe import Markup

from ether_diffusion.ui.jobs import Job
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.words import handler

QUIET: Mapping[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of events that no script asks for and that take no time."""
OFTEN: Mapping[str, Any] = {"trigger_mode": "always_last", "queue": False}
"""Of events that come one after the other, of which the last counts."""
Updates = dict[Component, Any]
"""What a handler gives each widget: a value or gr.update(…); Gradio types neither."""
Values = Mapping[Component, Any]
EMPTY = '<div class="empty"><p>{}</p></div>'
SAVE_AS = """(file) => { if (!file) return; const link = document.createElement("a");
  link.href = file.url; link.download = file.orig_name; link.click(); }"""
ON_PRESS = """element.addEventListener("click", (event) => {
  const pressed = event.target.closest("button");
  if (pressed) trigger("click", { ...pressed.dataset });
});"""
"""Of HTML that has buttons: tells what the one that was pressed carries."""
ON_SLIDE = """element.addEventListener("input", ({ target }) => {
  target.closest(".pair").style.setProperty("--at", `${target.value}%`);
});"""
_PAIR = Markup(
    '<div class="pair"><img src="{}" alt="By the base"><img src="{}" alt="{beside}">'
    '<input type="range" aria-label="How much of the base is shown, in %"></div>'
    '<div class="sides"><span>Base</span><span>{beside}</span></div>'
)
_ALONE = Markup('<div class="pair alone"><img src="{}" alt="{beside}"></div>')
SECONDS, IDLE_SECONDS = 0.5, 3.0
"""Between two looks at what is in work, and at whether anything is."""
_SECRET = "kept in this browser only"
"""Gradio encrypts what it keeps under a key that it sends to the page; it must not change between servers."""
LOOK: Mapping[str, Any] = {
    "label": "Picture", "show_label": False, "format": "png", "type": "filepath", "buttons": ["fullscreen"],
    "interactive": False, "elem_classes": "picture",
}  # fmt: skip
"""Of the widgets that show a picture."""


def looks(*, often: bool) -> Any:
    """Return the update of a timer whose looks show what is in work, or whether anything is."""
    return gr.update(value=SECONDS if often else IDLE_SECONDS)


class Page:
    """The page while it is built: tabs tell of events, which are tied together when all tabs are there.

    Attributes:
        restored: holds the `Restored` that a visitor wants to draw with, after one of the `sendings`.
        changes: events after which the list of adapters is another.
        drawing: the tabs that draw, whose forms begin anew when another base is opened.
        seen: what the last look at a visitor's jobs has shown; {} has the next one show everything.
        timer: of these looks, which are seldom where nothing is in work: each costs the page and the server.
        run: the id of the training that is on show.
    """

    run: gr.BrowserState

    def __init__(self, studio: Studio) -> None:
        self.studio, self.restored, self.seen = studio, gr.State(), gr.State({})
        self.timer = gr.Timer(SECONDS)
        self.sendings, self.changes, self.drawing = list[Dependency](), list[Dependency](), list[Any]()

    def job_of(self, tab: Any, seen: Any, visitor: gr.Request) -> Job | None:
        """Return the job of a visitor that a tab shows: the chosen one, the one in work, or the last."""
        jobs = [j for j in self.studio.engine.jobs if j.owner == owner_of(visitor) and j.place == tab.prefix]
        chosen = [job for job in jobs if isinstance(seen, dict) and job.id == seen.get(tab.prefix)]
        return next(iter([*chosen, *(job for job in jobs if not job.is_done), *reversed(jobs)]), None)

    @staticmethod
    def browser_state(name: str, default: Any = None) -> gr.BrowserState:
        """Return a value that the browser keeps, outside the tabs: a closed one's are not there yet."""
        inside = Context.block
        Context.block = Context.root_block
        try:
            return gr.BrowserState(default, storage_key=f"ether-studio-{name}", secret=_SECRET)
        finally:
            Context.block = inside

    def tie(self, app: gr.Blocks, tabs: gr.Tabs) -> None:
        """Tie the events that tabs told of: drawing tabs offer the adapters of now, and take what is sent."""
        for tab in self.drawing:
            loaded = tab.on(app.load, tab.refresh, None, tab.offered)
            tab.form.restore_offered(loaded.success)  # which shows nothing of what is not offered yet
            for event in (tab.block.select, *(change.success for change in self.changes)):
                tab.on(event, tab.refresh, None, tab.offered)
        for change in self.changes:
            change.success(lambda: self.begin_anew(app), None, None, **QUIET)
        self.begin_anew(app)
        takers = {tab.prefix: tab for tab in self.drawing if tab.prefix in ("create", "control")}
        taken = [widget for tab in takers.values() for widget in tab.widgets]

        def tab_of(restored: Restored) -> str:
            return "control" if restored.followed_control else "create"

        for sending in self.sendings:
            take = handler(lambda restored: takers[tab_of(restored)].take(restored))
            show = handler(lambda restored: gr.Tabs(selected=tab_of(restored)))
            filled = sending.success(take, [self.restored], taken, **QUIET)
            filled.success(show, [self.restored], [tabs], **QUIET)

    def begin_anew(self, app: gr.Blocks) -> None:
        """Have pages that are loaded from now on begin with the base and the adapters of now."""
        for tab in self.drawing:
            tab.form.begin()
        app.config = app.get_config_file()


class Panel:
    """A part of the page, made inside the block that it fills; ids of its widgets begin with `prefix`.

    Its handlers give values to any widget that stands in the block, and to those `elsewhere`.
    """

    def __init__(self, page: Page, prefix: str) -> None:
        self.page, self.studio, self.prefix = page, page.studio, prefix
        self.block: Any = Context.block
        self.elsewhere: list[Any] = []

    @property
    def widgets(self) -> list[Any]:
        """Everything that its handlers may give values to, once it was laid out."""
        return [*all_in(self.block), *self.elsewhere]

    def on(
        self, events: Any, function: Callable[..., Any], inputs: Any = None, outputs: Any = None, **how: Any
    ) -> Dependency:
        """Run a handler on events and give its values to the widgets of the panel, or to `outputs` alone."""
        given = self.widgets if outputs is None else outputs
        tie = partial(gr.on, events) if isinstance(events, Sequence) else events
        tied: Dependency = tie(handler(function), inputs, given, **{**QUIET, **how})
        return tied

    def on_load(self, function: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> Dependency:
        """Run a handler when the page is loaded."""
        return self.on(Context.root_block.load, function, inputs, outputs)

    def downloads(self, button: gr.Button, write: Callable[..., Any], inputs: Any) -> None:
        """Have the browser save the file that `write` makes when a button is pressed."""
        file, told = gr.DownloadButton(visible="hidden"), {"show_progress": "minimal"}
        written = self.on(button.click, write, inputs, [file], show_progress_on=[button], **told)
        written.success(None, [file], None, js=SAVE_AS, api_visibility="private")

    def sends(self, event: Any, function: Callable[..., Restored], inputs: Any) -> Dependency:
        """Have what a function returns on an event taken by the tab that draws it."""
        sending = self.on(event, function, inputs, [self.page.restored])
        self.page.sendings.append(sending)
        return sending

    def closes(self, button: gr.Button, block: Any) -> None:
        """Have a button hide a block."""
        button.click(lambda: gr.update(visible=False), None, [block], **QUIET)

    def kept(self, name: str, default: Any = None) -> gr.BrowserState:
        """Return a value that the browser keeps."""
        self.elsewhere.append(state := Page.browser_state(name, default))
        return state

    def button(self, name: str, label: str, **look: Any) -> gr.Button:
        """Lay out a button."""
        return gr.Button(label, elem_id=f"{self.prefix}-{name}", **look)

    def html(self, name: str, value: str = "", **look: Any) -> gr.HTML:
        """Lay out HTML."""
        return gr.HTML(value, elem_id=f"{self.prefix}-{name}", **look)


def all_in(block: Any) -> list[Any]:
    """Return everything that stands in a block and can be given a value or shown, at any depth.

    Gradio makes each output of an event anew for the visitor, whether or not it changes.
    """
    found = list[Any]()
    for child in block.children:
        is_frame = isinstance(child, Frame | gr.Timer | gr.Group) or (
            isinstance(child, gr.Row) and child.visible
        )
        found += [] if is_frame else [child]
        found += all_in(child) if isinstance(child, BlockContext) else []
    return found


def told_by(event: gr.EventData) -> dict[str, Any]:
    """Return what HTML of ours told with an event; a script may send anything."""
    return event._data if isinstance(event._data, dict) else {}


def owner_of(visitor: gr.Request) -> str:
    """Return what names a visitor's browser, which ui/page.js has made up, or else the page or script."""
    cookies: Mapping[str, str] = getattr(visitor, "cookies", None) or {}
    return cookies.get("ether-studio") or visitor.session_hash or ""


def pair_html(addresses: Sequence[str], beside: str) -> Markup:
    """Return a picture of the base with another over it that a slider uncovers, or the only one."""
    pair = _PAIR if len(addresses) == 2 else _ALONE
    return pair.format(*addresses, beside=beside) if addresses else Markup("")


def news(page: Mapping[Any, Any], seen: Mapping[str, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return the updates that are others than those seen last, and what stands for all of them now."""
    now = {str(widget._id): hash(repr(update)) for widget, update in page.items()}
    return {w: each for w, each in page.items() if now[str(w._id)] != seen.get(str(w._id))}, now


class Question:
    """What is asked before something is done that costs time or cannot be undone; ids begin with `prefix`."""

    def __init__(self, prefix: str, yes: str, no: str = "Not now", *, variant: Any = "primary") -> None:
        with gr.Column(visible=False, elem_classes="confirm") as self.box:
            self.question = gr.HTML(elem_id=f"{prefix}-question")
            with gr.Row(elem_classes="tool-row"):
                self.now = gr.Button(yes, variant=variant, elem_id=f"{prefix}-now")
                keep = gr.Button(no, elem_id=f"{prefix}-not")
        self.shown: list[Any] = [self.box, self.question]
        keep.click(lambda: gr.update(visible=False), None, [self.box], **QUIET)

    def ask(self, question: str) -> Updates:
        """Put a question before the visitor."""
        return {self.box: gr.update(visible=True), self.question: Markup("<p>{}</p>").format(question)}

    def hide(self) -> Updates:
        """Ask nothing."""
        return {self.box: gr.update(visible=False)}


class DeleteButton(Question):
    """A button that asks before anything is deleted; ids begin with `prefix`, and labels end with …"""

    def __init__(self, prefix: str, label: str, *, visible: bool = True) -> None:
        self.button = gr.Button(label, size="sm", visible=visible, elem_id=f"{prefix}-delete")
        super().__init__(f"{prefix}-delete", "Delete", "Keep it", variant="stop")

    def tie(
        self, panel: Panel, ask: Callable[[Any], str], delete: Callable[[Any], Updates], chosen: Any
    ) -> Dependency:
        """Put what `ask` says before the visitor, and `delete` what is chosen; return the event of that."""
        panel.on(self.button.click, lambda value: self.ask(ask(value)), [chosen])
        return panel.on(self.now.click, lambda value: {**delete(value), **self.hide()}, [chosen])
