"""The page: a heading and the tabs, and the events that tie one tab to another."""

from html import escape

import gradio as gr

from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs import compare, control, create, history, library, train
from ether_diffusion.ui.tabs.create import CreateParts
from ether_diffusion.ui.tabs.parts import TabParts
from ether_diffusion.ui.wiring import handler

TITLE = "Ether studio"
CACHE_SECONDS = (3600, 86400)
"""How often Gradio's cache is looked through, and the age at which copies in it are deleted."""


def build_app(studio: Studio) -> gr.Blocks:
    """Build the page for a studio; nothing is served yet."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS, fill_width=True) as app:
        _lay_out_heading(studio)
        with gr.Tabs(elem_id="tabs") as tabs:
            create_parts = create.build(studio)
            others: list[TabParts] = [
                compare.build(studio),
                train.build(studio),
                control.build(studio),
                library.build(studio),
                history.build(studio),
            ]
        _tie(app, tabs, create_parts, [create_parts, *others])
    return app


def _lay_out_heading(studio: Studio) -> None:
    with gr.Row(elem_classes="heading", equal_height=True):
        gr.HTML(
            f'<h1>{TITLE}</h1><p class="quiet">Base: {escape(studio.engine.base_name)}</p>', elem_id="heading"
        )
        dark = gr.Button("Dark or light", size="sm", min_width=110, scale=0, elem_id="scheme")
        dark.click(None, js="() => { window.etherStudio.switchScheme(); }", api_visibility="private")


def _tie(app: gr.Blocks, tabs: gr.Tabs, create_parts: CreateParts, all_parts: list[TabParts]) -> None:
    """Refresh tabs when they are opened and when adapters change, and bring settings to Create."""
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    changes = [change for parts in all_parts for change in parts.adapter_changes]
    for parts in all_parts:
        if parts.refresh is not None:
            function, outputs = parts.refresh.function, list(parts.refresh.outputs)
            app.load(function, None, outputs, **quiet)
            parts.tab.select(function, None, outputs, **quiet)
            for change in changes:
                change.success(function, None, outputs, **quiet)
    for parts in all_parts:
        for sending in parts.sendings:
            taken = sending.event.success(
                create_parts.take, [sending.restored], list(create_parts.taken), **quiet
            )
            taken.success(handler(_open_create), None, [tabs], **quiet)


def _open_create() -> gr.Tabs:
    return gr.Tabs(selected="create")
