"""The plot of a study of learning rates."""

from collections.abc import Mapping
from typing import Any

from ether_diffusion.evaluation.benchmark.summary import LABELS
from ether_diffusion.evaluation.columns import PROMPT, RECOGNISED
from ether_diffusion.evaluation.figures import new_figure, png_of
from ether_diffusion.evaluation.likeness import Estimate
from research.subject_scores import FIDELITY

PANELS = {
    FIDELITY: "likeness to the true pictures",
    PROMPT: "likeness to the prompt",
    RECOGNISED: "share recognised as the subject",
    "drift": "drift on prompts without the subject",
    "weight_distance": "distance of the weights, ‖W' − W‖ / ‖W‖",
    "transform_distance": "distance of the transform, ‖T − I‖",
}
NUM_ROWS = 2


def draw_study(
    summary: Mapping[str, Mapping[float, Mapping[str, Estimate]]], base: Mapping[str, float]
) -> bytes:
    """Return a PNG with a curve for each method of a `summarise`d study, and a line for what the base scores.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(15, 8)
    panels = figure.subplots(NUM_ROWS, len(PANELS) // NUM_ROWS).flat
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        if name in base:
            axes.axhline(base[name], color="black", linestyle="--", linewidth=1, label=LABELS["base"])
        _draw_curves(axes, summary, name)
        axes.set_title(title)
        axes.set_xlabel("learning rate")
        axes.grid(alpha=0.3)
        if name == FIDELITY:
            figure.legend(loc="outside lower center", ncols=len(summary) + 1)
    return png_of(figure)


def _draw_curves(axes: Any, summary: Mapping[str, Mapping[float, Mapping[str, Estimate]]], name: str) -> None:
    axes.set_xscale("log")
    if name.endswith("_distance"):
        axes.set_yscale("log")
    for place, (method, rates) in enumerate(summary.items()):
        there = {rate: scores[name] for rate, scores in rates.items() if name in scores}
        axes.errorbar(
            list(there),
            [found.mean for found in there.values()],
            yerr=[found.standard_error or 0.0 for found in there.values()],
            color=f"C{place}",
            marker="o",
            markersize=4,
            capsize=3,
            label=LABELS.get(method, method),
        )
