"""The plot and the contact sheet of a study of control."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.metrics.control_scores import ACCURACY, MIOU, OBJECT_IOU
from ether_diffusion.metrics.plots import new_figure, png_of
from ether_diffusion.tiny_world.control import draw_control
from ether_diffusion.tiny_world.pictures import to_images
from research.control_results import StudyRow, title_of
from research.control_study import DrawnRun, StudySettings, validation_pairs

PANELS = {OBJECT_IOU: "IoU of the object's shape", MIOU: "mIoU of all classes", ACCURACY: "pixel accuracy"}
REFERENCES = ("true", "base")
SHEET_COLUMNS = 8


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
    rows = [[draw_control(pair) for pair in pairs]]
    rows += [to_images(run.pictures[: len(pairs)]) for run in runs.values()]
    labels = ["control image", *(title_of(name) for name in runs)]
    return draw_contact_sheet(rows, row_labels=labels, column_labels=[pair.caption for pair in pairs])
