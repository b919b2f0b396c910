"""What a study of control comes to: a row for each method, as JSON and as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image

from ether_diffusion.bases import open_base
from ether_diffusion.benchmark.plan import LABELS
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.metrics.control_scores import (
    ACCURACY,
    MIOU,
    OBJECT_IOU,
    ControlPair,
    ControlYardsticks,
    load_finder,
    score_control,
    tiny_palette,
)
from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.report import new_figure, png_of
from ether_diffusion.metrics.scores import Estimate, Sample, Scores, sort_samples
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.pictures import draw_scenes, to_images
from ether_diffusion.tiny_world.world import draw
from recipes.tiny_world.control_pairs import Pair, draw_control, draw_palette
from research import BASE
from research.study_control import DrawnRun, StudySettings, validation_pairs

PANELS = {OBJECT_IOU: "IoU of the object's shape", MIOU: "mIoU of all classes", ACCURACY: "pixel accuracy"}
REFERENCES = ("true", "base")
SHEET_COLUMNS = 8


FID = "fid_tiny"
TITLES = {**LABELS, "true": "true pictures", "base": "base, no control", "none": "encoder-only"}


def tiny_yardsticks() -> ControlYardsticks:
    """Return what the embedded base is measured with: its own segmenter, palette and encoder."""
    return ControlYardsticks(
        control_type="palette",
        finder=load_finder(ALIAS),
        palette=tiny_palette(),
        encoders=[load_encoder(ALIAS)],
    )


@dataclass(frozen=True)
class StudyRow:
    """What a method came to over its seeds: scores, what was not scored, and what it cost.

    `unseen` is the IoU of the object's shape for concepts that the base, too, never saw.
    """

    scores: Scores
    unseen: Estimate
    set_aside: Mapping[str, str]
    cost: Mapping[str, Json]

    def to_json(self) -> dict[str, Json]:
        """Return it as an object for JSON."""
        return {
            "scores": {name: asdict(found) for name, found in self.scores.columns.items()},
            "object_iou_of_unseen_concepts": asdict(self.unseen),
            "sets": dict(self.scores.sets),
            "left_out": dict(self.scores.left_out),
            "set_aside": dict(self.set_aside),
            **self.cost,
        }


def control_pair(pair: Pair, number: int) -> ControlPair:
    """Return a pair as evaluation reads it, with the map of all its classes; its concept is its group."""
    concept, size = pair.scene.concept.name, open_base(BASE).native_size
    true, classes = draw(pair.scene, size=size), draw_palette(pair.scene, size=size)
    return ControlPair(f"{number:03d}_{concept}", true, classes, pair.caption, concept)


def score_runs(runs: Sequence[DrawnRun], settings: StudySettings, yardsticks: ControlYardsticks) -> StudyRow:
    """Score the runs of one method together: errors are over the concepts, which all seeds share.

    Raises:
        ValueError: no picture shows anything.
    """
    pairs = [control_pair(pair, number) for number, pair in enumerate(validation_pairs(settings))]
    samples = [
        Sample(f"{run}_{number}", image)
        for run, drawn in enumerate(runs)
        for number, image in enumerate(to_images(drawn.pictures))
    ]
    found = sort_samples(samples)
    scores = _score(found.usable, pairs, yardsticks)
    held_out = {concept.name for concept in load_concepts("held_out")}
    strange = [sample for sample in found.usable if pairs[_number(sample)].group in held_out]
    unseen = _score(strange, pairs, replace(yardsticks, encoders=())).columns[OBJECT_IOU]
    cost: dict[str, Json] = {
        "num_seeds": len(runs),
        "learning_rate": runs[0].learning_rate,
        "parameters": runs[0].parameters,
        "encoder_parameters": runs[0].encoder_parameters,
    }
    return StudyRow(scores, unseen, found.set_aside, cost)


def _number(sample: Sample) -> int:
    return int(sample.name.split("_")[1])


def _score(samples: Sequence[Sample], pairs: Sequence[ControlPair], yardsticks: ControlYardsticks) -> Scores:
    chosen = [pairs[_number(sample)] for sample in samples]
    return score_control([sample.image for sample in samples], chosen, yardsticks)


def true_run(settings: StudySettings) -> DrawnRun:
    """Return the true pictures of the validation scenes: what the segmenter reads of a perfect drawing."""
    scenes = [pair.scene for pair in validation_pairs(settings)]
    return DrawnRun(draw_scenes(scenes, size=open_base(BASE).native_size), None, None, None)


def study_json(rows: Mapping[str, StudyRow], settings: StudySettings, seeds: Sequence[int]) -> bytes:
    """Return the file of all numbers."""
    found = {
        "settings": asdict(settings),
        "seeds": list(seeds),
        "rows": {name: row.to_json() for name, row in rows.items()},
    }
    return (json.dumps(found, indent=1, allow_nan=False) + "\n").encode()


def title_of(row: str) -> str:
    """Return a row's name for people: "oft_0.0001" is that of OFT with its rate."""
    method, _, rate = row.rpartition("_")
    if row in TITLES or method not in TITLES:
        return TITLES.get(row, row)
    return f"{TITLES[method]}, {float(rate):g}"


def study_table(rows: Mapping[str, StudyRow]) -> str:
    """Return the rows as lines."""
    head = ["", "mIoU", "accuracy", "object IoU", "of unseen", "FID-like", "parameters"]
    lines = [head]
    for name_of_row, row in rows.items():
        columns = row.scores.columns
        lines.append(
            [
                title_of(name_of_row),
                *(
                    _percent(each)
                    for each in (columns[MIOU], columns[ACCURACY], columns[OBJECT_IOU], row.unseen)
                ),
                f"{max(row.scores.sets[FID], 0.0):.4f}" if FID in row.scores.sets else "-",
                "-" if row.cost["parameters"] is None else f"{row.cost['parameters']:,}",
            ]
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _percent(found: Estimate) -> str:
    error = "" if found.standard_error is None else f" ± {100 * found.standard_error:.1f}"
    return f"{100 * found.mean:.1f}{error}"


def draw_study(rows: Mapping[str, StudyRow]) -> bytes:
    """Return a PNG with a panel for each score: a bar for each method, with its standard error.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(4 * len(PANELS), 0.8 + 0.42 * len(rows))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (column, title) in zip(panels, PANELS.items(), strict=True):
        _draw_bars(axes, rows, column)
        axes.set_title(title)
    return png_of(figure)


def _draw_bars(axes: Any, rows: Mapping[str, StudyRow], column: str) -> None:
    found = [row.scores.columns[column] for row in rows.values()]
    names = [title_of(name) for name in rows]
    colours = ["#9a9aa0" if name in REFERENCES else "#e8684a" for name in rows]
    axes.barh(
        range(len(rows)),
        [100 * each.mean for each in found],
        xerr=[100 * (each.standard_error or 0.0) for each in found],
        color=colours,
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%")
    axes.grid(axis="x", alpha=0.3)


def study_sheet(runs: Mapping[str, DrawnRun], settings: StudySettings) -> Image.Image:
    """Return maps, true pictures and what each method draws of them: one scene of each concept."""
    pairs = validation_pairs(settings)[:SHEET_COLUMNS]
    rows = [[draw_control(pair, size=open_base(BASE).native_size) for pair in pairs]]
    rows += [to_images(run.pictures[: len(pairs)]) for run in runs.values()]
    labels = ["control image", *(title_of(name) for name in runs)]
    return draw_contact_sheet(rows, row_labels=labels, column_labels=[pair.caption for pair in pairs])
