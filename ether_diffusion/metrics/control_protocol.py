"""The report on an adapter that follows control images."""

from collections.abc import Mapping, Sequence

from ether_diffusion.metrics.control_scores import (
    PALETTE,
    ControlPair,
    ControlYardsticks,
    expected_classes,
    score_control,
)
from ether_diffusion.metrics.report import Report
from ether_diffusion.metrics.samples import Sample, SetAside, sort_samples
from ether_diffusion.metrics.scoring import Scores
from ether_diffusion.strict_json import Json

SHOWN_PROBLEMS = 8


def check_maps(pairs: Sequence[ControlPair], yardsticks: ControlYardsticks) -> None:
    """Refuse control images of a palette with other colours, before anything is drawn.

    Raises:
        ValueError: some have; all are named.
    """
    if yardsticks.finder is None or yardsticks.control_type != PALETTE:
        return
    problems = []
    for pair in pairs:
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
    scores: dict[str, Scores] = {}
    aside: dict[str, Sequence[SetAside]] = {}
    for row, samples in {"photos": photos, **rows}.items():
        found = sort_samples(samples)
        chosen = [by_name[sample.name.rpartition("_seed")[0] or sample.name] for sample in found.usable]
        scores[row] = score_control([sample.image for sample in found.usable], chosen, yardsticks)
        aside[row] = found.set_aside
    sources: dict[str, str] = {}
    if yardsticks.finder is not None:
        sources["segmenter"] = yardsticks.finder.source
    sources |= {encoder.kind: encoder.source for encoder in yardsticks.encoders}
    return Report(settings, sources, scores, {}, aside, yardsticks.left_out)


def together(problems: Sequence[str]) -> str:
    """Return the first problems as one sentence, and how many more there are."""
    rest = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")
