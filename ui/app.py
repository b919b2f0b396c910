"""The page: a heading and the tabs, and the events that tie one tab to another."""

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from ether_diffusion.ui.errors import handler
from ether_diffusion.ui.restore import Restored
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs import compare, control, create, history, library, train
from ether_diffusion.ui.tabs.parts import TabParts, TakingParts, Updates

TITLE = "Ether studio"
CACHE_SECONDS = (3600, 86400)
"""How often Gradio's cache is looked through, and the age at which copies in it are deleted."""
QUIET: Mapping[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build_app(studio: Studio) -> gr.Blocks:
    """Build the page for a studio; nothing is served yet."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS, fill_width=True) as app:
        _lay_out_heading(studio)
        with gr.Tabs(elem_id="tabs") as tabs:
            create_parts = create.build(studio)
            drawing: list[TabParts] = [create_parts, compare.build(studio), train.build(studio)]
            control_parts = control.build(studio)
            keeping: list[TabParts] = [library.build(studio), history.build(studio)]
        _refresh(app, [*drawing, control_parts, *keeping])
        _send([*drawing, *keeping], tabs, create_parts, control_parts)
    return app


def _lay_out_heading(studio: Studio) -> None:
    with gr.Row(elem_classes="heading", equal_height=True):
        gr.HTML(
            f'<h1>{TITLE}</h1><p class="quiet">Base: {escape(studio.engine.base_name)}</p>', elem_id="heading"
        )
        dark = gr.Button("Dark or light", size="sm", min_width=110, scale=0, elem_id="scheme")
        dark.click(None, js="() => { window.etherStudio.switchScheme(); }", api_visibility="private")


def _refresh(app: gr.Blocks, all_parts: list[TabParts]) -> None:
    """Refresh tabs when the page loads, when they are opened, and when adapters change."""
    changes = [change for parts in all_parts for change in parts.adapter_changes]
    for parts in all_parts:
        if parts.refresh is not None:
            function, outputs = parts.refresh.function, list(parts.refresh.outputs)
            app.load(function, None, outputs, **QUIET)
            parts.tab.select(function, None, outputs, **QUIET)
            for change in changes:
                change.success(function, None, outputs, **QUIET)


def _send(all_parts: list[TabParts], tabs: gr.Tabs, create: TakingParts, control: TakingParts) -> None:
    """Bring settings to Create, or to Control where a control image was followed."""

    def take(restored: Restored) -> Updates:
        return (control if restored.followed_control else create).take(restored)

    def show(restored: Restored) -> gr.Tabs:
        return gr.Tabs(selected="control" if restored.followed_control else "create")

    for parts in all_parts:
        for sending in parts.sendings:
            outputs = [*create.taken, *control.taken]
            taken = sending.event.success(handler(take), [sending.restored], outputs, **QUIET)
            taken.success(handler(show), [sending.restored], [tabs], **QUIET)
