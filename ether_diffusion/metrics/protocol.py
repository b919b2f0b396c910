"""The evaluation of one adapter: what is drawn on which seeds, and how pictures become a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.metrics.perceptual import Lpips
from ether_diffusion.metrics.report import Report
from ether_diffusion.metrics.samples import Sample, SetAside, SortedSamples, sort_samples
from ether_diffusion.metrics.scoring import (
    PhotoReference,
    Scores,
    score_drift,
    score_photos,
    score_samples,
)
from ether_diffusion.strict_json import Json

ROWS = ("base", "adapter")
OTHER = "other"


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
    sorted_rows = {row: sort_samples(samples) for row, samples in drawn.subject.items()}
    aside = {row: found.set_aside for row, found in sorted_rows.items()}
    drift = {}
    if drawn.other["base"]:
        pairs, lost = _whole_pairs(drawn.other)
        drift = dict(score_drift(*pairs, yardsticks.encoders))
        aside[OTHER] = lost
    rows = {row: found.usable for row, found in sorted_rows.items()}
    return Report(
        settings=settings,
        encoders={encoder.kind: encoder.source for encoder in yardsticks.encoders},
        rows=_score_rows(photos, rows, yardsticks),
        drift=drift,
        set_aside={"photos": photos.set_aside, **aside},
        left_out=yardsticks.left_out,
    )


def report_generated(
    photos: SortedSamples, generated: SortedSamples, yardsticks: Yardsticks, settings: Mapping[str, Json]
) -> Report:
    """Score pictures that were generated before."""
    return Report(
        settings=settings,
        encoders={encoder.kind: encoder.source for encoder in yardsticks.encoders},
        rows=_score_rows(photos, {"generated": generated.usable}, yardsticks),
        drift={},
        set_aside={"photos": photos.set_aside, "generated": generated.set_aside},
        left_out=yardsticks.left_out,
    )


def _score_rows(
    photos: SortedSamples, rows: Mapping[str, Sequence[Sample]], yardsticks: Yardsticks
) -> dict[str, Scores]:
    encoders, lpips = yardsticks.encoders, yardsticks.lpips
    reference = PhotoReference.of(photos.usable, encoders)
    scores = {"photos": score_photos(reference, encoders, lpips)}
    for row, samples in rows.items():
        scores[row] = score_samples(reference, samples, encoders, lpips, identifier=yardsticks.identifier)
    return scores


def _whole_pairs(
    samples: Mapping[str, Sequence[Sample]],
) -> tuple[tuple[list[Sample], list[Sample]], tuple[SetAside, ...]]:
    """Return the pictures of both rows of which neither is set aside, and what was."""
    first, second = (sort_samples(samples[row]) for row in ROWS)
    kept = {each.name for each in first.usable} & {each.name for each in second.usable}
    if not kept:
        raise ValueError("of the prompts without the subject, no picture can be scored in both rows")
    base, adapter = ([each for each in found.usable if each.name in kept] for found in (first, second))
    lost = [
        SetAside(f"{each.name} ({row})", each.reason)
        for row, found in zip(ROWS, (first, second), strict=True)
        for each in found.set_aside
    ]
    return (base, adapter), tuple(lost)
