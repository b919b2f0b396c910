"""The plot of a study of learning rates."""

import io
from collections.abc import Mapping
from typing import Any

from ether_diffusion.evaluation.learning_rates import FIDELITY
from ether_diffusion.evaluation.likeness import Estimate
from ether_diffusion.evaluation.plot import DOTS_PER_INCH, check_plotting

PANELS = {
    FIDELITY: "likeness to the photos",
    "tiny_t": "likeness to the prompt",
    "weight_distance": "distance of the weights, ‖W' − W‖ / ‖W‖",
    "transform_distance": "distance of the transform, ‖T − I‖",
}


def draw_study(summary: Mapping[str, Mapping[float, Mapping[str, Estimate]]]) -> bytes:
    """Return a PNG with a curve for each method of a `summarise`d study.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(PANELS), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _draw_curves(axes, summary, name)
        axes.set_title(title)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return file.getvalue()


def _draw_curves(axes: Any, summary: Mapping[str, Mapping[float, Mapping[str, Estimate]]], name: str) -> None:
    for method, rates in summary.items():
        there = {rate: scores[name] for rate, scores in rates.items() if name in scores}
        axes.errorbar(
            list(there),
            [found.mean for found in there.values()],
            yerr=[found.standard_error or 0.0 for found in there.values()],
            marker="o",
            capsize=3,
            label=method,
        )
    axes.set_xscale("log")
    if name.endswith("_distance"):
        axes.set_yscale("log")
    axes.set_xlabel("learning rate")
    axes.legend()
