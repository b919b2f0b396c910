"""What tabs are made of: fields described once, forms that the browser keeps, and what ties tabs together.

A tab's `build(page)` lays out its widgets inside `with gr.Tab(…)` and ties its events, every handler wrapped
in `ui.words.handler`. Pictures in outputs/ are returned as the paths of ours, all others as PIL images, as
adapters/ and runs/ cannot be read through the browser.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context
from gradio.events import Dependency
from markupsafe import Markup

from ether_diffusion.ui.control_images import DETECTORS
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
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.restored = studio, gr.State()
        self.sendings, self.changes = list[Dependency](), list[Dependency]()
        self.takers: dict[str, tuple[Callable[[Restored], Updates], list[Any]]] = {}
        self._refreshed: list[tuple[gr.Tab, Callable[[], Updates], list[Any]]] = []

    def refreshes(self, tab: gr.Tab, function: Callable[[], Updates], widgets: list[Any]) -> None:
        """Run a function when the page loads, when the tab is opened, and when adapters change in any tab."""
        self._refreshed.append((tab, handler(function), widgets))

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
        for tab, function, widgets in self._refreshed:
            app.load(function, None, widgets, **QUIET)
            tab.select(function, None, widgets, **QUIET)
            for change in self.changes:
                change.success(function, None, widgets, **QUIET)

        def tab_of(restored: Restored) -> str:
            return "control" if restored.followed_control else "create"

        taken = [widget for _, widgets in self.takers.values() for widget in widgets]
        for event in self.sendings:
            take = handler(lambda restored: self.takers[tab_of(restored)][0](restored))
            show = handler(lambda restored: gr.Tabs(selected=tab_of(restored)))
            filled = event.success(take, [self.restored], taken, **QUIET)
            filled.success(show, [self.restored], [tabs], **QUIET)


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
    "detector": partial(
        gr.Dropdown, choices=[(words, name) for name, words in DETECTORS.items()],
        value="", label="The upload is", visible=False,
    ),
}  # fmt: skip
"""Every field of what is drawn by the name that requests and browsers have for it.

Sliders end where they do until a picture or a kept form brings more.
"""
_NOT_KEPT = ("drawing", "upload", "detector")
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
        self._built_for, self.kept = studio.engine.base_name, Page.browser_state(prefix)

    @property
    def _begin(self) -> dict[str, Any]:
        """What the fields begin with that suit the base."""
        engine = self.studio.engine
        size = dict.fromkeys(("width", "height"), engine.native_size)
        begin = {**size, "steps": engine.default_steps, "guidance_scale": engine.default_guidance}
        return begin if self.fields is FIELDS else {}

    def __getitem__(self, name: str) -> Any:
        return self.widgets[name]

    def put(self, *names: str, **options: Any) -> None:
        """Lay out fields."""
        for name in names:
            begin = {"value": self._begin[name]} if name in self._begin else {}
            elem_id = f"{self.prefix}-{_IDS.get(name, name.replace('_', '-'))}"
            self.widgets[name] = self.fields[name](**begin, **options, elem_id=elem_id)

    def put_sampling(self) -> None:
        """Lay out steps, guidance, width and height."""
        self.put("steps", "guidance_scale")
        with gr.Row():
            self.put("width", "height")

    def put_advanced(self) -> None:
        """Lay out what few need."""
        with gr.Accordion("Advanced", open=False, elem_id=f"{self.prefix}-advanced"):
            self.put("negative_prompt", "keep_metadata")

    def all(self) -> set[Any]:
        """Return every widget."""
        return set(self.widgets.values())

    def named(self, values: Values) -> dict[str, Any]:
        """Return values by the names of their fields."""
        return {name: values[widget] for name, widget in self.widgets.items() if widget in values}

    def read(self, named: Mapping[str, Any]) -> Any:
        """Return what values by name ask for, or raise a ValueError."""
        raise NotImplementedError

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

    def fresh(self) -> Updates:
        """Return what a visitor finds who has no form yet."""
        return {} if self.studio.engine.base_name == self._built_for else self.shown(self._begin)

    def keep_in_browser(self) -> None:
        """Write the values to the browser as they change, and show them again when the page is loaded.

        Nothing is sent to the server to keep them. What comes back is whatever the browser holds: nothing is
        shown of what the form itself could not say.
        """
        names = [name for name in self.widgets if name not in _NOT_KEPT]
        widgets, listed = [self[name] for name in names], json.dumps(names)
        collect = f"""(...values) => Object.fromEntries([...{listed}.map((name, i) => [name, values[i]]),
          ["base", document.querySelector("#heading [data-base]")?.dataset.base]])"""
        changes: list[Any] = [widget.change for widget in widgets]
        gr.on(changes, None, js=collect, inputs=widgets, outputs=[self.kept], api_visibility="private")

        def can_say(named: Mapping[str, Any]) -> bool:
            try:
                self.read(named)
            except (KeyError, TypeError, ValueError, AttributeError):
                return False
            return True

        @handler
        def load(found: Any) -> Updates:
            begin = {name: self._begin.get(name, self[name].value) for name in names}
            base = self.studio.engine.base_name
            try:
                named = {name: found[name] for name in names}
            except (KeyError, TypeError):
                return self.fresh()
            if found.get("base", base) != base:  # which has other sizes
                named |= self._begin
            if not can_say(named):  # field by field: what cannot be shown begins anew
                named = {n: named[n] if can_say(begin | {n: named[n]}) else begin[n] for n in names}
            return self.shown(named) if can_say(begin) or can_say(named) else {}

        Context.root_block.load(load, [self.kept], widgets, **QUIET)


class DeleteButton:
    """A button that asks before anything is deleted; ids begin with `prefix`, and labels end with …"""

    def __init__(self, prefix: str, label: str, *, visible: bool = True) -> None:
        self.button = gr.Button(label, size="sm", visible=visible, elem_id=f"{prefix}-delete")
        with gr.Column(visible=False, elem_classes="confirm") as self.box:
            self.question = gr.HTML(elem_id=f"{prefix}-question")
            with gr.Row(elem_classes="tool-row"):
                self.now = gr.Button("Delete", variant="stop", elem_id=f"{prefix}-delete-now")
                self.keep = gr.Button("Keep it", elem_id=f"{prefix}-delete-not")

    def tie(
        self, ask: Callable[[Any], str], delete: Callable[[Any], Updates], chosen: Any, shown: Iterable[Any]
    ) -> Dependency:
        """Put what `ask` says before the visitor, and `delete` what is chosen; return the event of that."""

        def asked(value: Any) -> Updates:
            question = Markup("<p>{}</p>").format(ask(value))
            return {self.box: gr.update(visible=True), self.question: question}

        def deleted(value: Any) -> Updates:
            return {**delete(value), self.box: gr.update(visible=False)}

        self.button.click(handler(asked), [chosen], [self.box, self.question], **QUIET)
        self.keep.click(lambda: gr.update(visible=False), None, [self.box], **QUIET)
        return self.now.click(handler(deleted), [chosen], [*{*shown, self.box}], **QUIET)
