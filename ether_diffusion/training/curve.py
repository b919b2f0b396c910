"""The curve of an evaluated run: which step is the best, when it is good enough to stop, and how it looks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ether_diffusion.metrics.report import COLOURS, new_figure, png_of
from ether_diffusion.training.config import EvaluationConfig

MEASURES = {
    "fidelity": "likeness to the photos",
    "prompt": "likeness to the prompts",
    "drift": "drift from the base on other prompts",
}
Scores = Mapping[str, Sequence[float]]
"""Picture by picture, in one order at every step: likenesses to the photos and to the own prompt (cosines).

Drift is the distance (1 - cosine) from the base's picture of the same prompt and seed, in units of the mean
distance between the base's pictures of different prompts.
"""


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of independent values and its standard error, None where there is one value."""
    error = None if len(values) < 2 else stdev(values) / math.sqrt(len(values))
    return {"mean": fmean(values), "standard_error": error}


@dataclass(frozen=True)
class Record:
    """What was measured after so many updates; step 0 is the base, whatever the adapter begins with."""

    step: int
    scores: Scores

    def mean(self, measure: str) -> float:
        """Return the mean over pictures."""
        return fmean(self.scores[measure])

    def estimates(self) -> dict[str, dict[str, float | None]]:
        """Return each measure's mean and standard error."""
        return {name: estimate(values) for name, values in self.scores.items()}

    def rises_above(self, before: "Record") -> bool:
        """Say whether fidelity gained more than the standard error of the gain, picture by picture."""
        pairs = zip(self.scores["fidelity"], before.scores["fidelity"], strict=True)
        gain = estimate([now - then for now, then in pairs])
        return (gain["mean"] or 0.0) > (gain["standard_error"] or 0.0)


class Stop(NamedTuple):
    """Where a run is good, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Curve:
    """All evaluations of a run, the base first, then by step, and what its settings make of them."""

    records: tuple[Record, ...]
    config: EvaluationConfig

    @property
    def least_prompt(self) -> float:
        """The likeness to prompts below which a step is no candidate."""
        base = self.records[0].mean("prompt")
        return base - self.config.eval_max_prompt_loss * abs(base)

    def is_candidate(self, record: Record) -> bool:
        """Say whether a step keeps to the bounds; the base is none."""
        is_near = record.mean("drift") <= self.config.eval_max_drift
        return record.step > 0 and is_near and record.mean("prompt") >= self.least_prompt

    def best(self) -> Record | None:
        """Return the candidate of the highest fidelity, the earliest of equal ones."""
        candidates = filter(self.is_candidate, self.records)
        return max(candidates, key=lambda record: record.mean("fidelity"), default=None)

    def stop(self) -> Stop | None:
        """Return where the run became good: a candidate rose above the base, and nothing above it since.

        To rise is to gain more than the standard error of the gain, over the same prompts and seeds. The
        run is good after eval_patience evaluations without a rise.
        """
        base = mark = self.records[0]
        waited = 0
        for record in self.records[1:]:
            if self.is_candidate(record) and record.rises_above(mark):
                mark, waited = record, 0
            elif mark is not base:
                waited += 1
            if waited == self.config.eval_patience:
                rise = f"{base.mean('fidelity'):.3f} to {mark.mean('fidelity'):.3f} at step {mark.step}"
                since = "evaluation" if waited == 1 else f"{waited} evaluations"
                reason = f"fidelity rose from the base's {rise} and by no more than its standard error in"
                return Stop(record.step, f"{reason} the {since} since")
        return None


BEST, BOUND = "#2f9e62", "#d9d9de"
MARGIN = 0.15
"""Share of the values' range that is left free above and below."""


def draw_curve(curve: Curve) -> bytes:
    """Return a PNG: a panel for each score with its standard error, the bounds, and the best step."""
    figure, best = new_figure(7.2, 7.2), curve.best()
    headline = "the base" if len(curve.records) == 1 else "no step keeps to the bounds"
    figure.suptitle(headline if best is None else f"best at step {best.step}", fontsize="medium")
    panels = figure.subplots(len(MEASURES), 1, sharex=True)
    for axes, (name, title) in zip(panels, MEASURES.items(), strict=True):
        _draw_panel(axes, curve, name)
        axes.set_title(title, loc="left", fontsize="medium")
    panels[-1].set_xlabel("updates")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return png_of(figure)


def _draw_panel(axes: Any, curve: Curve, name: str) -> None:
    line, steps = COLOURS["adapter"], [record.step for record in curve.records]
    means = [record.mean(name) for record in curve.records]
    errors = [estimate(record.scores[name])["standard_error"] or 0.0 for record in curve.records]
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(steps, low, high, color=line, alpha=0.15, linewidth=0, label="standard error")
    axes.plot(steps, means, color=line, marker="o", markersize=4, label="with the adapter")
    axes.axhline(means[0], color=COLOURS["base"], linestyle="--", linewidth=1, label="the base")
    bottom, top = min(low), max(high)
    room = MARGIN * ((top - bottom) or 1.0)
    bottom, top = bottom - room if name != "drift" else min(0.0, bottom), top + room
    axes.set_ylim(bottom, top)
    forbidden = {"drift": (curve.config.eval_max_drift, top), "prompt": (bottom, curve.least_prompt)}
    begin, end = forbidden.get(name, (0.0, 0.0))
    if begin < end:
        axes.axhspan(begin, end, color=BOUND, alpha=0.6, linewidth=0, label="out of bounds")
    if (best := curve.best()) is not None:
        step, mean = best.step, best.mean(name)
        axes.axvline(step, color=BEST, linewidth=1, alpha=0.6)
        axes.plot([step], [mean], "*", color=BEST, markersize=15, label="the best step", zorder=3)
        place = (
            {"ha": "right", "xytext": (-10, 8)} if step > steps[-1] / 2 else {"ha": "left", "xytext": (10, 8)}
        )
        place |= {"textcoords": "offset points", "color": BEST, "fontweight": "bold"}
        axes.annotate(f"{mean:.3f}", (step, mean), **place)
    axes.margins(x=0.03)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
