"""What an evaluation found: pictures scored by row, as JSON, as a table and as a figure."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from ether_diffusion.metrics.control_scores import (
    PALETTE,
    ControlPair,
    ControlYardsticks,
    expected_classes,
    score_control,
)
from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.metrics.lpips import Lpips
from ether_diffusion.metrics.scores import (
    Estimate,
    PhotoReference,
    Sample,
    Scores,
    SortedSamples,
    score_drift,
    score_photos,
    score_samples,
    sort_samples,
)
from ether_diffusion.strict_json import Json
from ether_diffusion.wording import listed, printable

FORMAT_VERSION = 1
ROWS = ("base", "adapter")
OTHER = "other"


@dataclass(frozen=True)
class Report:
    """Scores by row ("photos", "base", "adapter" or "generated"), and how they were come by.

    `settings` are what was drawn or read, `encoders` where each came from, `drift` the adapter's from the
    base on prompts without the subject. `set_aside` says by row, then name, what is wrong with pictures that
    were not scored, "other" of those without the subject; `left_out` why a score is not there, by column.
    """

    settings: Mapping[str, Json]
    encoders: Mapping[str, str]
    rows: Mapping[str, Scores]
    drift: Mapping[str, Estimate]
    set_aside: Mapping[str, Mapping[str, str]]
    left_out: Mapping[str, str]

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order they were found."""
        return list(dict.fromkeys(name for scores in self.rows.values() for name in scores.columns))

    def reasons(self) -> dict[str, str]:
        """Return why scores are not there, by column: for all rows, or for one."""
        reasons = [self.left_out, *(scores.left_out for scores in self.rows.values())]
        return {column: reason for each in reasons for column, reason in each.items()}

    def to_json(self) -> dict[str, Json]:
        """Return it as an object for JSON."""
        rows = {row: asdict(scores) for row, scores in self.rows.items()}
        return {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "encoders": dict(self.encoders),
            "scores": {row: found["columns"] for row, found in rows.items()},
            "sets": {row: found["sets"] for row, found in rows.items() if found["sets"]},
            "by_prompt": {row: found["by_prompt"] for row, found in rows.items() if found["by_prompt"]},
            "drift": {name: asdict(found) for name, found in self.drift.items()},
            "set_aside": {row: dict(found) for row, found in self.set_aside.items() if found},
            "left_out": dict(self.reasons()),
        }

    def table(self) -> str:
        """Return it as lines: a row for each kind of picture, then drift, and what is not in it."""
        rows = [
            [row, *(str(scores.columns.get(column, "-")) for column in self.columns)]
            for row, scores in self.rows.items()
        ]
        lines = aligned([["", *self.columns], *rows])
        for row, scores in self.rows.items():
            if scores.sets:
                sets = (f"{name} {value:.4g}" for name, value in scores.sets.items())
                lines.append(f"{row}: {', '.join(sets)}")
        if self.drift:
            drift = ", ".join(f"{name} {value}" for name, value in self.drift.items())
            lines.append(f"drift from the base on other prompts: {drift}")
        for row, aside in self.set_aside.items():
            if aside:
                lines.append(f"not scored of {row}: {listed(' '.join(each) for each in aside.items())}")
        lines += [f"{name} is left out: {reason}" for name, reason in self.reasons().items()]
        return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines with equal columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


@dataclass(frozen=True)
class Yardsticks:
    """What pictures are measured with; `left_out` says of what there is not, by column, why."""

    encoders: Sequence[Encoder]
    lpips: Lpips | None
    identifier: str | None
    left_out: Mapping[str, str]


def report_subject(
    photos: SortedSamples,
    rows: Mapping[str, SortedSamples],
    yardsticks: Yardsticks,
    settings: Mapping[str, Json],
    *,
    other: Mapping[str, Sequence[Sample]] | None = None,
) -> Report:
    """Score rows of pictures against a subject's photos; `other` are those of prompts without the subject.

    These are on equal seeds by ROWS, and say how far the adapter drifts from the base.
    """
    encoders, lpips, identifier = yardsticks.encoders, yardsticks.lpips, yardsticks.identifier
    aside = {"photos": photos.set_aside}
    reference, drift = PhotoReference.of(photos.usable, encoders), dict[str, Estimate]()
    scores = {"photos": score_photos(reference, encoders, lpips)}
    for row, found in rows.items():
        scores[row] = score_samples(reference, found.usable, encoders, lpips, identifier=identifier)
        aside[row] = found.set_aside
    if other:
        sides = {row: sort_samples(other[row]) for row in ROWS}
        kept = set.intersection(*({each.name for each in side.usable} for side in sides.values()))
        if not kept:
            raise ValueError("of the prompts without the subject, no picture can be scored in both rows")
        base, adapter = ([each for each in side.usable if each.name in kept] for side in sides.values())
        drift |= score_drift(base, adapter, encoders)
        lost = ((row, each) for row, side in sides.items() for each in side.set_aside.items())
        aside[OTHER] = {f"{name} ({row})": reason for row, (name, reason) in lost}
    sources: dict[str, str] = {encoder.kind: encoder.source for encoder in encoders}
    return Report(settings, sources, scores, drift, aside, yardsticks.left_out)


def check_maps(pairs: Sequence[ControlPair], yardsticks: ControlYardsticks) -> None:
    """Refuse control images of a palette with other colours, all of them named, before anything is drawn."""
    problems = []
    for pair in pairs if yardsticks.finder is not None and yardsticks.control_type == PALETTE else ():
        try:
            expected_classes(pair, yardsticks)
        except ValueError as problem:
            problems.append(problem)
    if problems:
        raise ValueError(listed(problems, 8, "; "))


def report_control(
    rows: Mapping[str, Sequence[Sample]],
    pairs: Sequence[ControlPair],
    yardsticks: ControlYardsticks,
    settings: Mapping[str, Json],
) -> Report:
    """Score rows of pictures beside the photos themselves, which say what the yardsticks make of the truth.

    Pictures go by their names: that of their pair, and what follows it after "_seed".
    """
    by_name, scores, aside = {pair.name: pair for pair in pairs}, {}, {}
    for row, samples in {"photos": [Sample(pair.name, pair.photo) for pair in pairs], **rows}.items():
        found = sort_samples(samples)
        chosen = [by_name[sample.name.rpartition("_seed")[0] or sample.name] for sample in found.usable]
        scores[row] = score_control([sample.image for sample in found.usable], chosen, yardsticks)
        aside[row] = found.set_aside
    sources = {} if yardsticks.finder is None else {"segmenter": yardsticks.finder.source}
    sources |= {encoder.kind: encoder.source for encoder in yardsticks.encoders}
    return Report(settings, sources, scores, {}, aside, yardsticks.left_out)


COLOURS = {"photos": "#9a9aa0", "base": "#5b8ff9", "adapter": "#e8684a", "generated": "#e8684a"}
_LABEL_CHARACTERS = 42
_BAR_WIDTH = 0.26


def check_plotting() -> None:
    """Raise ValueError if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        needed = "pip install 'ether-diffusion[evaluate]'"
        raise ValueError(f"a plot needs matplotlib, which is not installed; {needed}")


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
    figure = new_figure(12 if prompts else 6, max(3.6, 1.2 + 0.3 * len(prompts)))
    bars, *dots = figure.subplots(1, 2 if prompts else 1, squeeze=False)[0]
    for number, (row, scores) in enumerate(report.rows.items()):
        shift = (number - (len(report.rows) - 1) / 2) * _BAR_WIDTH
        found = {k + shift: scores.columns[c] for k, c in enumerate(report.columns) if c in scores.columns}
        errors = [each.standard_error or 0.0 for each in found.values()]
        means, look = [each.mean for each in found.values()], {"label": row, "color": COLOURS.get(row)}
        bars.bar(list(found), means, _BAR_WIDTH, yerr=errors, capsize=3, **look)
        by = scores.by_prompt
        rows = {place: by[prompt] for place, prompt in enumerate(prompts) if prompt in by}
        if rows:
            dots[0].plot([each[report.columns[0]] for each in rows.values()], list(rows), "o", **look)
    bars.set_xticks(range(len(report.columns)), report.columns, rotation=20, ha="right")
    bars.axhline(0, color="black", linewidth=0.6)
    bars.set_title("means and standard errors")
    bars.legend()
    for axes in dots:
        axes.set_yticks(range(len(prompts)), [printable(prompt, _LABEL_CHARACTERS) for prompt in prompts])
        for label in axes.get_yticklabels():
            label.set_parse_math(False)  # a prompt may have dollars
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"{report.columns[0]}, prompt by prompt")
        axes.legend()
    if report.drift:
        drift = ", ".join(f"{name} {found.mean:.3f}" for name, found in report.drift.items())
        figure.suptitle(f"drift from the base on other prompts: {drift}", fontsize="medium")
    return png_of(figure)
