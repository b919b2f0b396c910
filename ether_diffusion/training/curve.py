"""The curve of an evaluated run: which step is the best, when it is good enough to stop, and how it looks."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from ether_diffusion.metrics.plots import COLOURS, new_figure, png_of
from ether_diffusion.training.config import EvaluationConfig


@dataclass(frozen=True)
class Measured:
    """Scores picture by picture, in one order at every step.

    `fidelity` is likeness to the photos and `prompt` likeness to the own prompt (cosines). `drift` is the
    distance (1 - cosine) from the base's picture of the same prompt and seed, in units of the mean distance
    between the base's pictures of different prompts.
    """

    fidelity: tuple[float, ...]
    prompt: tuple[float, ...]
    drift: tuple[float, ...]


@dataclass(frozen=True)
class Score:
    """A mean and its standard error over pictures; None where there is one picture."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Return the mean of values that are independent of each other."""
        error = None if len(values) < 2 else stdev(values) / math.sqrt(len(values))
        return cls(fmean(values), error)


@dataclass(frozen=True)
class Record:
    """What was measured after so many updates; step 0 is the base, whatever the adapter begins with."""

    step: int
    measured: Measured

    @property
    def scores(self) -> dict[str, Score]:
        """The mean of each measure."""
        return {name: Score.of(values) for name, values in asdict(self.measured).items()}

    @property
    def fidelity(self) -> Score:
        """Likeness to the photos."""
        return Score.of(self.measured.fidelity)

    @property
    def prompt(self) -> Score:
        """Likeness to the prompts."""
        return Score.of(self.measured.prompt)

    @property
    def drift(self) -> Score:
        """Distance from the base on prompts without the subject."""
        return Score.of(self.measured.drift)


@dataclass(frozen=True)
class Stop:
    """Where a run is good, and why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Curve:
    """All evaluations of a run, the base first, then by step, and what its settings make of them."""

    records: tuple[Record, ...]
    config: EvaluationConfig

    @property
    def base(self) -> Record:
        """What the base scores."""
        return self.records[0]

    @property
    def least_prompt(self) -> float:
        """The likeness to prompts below which a step is no candidate."""
        base = self.base.prompt.mean
        return base - self.config.eval_max_prompt_loss * abs(base)

    def is_candidate(self, record: Record) -> bool:
        """Say whether a step keeps to the bounds; the base is none."""
        return (
            record.step > 0
            and record.drift.mean <= self.config.eval_max_drift
            and record.prompt.mean >= self.least_prompt
        )

    def best(self) -> Record | None:
        """Return the candidate of the highest fidelity, the earliest of equal ones."""
        candidates = [record for record in self.records if self.is_candidate(record)]
        return max(candidates, key=lambda record: record.fidelity.mean, default=None)

    def stop(self) -> Stop | None:
        """Return where the run became good: a candidate rose above the base, and nothing above it since.

        To rise is to gain more than the standard error of the gain, over the same prompts and seeds. The
        run is good after eval_patience evaluations without a rise.
        """
        mark, waited = self.base, 0
        for record in self.records[1:]:
            if self.is_candidate(record) and _rises(mark, record):
                mark, waited = record, 0
            elif mark is not self.base:
                waited += 1
            if waited == self.config.eval_patience:
                return Stop(record.step, self._reason(mark, waited))
        return None

    def _reason(self, mark: Record, waited: int) -> str:
        gain = (
            f"fidelity rose from the base's {self.base.fidelity.mean:.3f} to {mark.fidelity.mean:.3f} at step"
        )
        evaluations = "evaluation" if waited == 1 else f"{waited} evaluations"
        return f"{gain} {mark.step} and by no more than its standard error in the {evaluations} since"


def _rises(before: Record, after: Record) -> bool:
    """Say whether fidelity gained more than the standard error of the gain, picture by picture."""
    pairs = zip(after.measured.fidelity, before.measured.fidelity, strict=True)
    gain = Score.of([now - then for now, then in pairs])
    return gain.mean > (gain.standard_error or 0.0)


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
