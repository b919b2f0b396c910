"""The colours and type of the studio: system fonts, one accent, a light and a dark scheme."""

import gradio as gr
from gradio.themes.utils import sizes
from gradio.themes.utils.colors import Color

ACCENT = Color(
    name="lagoon",
    c50="#eef8f8",
    c100="#d5eeee",
    c200="#aedcdd",
    c300="#79c3c6",
    c400="#45a3a8",
    c500="#26868c",
    c600="#176b72",
    c700="#14575d",
    c800="#13464b",
    c900="#10393e",
    c950="#072528",
)
PAPER = Color(
    name="paper",
    c50="#fafaf8",
    c100="#f3f3f0",
    c200="#e6e6e1",
    c300="#d3d3cd",
    c400="#a1a19b",
    c500="#6b6b66",
    c600="#53534f",
    c700="#3c3d3b",
    c800="#262827",
    c900="#1b1d1d",
    c950="#131515",
)


def studio_theme() -> gr.themes.Base:
    """Return the theme; every text stands on its ground with a contrast of 4.5 or more."""
    theme = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=PAPER,
        radius_size=sizes.radius_lg,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        font=("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"),
    )
    theme.name = "ether-studio"
    return theme.set(**_GROUNDS, **_LABELS, **_INPUTS, **_BUTTONS)


_GROUNDS = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color": "#22252a",
    "body_text_color_dark": "#e9e9e4",
    "body_text_color_subdued": "#5c5d58",
    "body_text_color_subdued_dark": "#a9aaa4",
    "background_fill_primary": "#ffffff",
    "background_fill_primary_dark": "*neutral_900",
    "background_fill_secondary": "*neutral_100",
    "background_fill_secondary_dark": "*neutral_800",
    "border_color_primary": "*neutral_200",
    "border_color_primary_dark": "#303332",
    "block_background_fill": "#ffffff",
    "block_background_fill_dark": "*neutral_900",
    "block_border_width": "1px",
    "block_border_color": "*neutral_200",
    "block_border_color_dark": "#2b2e2d",
    "block_shadow": "none",
    "block_shadow_dark": "none",
    "link_text_color": "*primary_700",
    "link_text_color_dark": "*primary_300",
    "color_accent_soft": "*primary_50",
    "color_accent_soft_dark": "*primary_950",
    "loader_color": "*primary_500",
    "layout_gap": "14px",
}
_LABELS = {
    "block_label_background_fill": "#ffffff",
    "block_label_background_fill_dark": "*neutral_900",
    "block_label_text_color": "#4a4b47",
    "block_label_text_color_dark": "#b9bab4",
    "block_title_text_color": "#3c3d3b",
    "block_title_text_color_dark": "#d3d3cd",
    "block_title_text_weight": "500",
    "block_info_text_color": "#5c5d58",
    "block_info_text_color_dark": "#a9aaa4",
    "accordion_text_color": "#3c3d3b",
    "accordion_text_color_dark": "#d3d3cd",
}
_INPUTS = {
    "input_background_fill": "*neutral_50",
    "input_background_fill_dark": "*neutral_950",
    "input_border_color": "*neutral_300",
    "input_border_color_dark": "*neutral_700",
    "input_border_color_focus": "*primary_500",
    "input_border_color_focus_dark": "*primary_400",
    "input_placeholder_color": "#6b6b66",
    "input_placeholder_color_dark": "#93948e",
    "input_shadow_focus": "0 0 0 2px *primary_200",
    "input_shadow_focus_dark": "0 0 0 2px *primary_800",
    "slider_color": "*primary_500",
    "slider_color_dark": "*primary_400",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_dark": "transparent",
    "checkbox_label_border_width": "0px",
    "checkbox_label_padding": "4px 0",
    "checkbox_background_color_selected": "*primary_600",
    "checkbox_background_color_selected_dark": "*primary_500",
    "checkbox_border_color": "*neutral_400",
    "checkbox_border_color_dark": "*neutral_600",
}
_BUTTONS = {
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_dark": "*primary_600",
    "button_primary_background_fill_hover_dark": "*primary_700",
    "button_primary_text_color": "#ffffff",
    "button_primary_text_color_dark": "#ffffff",
    "button_secondary_background_fill": "#ffffff",
    "button_secondary_background_fill_hover": "*neutral_100",
    "button_secondary_background_fill_dark": "*neutral_800",
    "button_secondary_background_fill_hover_dark": "*neutral_700",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "*neutral_700",
    "button_border_width": "1px",
    "button_primary_border_color": "transparent",
    "button_primary_border_color_dark": "transparent",
    "button_cancel_background_fill": "#fff5f3",
    "button_cancel_background_fill_hover": "#fde4df",
    "button_cancel_background_fill_dark": "#3a1c17",
    "button_cancel_background_fill_hover_dark": "#4d241d",
    "button_cancel_text_color": "#9a2a17",
    "button_cancel_text_color_dark": "#f5b8ab",
    "button_cancel_border_color": "#efb9ae",
    "button_cancel_border_color_dark": "#6e352b",
    "button_large_radius": "10px",
    "button_large_text_weight": "600",
}
