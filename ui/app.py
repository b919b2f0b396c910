"""The page: its colours and type, a heading and the tabs, and the events that tie one tab to another."""

import gradio as gr
from gradio.themes.utils import sizes
from gradio.themes.utils.colors import Color

from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.base import BasePanel
from ether_diffusion.ui.tabs.compare import CompareTab
from ether_diffusion.ui.tabs.control import ControlTab
from ether_diffusion.ui.tabs.first_page import CreateTab
from ether_diffusion.ui.tabs.history import HistoryTab
from ether_diffusion.ui.tabs.library import LibraryTab
from ether_diffusion.ui.tabs.page import Page
from ether_diffusion.ui.tabs.queue import QueuePanel
from ether_diffusion.ui.tabs.train import TrainTab

TABS = {
    "Create": CreateTab, "Compare": CompareTab, "Train": TrainTab, "Control": ControlTab,
    "Library": LibraryTab, "History": HistoryTab,
}  # fmt: skip
TITLE = "Ether studio"
CACHE_SECONDS = (3600, 86400)
"""How often Gradio's cache is looked through, and the age at which copies in it are deleted."""
_STEPS = ("c50", *(f"c{number}00" for number in range(1, 10)), "c950")
_LAGOON = "#eef8f8 #d5eeee #aedcdd #79c3c6 #45a3a8 #26868c #176b72 #14575d #13464b #10393e #072528"
_PAPER = "#fafaf8 #f3f3f0 #e6e6e1 #d3d3cd #a1a19b #6b6b66 #53534f #3c3d3b #262827 #1b1d1d #131515"
_COLOURS = {
    "body_background_fill": "*neutral_50 *neutral_950", "body_text_color": "#22252a #e9e9e4",
    "body_text_color_subdued": "#5c5d58 #a9aaa4", "background_fill_primary": "#ffffff *neutral_900",
    "background_fill_secondary": "*neutral_100 *neutral_800",
    "border_color_primary": "*neutral_200 #303332", "block_background_fill": "#ffffff *neutral_900",
    "block_border_color": "*neutral_200 #2b2e2d", "block_shadow": "none none",
    "link_text_color": "*primary_700 *primary_300", "color_accent_soft": "*primary_50 *primary_950",
    "block_label_background_fill": "#ffffff *neutral_900", "block_label_text_color": "#4a4b47 #b9bab4",
    "block_title_text_color": "#3c3d3b #d3d3cd", "block_info_text_color": "#5c5d58 #a9aaa4",
    "accordion_text_color": "#3c3d3b #d3d3cd", "input_background_fill": "*neutral_50 *neutral_950",
    "input_border_color": "*neutral_300 *neutral_700",
    "input_border_color_focus": "*primary_500 *primary_400", "input_placeholder_color": "#6b6b66 #93948e",
    "slider_color": "*primary_500 *primary_400",
    "checkbox_label_background_fill": "transparent transparent",
    "checkbox_background_color_selected": "*primary_600 *primary_500",
    "checkbox_border_color": "*neutral_400 *neutral_600",
    "button_primary_background_fill": "*primary_600 *primary_600",
    "button_primary_background_fill_hover": "*primary_700 *primary_700",
    "button_primary_text_color": "#ffffff #ffffff",
    "button_primary_border_color": "transparent transparent",
    "button_secondary_background_fill": "#ffffff *neutral_800",
    "button_secondary_background_fill_hover": "*neutral_100 *neutral_700",
    "button_secondary_border_color": "*neutral_300 *neutral_700",
    "button_cancel_background_fill": "#fff5f3 #3a1c17",
    "button_cancel_background_fill_hover": "#fde4df #4d241d",
    "button_cancel_text_color": "#9a2a17 #f5b8ab", "button_cancel_border_color": "#efb9ae #6e352b",
}  # fmt: skip
"""Of the light and the dark scheme."""
_REST = {
    "block_border_width": "1px", "block_title_text_weight": "500", "button_border_width": "1px",
    "button_large_radius": "10px", "button_large_text_weight": "600", "checkbox_label_border_width": "0px",
    "checkbox_label_padding": "4px 0", "layout_gap": "14px", "loader_color": "*primary_500",
    "input_shadow_focus": "0 0 0 2px *primary_200", "input_shadow_focus_dark": "0 0 0 2px *primary_800",
}  # fmt: skip


def build_app(studio: Studio) -> gr.Blocks:
    """Build the page for a studio; nothing is served yet."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS, fill_width=True) as app:
        page = Page(studio)
        base = BasePanel(page, app)
        with gr.Tabs(elem_id="tabs") as tabs:
            for name, tab in TABS.items():
                with gr.Tab(name, id=name.lower()):
                    tab(page, name.lower())
        QueuePanel(page, tabs, base)
        page.tie(app, tabs)
    return app


def studio_theme() -> gr.themes.Base:
    """Return the theme; every text stands on its ground with a contrast of 4.5 or more."""
    accent = Color(name="lagoon", **dict(zip(_STEPS, _LAGOON.split(), strict=True)))
    theme = gr.themes.Base(
        primary_hue=accent,
        secondary_hue=accent,
        neutral_hue=Color(name="paper", **dict(zip(_STEPS, _PAPER.split(), strict=True))),
        radius_size=sizes.radius_lg,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        font=("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"),
    )
    theme.name = "ether-studio"
    light = {name: pair.split()[0] for name, pair in _COLOURS.items()}
    dark = {f"{name}_dark": pair.split()[1] for name, pair in _COLOURS.items()}
    return theme.set(**light, **dark, **_REST)
