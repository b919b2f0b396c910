"""Keeping a form in the browser: it survives a reload and a restart of the server."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.context import Context

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.tabs.parts import Updates

_SECRET = "kept in this browser only"
"""Gradio encrypts what it keeps under a key that it sends to the page; it must not change between servers."""


def browser_state(name: str, default: Any = None) -> gr.BrowserState:
    """Return a value that the browser keeps, outside the tabs: what is in a closed one is not there yet."""
    inside = Context.block
    Context.block = Context.root_block
    try:
        return gr.BrowserState(default, storage_key=f"ether-studio-{name}", secret=_SECRET)
    finally:
        Context.block = inside


def keep_in_browser(
    name: str,
    widgets: Mapping[str, Component],
    restore: Callable[[Mapping[str, Any]], Updates],
) -> None:
    """Write the values of widgets to the browser as they change, and give them to `restore` on loading.

    Nothing is sent to the server to keep them. What comes back is whatever the browser holds: `restore` must
    check it.
    """
    kept = browser_state(name)
    names = json.dumps(list(widgets))
    gr.on(
        [widget.change for widget in widgets.values()],
        None,
        js=f"(...values) => Object.fromEntries({names}.map((name, index) => [name, values[index]]))",
        inputs=list(widgets.values()),
        outputs=[kept],
        api_visibility="private",
    )

    @handler
    def load(found: object) -> Updates:
        return restore(found) if isinstance(found, dict) else {}

    Context.root_block.load(
        load, [kept], list(widgets.values()), api_visibility="private", show_progress="hidden"
    )
