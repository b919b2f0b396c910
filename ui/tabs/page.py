"""What tabs are made of: fields described once, forms that the browser keeps, and what ties tabs together.

A tab's `build(page)` lays out its widgets inside `with gr.Tab(…)` and ties its events, every handler wrapped
in `ui.words.handler`. Pictures in outputs/ are returned as the paths of ours, all others as PIL images, as
adapters/ and runs/ cannot be read through the browser.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context
from gradio.events import Dependency
from markupsafe import Markup

from ether_diffusion.ui.control_images import DETECTORS
from ether_diffusion.ui.jobs import Job
from ether_diffusion.ui.requests import MAX_ADAPTERS, MAX_PROMPT, MAX_TEXT, NUM_IMAGES
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.words import handler

QUIET: Mapping[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of events that no script asks for and that take no time."""
Updates = dict[Component, Any]
"""What a handler gives each widget: a value or gr.update(…); Gradio types neither."""
Values = Mapping[Component, Any]
Field = Callable[..., Any]
EMPTY = '<div class="empty"><p>{}</p></div>'
DRAW, UPLOAD = "Draw", "Upload"
SAVE_AS = """(file) => { if (!file) return; const link = document.createElement("a");
  link.href = file.url; link.download = file.orig_name; link.click(); }"""
ON_SLIDE = """element.addEventListener("input", ({ target }) => {
  target.closest(".pair").style.setProperty("--at", `${target.value}%`);
});"""
_PAIR = Markup(
    '<div class="pair"><img src="{}" alt="By the base"><img src="{}" alt="{beside}">'
    '<input type="range" aria-label="How much of the base is shown, in %"></div>'
    '<div class="sides"><span>Base</span><span>{beside}</span></div>'
)
_ALONE = Markup('<div class="pair alone"><img src="{}" alt="{beside}"></div>')
_SECRET = "kept in this browser only"
"""Gradio encrypts what it keeps under a key that it sends to the page; it must not change between servers."""
LOOK: Mapping[str, Any] = {
    "label": "Picture", "show_label": False, "format": "png", "type": "filepath", "buttons": ["fullscreen"],
    "interactive": False, "elem_classes": "picture",
}  # fmt: skip
"""Of the widgets that show a picture."""


class Page:
    """The page while it is built: tabs tell of events, which are tied together when all tabs are there.

    Attributes:
        restored: holds the `Restored` that a visitor wants to draw with, after one of the `sendings`.
        changes: events after which the list of adapters is another.
        takers: what fills a tab by what is sent to it, with the widgets, by the tab's id.
        forms: all of them, which begin anew when another base is opened.
        drawing: the tabs that show how jobs stand.
        seen: what the last look at a visitor's jobs has shown; {} has the next one show everything.
        run: the id of the training that is on show.
    """

    run: gr.BrowserState

    def __init__(self, studio: Studio) -> None:
        self.studio, self.restored, self.seen = studio, gr.State(), gr.State({})
        self.forms, self.drawing = list[Form](), list[Any]()
        self.sendings, self.changes = list[Dependency](), list[Dependency]()
        self.takers: dict[str, tuple[Callable[[Restored], Updates], list[Any]]] = {}
        self._refreshed: list[tuple[gr.Tab, Callable[[], Updates], list[Any], Form]] = []

    def refreshes(
        self, tab: gr.Tab, function: Callable[[], Updates], widgets: list[Any], form: "Form"
    ) -> None:
        """Run a function when the page loads, when the tab is opened, and when adapters change in any tab."""
        self._refreshed.append((tab, handler(function), widgets, form))

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

    @staticmethod
    def thumbnails(elem_id: str, label: str = "Pictures", columns: int = 4) -> gr.Gallery:
        """Lay out small pictures to choose from."""
        return gr.Gallery(
            visible=False, label=label, show_label=False, format="png", columns=columns, height="auto",
            buttons=[], allow_preview=False, interactive=False, object_fit="cover", elem_id=elem_id,
        )  # fmt: skip

    def tie(self, app: gr.Blocks, tabs: gr.Tabs) -> None:
        """Tie the events that tabs told of."""
        for tab, function, widgets, form in self._refreshed:
            loaded = app.load(function, None, widgets, **QUIET)
            offered = [name for name in _OFFERED if name in form.widgets]
            form.restore(loaded.success, offered)  # which shows nothing of what is not offered yet
            tab.select(function, None, widgets, **QUIET)
            for change in self.changes:
                change.success(function, None, widgets, **QUIET)
        for change in self.changes:
            change.success(lambda: self.begin_anew(app), None, None, **QUIET)
        self.begin_anew(app)

        def tab_of(restored: Restored) -> str:
            return "control" if restored.followed_control else "create"

        taken = [widget for _, widgets in self.takers.values() for widget in widgets]
        for event in self.sendings:
            take = handler(lambda restored: self.takers[tab_of(restored)][0](restored))
            show = handler(lambda restored: gr.Tabs(selected=tab_of(restored)))
            filled = event.success(take, [self.restored], taken, **QUIET)
            filled.success(show, [self.restored], [tabs], **QUIET)

    def begin_anew(self, app: gr.Blocks) -> None:
        """Have pages that are loaded from now on begin with the base and the adapters of now."""
        for form in self.forms:
            form.begin()
        app.config = app.get_config_file()


def owner_of(visitor: gr.Request) -> str:
    """Return what names a visitor's browser, which ui/page.js has made up, or else the page or script."""
    cookies: Mapping[str, str] = getattr(visitor, "cookies", None) or {}
    return cookies.get("ether-studio") or visitor.session_hash or ""


def pair_html(addresses: Sequence[str], beside: str) -> Markup:
    """Return a picture of the base with another over it that a slider uncovers, or the only one."""
    return (
        (_PAIR if len(addresses) == 2 else _ALONE).format(*addresses, beside=beside)
        if addresses
        else Markup("")
    )


STRENGTH: dict[str, Any] = {"minimum": 0, "maximum": 2, "value": 1.0, "step": 0.05}
STRENGTHS = [f"strength_{index}" for index in range(MAX_ADAPTERS)]
FIELDS: dict[str, Field] = {
    "prompt": partial(
        gr.Textbox, label="Prompt", placeholder="What should be in the picture?", lines=2, max_lines=8,
        max_length=MAX_PROMPT, autofocus=True, scale=5,
    ),
    "prompts": partial(
        gr.Textbox, label="Prompts", placeholder="One on each line", lines=2, max_lines=12,
        max_length=20 * MAX_PROMPT, scale=5,
    ),
    "adapters": partial(gr.Dropdown, choices=[], value=[], multiselect=True, max_choices=MAX_ADAPTERS),
    **{name: partial(gr.Slider, **STRENGTH, label=f"Strength {index}", visible=False)
       for index, name in enumerate(STRENGTHS, 1)},
    "strengths": partial(
        gr.Textbox, value="0.5, 1", label="Strengths", info="1 is as trained.", max_length=MAX_TEXT
    ),
    "with_base": partial(gr.Checkbox, value=True, label="A column of the base"),
    "seeds": partial(
        gr.Textbox, value="0-1", label="Seeds", info="Numbers or ranges: 0-3, 7", max_length=MAX_TEXT
    ),
    "seed": partial(gr.Number, value=0, label="Seed", min_width=110, scale=3),
    "new_seed": partial(gr.Checkbox, value=True, label="New seed each time"),
    "num_images": partial(gr.Slider, minimum=1, maximum=NUM_IMAGES.most, value=1, step=1, label="Pictures"),
    "steps": partial(gr.Slider, minimum=1, maximum=150, step=1, label="Steps"),
    "guidance_scale": partial(gr.Slider, minimum=0, maximum=20, step=0.1, label="Guidance"),
    "unconditional_strength": partial(
        gr.Slider, **STRENGTH, label="Strength in the unconditional half of guidance", info="0 is the base's."
    ),
    # what can be drawn is said in our words, which name the field
    "width": partial(gr.Number, label="Width in px", step=8, min_width=100),
    "height": partial(gr.Number, label="Height in px", step=8, min_width=100),
    "compare_with_base": partial(gr.Checkbox, value=True, label="Show the base beside it"),
    "negative_prompt": partial(
        gr.Textbox, value="", label="Negative prompt",
        info="What the picture should not show.", lines=2, max_length=MAX_PROMPT,
    ),
    "keep_metadata": partial(
        gr.Checkbox, value=True, label="Write the settings into the picture",
        info="So that it can be made again. Without them it tells nobody how it was made.",
    ),
    "adapter": partial(
        gr.Dropdown, choices=[], value=None, label="Control adapter", info="It follows the control image."
    ),
    "control_strength": partial(gr.Slider, **STRENGTH, label="Strength of the control image"),
    "adapter_strength": partial(gr.Slider, **STRENGTH, label="Strength of its adapter"),
    "source": partial(gr.Radio, choices=[DRAW, UPLOAD], value=DRAW, label="Control image"),
    "drawing": partial(gr.Textbox, visible="hidden", show_label=False, container=False),
    "upload": partial(
        gr.File, label="Control image or photo", visible=False, height=104,
        elem_classes="drop",
    ),
    "start_picture": partial(
        gr.File, label="Picture", file_types=["image"], height=104, elem_classes="drop"
    ),
    "start_strength": partial(
        gr.Slider, minimum=0.05, maximum=1, value=0.6, step=0.05, label="How far from it",
        info="0.3 keeps its shapes, 1 nothing of it.",
    ),
    "start_mask": partial(gr.Textbox, value="", visible="hidden", show_label=False, container=False),
    "detector": partial(
        gr.Dropdown, choices=[(words, name) for name, words in DETECTORS.items()],
        value="", label="The upload is", visible=False,
    ),
}  # fmt: skip
"""Every field of what is drawn by the name that requests and browsers have for it.

Sliders end where they do until a picture or a kept form brings more.
"""
_NOT_KEPT = ("drawing", "upload", "detector", "start_picture", "start_mask")
_OFFERED = ("adapters", "adapter")
_IDS = {
    "with_base": "base", "guidance_scale": "guidance", "compare_with_base": "compare",
    "negative_prompt": "negative", "keep_metadata": "metadata",
}  # fmt: skip
"""Of fields that go by another name in the page than in requests."""


class Form:
    """The fields of a tab; their ids in the page begin with `prefix`."""

    kinds: tuple[str, ...] = ("subject",)  # of adapters that are offered

    def __init__(self, studio: Studio, prefix: str, fields: Mapping[str, Field] = FIELDS) -> None:
        self.studio, self.prefix, self.fields = studio, prefix, fields
        self.widgets: dict[str, Any] = {}
        self.kept = Page.browser_state(prefix)

    @property
    def _begin(self) -> dict[str, Any]:
        """What the fields begin with that suit the base."""
        engine = self.studio.engine
        size = dict.fromkeys(("width", "height"), engine.native_size)
        begin = {**size, "steps": engine.default_steps, "guidance_scale": engine.default_guidance}
        return begin if self.fields is FIELDS else {}

    def begin(self) -> None:
        """Have the fields hold what a visitor finds who has no form yet."""
        for name, value in self._begin.items():
            self[name].value = value
        for side in {"width", "height"} & self.widgets.keys():
            self[side].info = f"Up to {self.studio.engine.cost.largest_side} here."

    def __getitem__(self, name: str) -> Any:
        return self.widgets[name]

    def put(self, *names: str, **options: Any) -> None:
        """Lay out fields."""
        for name in names:
            elem_id = f"{self.prefix}-{_IDS.get(name, name.replace('_', '-'))}"
            self.widgets[name] = self.fields[name](**options, elem_id=elem_id)

    def put_sampling(self) -> None:
        """Lay out steps, guidance, width and height."""
        self.put("steps", "guidance_scale")
        with gr.Row():
            self.put("width", "height")

    def put_advanced(self) -> None:
        """Lay out what few need."""
        with gr.Accordion("Advanced", open=False, elem_id=f"{self.prefix}-advanced"):
            self.put("negative_prompt", "unconditional_strength", "keep_metadata")

    def all(self) -> set[Any]:
        """Return every widget."""
        return set(self.widgets.values())

    def named(self, values: Values) -> dict[str, Any]:
        """Return values by the names of their fields."""
        return {name: values[widget] for name, widget in self.widgets.items() if widget in values}

    def asked(self, named: Mapping[str, Any]) -> Any:
        """Return what values by name ask for, but for what was uploaded or drawn, or raise a ValueError."""
        raise NotImplementedError

    def read(self, named: Mapping[str, Any]) -> Any:
        """Return what all values by name ask for, or raise a ValueError."""
        return self.asked(named)

    def plain(self) -> set[Any]:
        """Return the widgets of what is neither uploaded nor drawn."""
        return {widget for name, widget in self.widgets.items() if name not in _NOT_KEPT}

    def names(self, *kinds: str) -> dict[str, str]:
        """Return the adapters that can be chosen, of kinds or of those of the form, id to name."""
        cards, kinds = self.studio.library.cards(), kinds or self.kinds
        return {card.id: card.name for card in cards if card.fits_base and card.kind in kinds}

    def offer(self, *kinds: str, **value: Any) -> Any:
        """Return the update of a dropdown that offers adapters."""
        return gr.update(choices=[(name, each) for each, name in self.names(*kinds).items()], **value)

    def show(self, name: str, value: Any) -> Any:
        """Return the update that shows a value; a number is never empty, which a closed tab shows as 0."""
        widget = self[name]
        if isinstance(widget, gr.Slider):
            least, most = min(widget.minimum, value), max(widget.maximum, value)
            return gr.update(value=value, minimum=least, maximum=most)
        return value or self._begin.get(name, 0) if isinstance(widget, gr.Number) else value

    def shown(self, named: Mapping[str, Any]) -> Updates:
        """Return the updates that show values by name."""
        return {self[name]: self.show(name, value) for name, value in named.items()}

    def keep_in_browser(self) -> None:
        """Write the values to the browser as they change, which shows them again when the page is loaded.

        Nothing is sent to the server, and no field is filled that the visitor has touched before.
        """
        names = [name for name in self.widgets if name not in _NOT_KEPT]
        widgets, listed = [self[name] for name in names], json.dumps(names)
        collect = f"""(...values) => Object.fromEntries([...{listed}.map((name, i) => [name, values[i]]),
          ["base", document.querySelector("#heading [data-base]")?.dataset.base]])"""
        changes: list[Any] = [widget.change for widget in widgets]
        gr.on(changes, None, js=collect, inputs=widgets, outputs=[self.kept], api_visibility="private")
        self.restore(Context.root_block.load, [name for name in names if name not in _OFFERED])

    def restore(self, event: Any, names: Sequence[str]) -> None:
        """Show on an event what the browser has kept."""
        limits = ("value", "minimum", "maximum", "step")
        fields = [
            {"name": name, "id": self[name].elem_id, "is_of_base": name in self._begin,
             **{limit: getattr(self[name], limit, None) for limit in limits}}
            for name in names
        ]  # fmt: skip
        restore = f"""async (kept) => {{
          while (!window.etherStudio) await new Promise(requestAnimationFrame);
          return window.etherStudio.restore({json.dumps(self.prefix)}, kept, {json.dumps(fields)}); }}"""
        event(None, [self.kept], [self[name] for name in names], js=restore, api_visibility="private")


class Question:
    """What is asked before something is done that costs time or cannot be undone; ids begin with `prefix`."""

    def __init__(self, prefix: str, yes: str, no: str = "Not now", *, variant: str = "primary") -> None:
        with gr.Column(visible=False, elem_classes="confirm") as self.box:
            self.question = gr.HTML(elem_id=f"{prefix}-question")
            with gr.Row(elem_classes="tool-row"):
                self.now = gr.Button(yes, variant=variant, elem_id=f"{prefix}-now")
                self.keep = gr.Button(no, elem_id=f"{prefix}-not")
        self.shown: list[Any] = [self.box, self.question]
        self.keep.click(lambda: gr.update(visible=False), None, [self.box], **QUIET)

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
        self, ask: Callable[[Any], str], delete: Callable[[Any], Updates], chosen: Any, shown: Iterable[Any]
    ) -> Dependency:
        """Put what `ask` says before the visitor, and `delete` what is chosen; return the event of that."""
        self.button.click(handler(lambda value: self.ask(ask(value))), [chosen], self.shown, **QUIET)
        deleted = handler(lambda value: {**delete(value), **self.hide()})
        return self.now.click(deleted, [chosen], [*{*shown, self.box}], **QUIET)
