"""What one tab shows the others, so that ui/app.py alone ties them together.

A tab is a module with `build(studio) -> TabParts`: inside `with gr.Tab("Name", id="name") as tab` it lays out
its widgets and ties its own events, every handler wrapped in `ui.errors.handler`. Nothing else knows its
widgets. Pictures in outputs/ are returned as the paths of ours, all others as PIL images: adapters/ and runs/
cannot be read through the browser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency
from markupsafe import Markup

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.restore import Restored

SMALL = 256
"""Pictures of fewer pixels a side are shown with their pixels sharp."""
QUIET: Mapping[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of events that no script asks for and that take no time."""
Update = Any
"""What a handler gives a widget: a value or gr.update(…); Gradio types neither."""
Updates = dict[Component, Update]


@dataclass(frozen=True)
class Refresh:
    """A handler without inputs that brings widgets up to date with the folder."""

    function: Callable[[], Updates]
    outputs: Sequence[Component]


@dataclass(frozen=True)
class Sending:
    """An event after which `restored` holds a `Restored` that the visitor wants to draw with."""

    event: Dependency
    restored: gr.State


@dataclass(frozen=True)
class TabParts:
    """One tab, as the others see it.

    Attributes:
        refresh: run when the page loads, when the tab is opened, and when adapters change in any tab.
        sendings: what brings the visitor to Create or Control with settings filled in.
        adapter_changes: events after which the list of adapters is another.
    """

    tab: gr.Tab
    refresh: Refresh | None = None
    sendings: Sequence[Sending] = field(default=())
    adapter_changes: Sequence[Dependency] = field(default=())


@dataclass(frozen=True)
class TakingParts(TabParts):
    """A tab that others send settings to.

    Attributes:
        take: a handler from a Restored to updates of `taken`.
    """

    take: Callable[[Restored], Updates] = field(kw_only=True)
    taken: Sequence[Component] = field(kw_only=True)


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
        self,
        ask: Callable[[Any], str],
        delete: Callable[[Any], Updates],
        chosen: Component,
        shown: Sequence[Component],
    ) -> Dependency:
        """Put what `ask` says before the visitor, and `delete` what is chosen; return the event of that."""

        def asked(value: Any) -> tuple[Update, str]:
            return gr.update(visible=True), Markup("<p>{}</p>").format(ask(value))

        def deleted(value: Any) -> dict[Any, Update]:
            return {**delete(value), self.box: gr.update(visible=False)}

        hidden = gr.update(visible=False)
        self.button.click(handler(asked), [chosen], [self.box, self.question], **QUIET)
        self.keep.click(lambda: hidden, None, [self.box], **QUIET)
        return self.now.click(handler(deleted), [chosen], [*{*shown, self.box}], **QUIET)
