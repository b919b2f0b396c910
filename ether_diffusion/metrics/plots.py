"""Figures drawn off the screen, as PNG bytes; that of a report among them."""

import io
import warnings
from importlib.util import find_spec
from typing import Any

from ether_diffusion.metrics.report import Report
from ether_diffusion.wording import printable

COLOURS = {"photos": "#9a9aa0", "base": "#5b8ff9", "adapter": "#e8684a", "generated": "#e8684a"}
_LABEL_CHARACTERS = 42
_BAR_WIDTH = 0.26


def check_plotting() -> None:
    """Raise ValueError if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "a plot needs matplotlib, which is not installed; pip install 'ether-diffusion[evaluate]'"
        )


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of so many inches, as long as `check_plotting` has no objection."""
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    file = io.BytesIO()
    with warnings.catch_warnings():  # a script that the font has not is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def draw_report(report: Report) -> bytes:
    """Return a PNG: a bar for every score with its standard error, and prompt by prompt the first score."""
    prompts = list(dict.fromkeys(prompt for scores in report.rows.values() for prompt in scores.by_prompt))
    num_panels = 2 if prompts else 1
    figure = new_figure(6 * num_panels, max(3.6, 1.2 + 0.3 * len(prompts)))
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    _draw_bars(panels[0], report)
    if prompts:
        _draw_prompts(panels[1], report, prompts)
    if report.drift:
        drift = ", ".join(f"{name} {found.mean:.3f}" for name, found in report.drift.items())
        figure.suptitle(f"drift from the base on other prompts: {drift}", fontsize="medium")
    return png_of(figure)


def _draw_bars(axes: Any, report: Report) -> None:
    columns = report.columns
    for number, (row, scores) in enumerate(report.rows.items()):
        shift = (number - (len(report.rows) - 1) / 2) * _BAR_WIDTH
        there = [place for place, column in enumerate(columns) if column in scores.columns]
        found = [scores.columns[columns[place]] for place in there]
        axes.bar(
            [place + shift for place in there],
            [each.mean for each in found],
            _BAR_WIDTH,
            yerr=[each.standard_error or 0.0 for each in found],
            capsize=3,
            label=row,
            color=COLOURS.get(row),
        )
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title("means and standard errors")
    axes.legend()


def _draw_prompts(axes: Any, report: Report, prompts: list[str]) -> None:
    column = report.columns[0]
    for row, scores in report.rows.items():
        there = [place for place, prompt in enumerate(prompts) if prompt in scores.by_prompt]
        values = [scores.by_prompt[prompts[place]][column] for place in there]
        if there:
            axes.plot(values, there, "o", label=row, color=COLOURS.get(row))
    axes.set_yticks(range(len(prompts)), [printable(prompt, _LABEL_CHARACTERS) for prompt in prompts])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a prompt may have dollars
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"{column}, prompt by prompt")
    axes.legend()
