"""What an evaluation found: pictures scored by row, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ether_diffusion.metrics.control_scores import (
    PALETTE,
    ControlPair,
    ControlYardsticks,
    expected_classes,
    score_control,
)
from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.metrics.likeness import Estimate
from ether_diffusion.metrics.lpips import Lpips
from ether_diffusion.metrics.scores import (
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
_SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class Report:
    """Scores by row ("photos", "base", "adapter" or "generated"), and how they were come by.

    Attributes:
        settings: what was drawn or read, and how.
        encoders: where each came from, by its kind.
        drift: of the adapter from the base on prompts without the subject.
        set_aside: by row, then name, what is wrong with pictures that were not scored; "other" are those of
            prompts without the subject.
        left_out: why a score is not there, by its column.
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
        found = dict(self.left_out)
        for scores in self.rows.values():
            found |= scores.left_out
        return found

    def to_json(self) -> dict[str, Json]:
        """Return it as an object for JSON."""
        rows = self.rows.items()
        return {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "encoders": dict(self.encoders),
            "scores": {row: _estimates(scores.columns) for row, scores in rows},
            "sets": {row: dict(scores.sets) for row, scores in rows if scores.sets},
            "by_prompt": {
                row: {prompt: dict(found) for prompt, found in scores.by_prompt.items()}
                for row, scores in rows
                if scores.by_prompt
            },
            "drift": _estimates(self.drift),
            "set_aside": {row: dict(found) for row, found in self.set_aside.items() if found},
            "left_out": dict(self.reasons()),
        }

    def table(self) -> str:
        """Return it as lines: a row for each kind of picture, then drift, and what is not in it."""
        rows = [
            [row, *(shown_estimate(scores.columns.get(column)) for column in self.columns)]
            for row, scores in self.rows.items()
        ]
        lines = aligned([["", *self.columns], *rows])
        for row, scores in self.rows.items():
            if scores.sets:
                sets = ", ".join(f"{name} {value:.4g}" for name, value in scores.sets.items())
                lines.append(f"{row}: {sets}")
        if self.drift:
            drift = ", ".join(f"{name} {shown_estimate(value)}" for name, value in self.drift.items())
            lines.append(f"drift from the base on other prompts: {drift}")
        for row, aside in self.set_aside.items():
            if aside:
                reasons = [f"{printable(name)} {reason}" for name, reason in aside.items()]
                lines.append(f"not scored of {row}: {listed(reasons)}")
        lines += [f"{column} is left out: {reason}" for column, reason in self.reasons().items()]
        return "\n".join(lines)


def _estimates(columns: Mapping[str, Estimate]) -> dict[str, Json]:
    return {name: asdict(found) for name, found in columns.items()}


def shown_estimate(found: Estimate | None) -> str:
    """Return a mean and its standard error, where there are such."""
    if found is None:
        return "-"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{found.mean:.3f}{error}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines with equal columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


@dataclass(frozen=True)
class DrawnSamples:
    """Pictures of the subject's prompts and of others by row, "base" and "adapter", on equal seeds."""

    subject: Mapping[str, Sequence[Sample]]
    other: Mapping[str, Sequence[Sample]]


@dataclass(frozen=True)
class Yardsticks:
    """What pictures are measured with; `left_out` says of what there is not, by column, why."""

    encoders: Sequence[Encoder]
    lpips: Lpips | None
    identifier: str | None
    left_out: Mapping[str, str]


def report_drawn(
    photos: SortedSamples, drawn: DrawnSamples, yardsticks: Yardsticks, settings: Mapping[str, Json]
) -> Report:
    """Score an adapter's pictures beside the base's, and the drift between them on prompts of others.

    Raises:
        ValueError: none of a row's pictures can be scored.
    """
    rows = {row: sort_samples(samples) for row, samples in drawn.subject.items()}
    if not drawn.other["base"]:
        return _report(photos, rows, yardsticks, settings, {}, {})
    sorted_rows = {row: sort_samples(drawn.other[row]) for row in ROWS}
    kept = set.intersection(*({each.name for each in found.usable} for found in sorted_rows.values()))
    if not kept:
        raise ValueError("of the prompts without the subject, no picture can be scored in both rows")
    base, adapter = ([each for each in sorted_rows[row].usable if each.name in kept] for row in ROWS)
    lost = {
        f"{name} ({row})": reason
        for row, found in sorted_rows.items()
        for name, reason in found.set_aside.items()
    }
    drift = score_drift(base, adapter, yardsticks.encoders)
    return _report(photos, rows, yardsticks, settings, drift, {OTHER: lost})


def report_generated(
    photos: SortedSamples, generated: SortedSamples, yardsticks: Yardsticks, settings: Mapping[str, Json]
) -> Report:
    """Score pictures that were generated before."""
    return _report(photos, {"generated": generated}, yardsticks, settings, {}, {})


def _report(
    photos: SortedSamples,
    rows: Mapping[str, SortedSamples],
    yardsticks: Yardsticks,
    settings: Mapping[str, Json],
    drift: Mapping[str, Estimate],
    other: Mapping[str, Mapping[str, str]],
) -> Report:
    encoders, lpips, identifier = yardsticks.encoders, yardsticks.lpips, yardsticks.identifier
    reference = PhotoReference.of(photos.usable, encoders)
    scores = {"photos": score_photos(reference, encoders, lpips)}
    for row, found in rows.items():
        scores[row] = score_samples(reference, found.usable, encoders, lpips, identifier=identifier)
    sources: dict[str, str] = {encoder.kind: encoder.source for encoder in encoders}
    aside = {row: found.set_aside for row, found in {"photos": photos, **rows}.items()}
    return Report(settings, sources, scores, drift, {**aside, **other}, yardsticks.left_out)


def check_maps(pairs: Sequence[ControlPair], yardsticks: ControlYardsticks) -> None:
    """Refuse control images of a palette with other colours, before anything is drawn.

    Raises:
        ValueError: some have; all are named.
    """
    problems = []
    for pair in pairs if yardsticks.finder is not None and yardsticks.control_type == PALETTE else ():
        try:
            expected_classes(pair, yardsticks)
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        raise ValueError(together(problems))


def report_control(
    rows: Mapping[str, Sequence[Sample]],
    pairs: Sequence[ControlPair],
    yardsticks: ControlYardsticks,
    settings: Mapping[str, Json],
) -> Report:
    """Score rows of pictures beside the photos themselves, which say what the yardsticks make of the truth.

    Pictures go by their names: that of their pair, and what follows it after "_seed".

    Raises:
        ValueError: none of a row's pictures can be scored.
    """
    by_name = {pair.name: pair for pair in pairs}
    photos = [Sample(pair.name, pair.photo) for pair in pairs]
    found = {row: sort_samples(samples) for row, samples in {"photos": photos, **rows}.items()}
    scores = {}
    for row, samples in found.items():
        chosen = [by_name[sample.name.rpartition("_seed")[0] or sample.name] for sample in samples.usable]
        scores[row] = score_control([sample.image for sample in samples.usable], chosen, yardsticks)
    sources = {} if yardsticks.finder is None else {"segmenter": yardsticks.finder.source}
    sources |= {encoder.kind: encoder.source for encoder in yardsticks.encoders}
    aside = {row: samples.set_aside for row, samples in found.items()}
    return Report(settings, sources, scores, {}, aside, yardsticks.left_out)


def together(problems: Sequence[str]) -> str:
    """Return the first problems as one sentence, and how many more there are."""
    rest = len(problems) - _SHOWN_PROBLEMS
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")
