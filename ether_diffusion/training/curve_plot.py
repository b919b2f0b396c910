"""The plot of a run's evaluations: likeness to the photos, to the prompts, and drift against steps."""

from typing import Any

from ether_diffusion.metrics.plots import COLOURS, new_figure, png_of
from ether_diffusion.training.best import Curve, Score

LINE, BASE, BEST, BOUND = COLOURS["adapter"], COLOURS["base"], "#2f9e62", "#d9d9de"
TITLES = {
    "fidelity": "likeness to the photos",
    "prompt": "likeness to the prompts",
    "drift": "drift from the base on other prompts",
}
MARGIN = 0.15
"""Share of the values' range that is left free above and below."""


def draw_curve(curve: Curve) -> bytes:
    """Return a PNG: a panel for each score with its standard error, the bounds, and the best step."""
    figure = new_figure(7.2, 7.2)
    figure.suptitle(_headline(curve), fontsize="medium")
    panels = figure.subplots(len(TITLES), 1, sharex=True)
    for axes, (name, title) in zip(panels, TITLES.items(), strict=True):
        _draw_panel(axes, curve, name)
        axes.set_title(title, loc="left", fontsize="medium")
    panels[-1].set_xlabel("updates")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return png_of(figure)


def _draw_panel(axes: Any, curve: Curve, name: str) -> None:
    steps = [record.step for record in curve.records]
    scores: list[Score] = [getattr(record, name) for record in curve.records]
    means = [score.mean for score in scores]
    errors = [score.standard_error or 0.0 for score in scores]
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(steps, low, high, color=LINE, alpha=0.15, linewidth=0, label="standard error")
    axes.plot(steps, means, color=LINE, marker="o", markersize=4, label="with the adapter")
    axes.axhline(means[0], color=BASE, linestyle="--", linewidth=1, label="the base")
    bottom, top = min(low), max(high)
    room = MARGIN * ((top - bottom) or 1.0)
    axes.set_ylim(bottom - room if name != "drift" else min(0.0, bottom), top + room)
    _shade(axes, curve, name)
    best = curve.best()
    if best is not None:
        mean = getattr(best, name).mean
        axes.axvline(best.step, color=BEST, linewidth=1, alpha=0.6)
        axes.plot([best.step], [mean], "*", color=BEST, markersize=15, label="the best step", zorder=3)
        _label(axes, curve, best.step, mean)
    axes.margins(x=0.03)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shade(axes: Any, curve: Curve, name: str) -> None:
    """Shade what lies outside a bound, as far as the panel shows it."""
    bottom, top = axes.get_ylim()
    label = "out of bounds"
    if name == "drift" and curve.config.eval_max_drift < top:
        axes.axhspan(curve.config.eval_max_drift, top, color=BOUND, alpha=0.6, linewidth=0, label=label)
    if name == "prompt" and curve.least_prompt > bottom:
        axes.axhspan(bottom, curve.least_prompt, color=BOUND, alpha=0.6, linewidth=0, label=label)


def _label(axes: Any, curve: Curve, step: int, value: float) -> None:
    is_late = step > curve.records[-1].step / 2
    axes.annotate(
        f"{value:.3f}",
        (step, value),
        xytext=(-10 if is_late else 10, 8),
        textcoords="offset points",
        ha="right" if is_late else "left",
        color=BEST,
        fontweight="bold",
    )


def _headline(curve: Curve) -> str:
    best = curve.best()
    if best is None:
        return "no step keeps to the bounds" if len(curve.records) > 1 else "the base"
    return f"best at step {best.step}"
