"""What the studies share: a command, trainings that are never done twice, and curves of what they came to."""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ether_diffusion.console import run_command
from ether_diffusion.durable_files import write_files
from research import BASE

if TYPE_CHECKING:
    from ether_diffusion.metrics.scores import Estimate
    from ether_diffusion.strict_json import Json

SCORES_FILE = "scores.json"
SHARED: "Mapping[str, Json]" = {"train_batch_size": 4, "random_flip": True, "export_lora": False}
"""Options of train-dreambooth of all studies on subjects, as in the benchmark."""
Scores = Mapping[str, float]
Cells = Mapping[Any, Mapping[Any, "Mapping[str, Estimate]"]]
"""Estimates by the two values that the trainings of a study differ in, and by score."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """One training of a study on a subject of Tiny World.

    Attributes:
        asked: all that it is told apart by, its subject and seed among them.
        cell: the names of two values in `asked`; trainings that share them are summed up together.
        folder: where it lies below the study's folder.
        settings: options of train-dreambooth.
        num_photos: of the subject; None is all of them.
    """

    asked: "Mapping[str, Json]"
    cell: tuple[str, str]
    folder: Path
    settings: "Mapping[str, Json]"
    num_photos: int | None = None


def study_parser(
    doc: str | None, subjects: Sequence[str] = (), *, draws: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of a study; with subjects it is one that trains on them, and draws them or not."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if subjects:
        parser.add_argument("--subjects", nargs="+", default=subjects, metavar="NAME")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    if subjects and draws:
        parser.add_argument("--inference_steps", type=int, default=15, help="of each picture (15)")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def run_study(
    name: str,
    parser: argparse.ArgumentParser,
    study: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the arguments and carry out a study. Return 0, or 2 for what the user can mend, in a sentence."""

    def run(parsed: argparse.Namespace) -> None:
        from ether_diffusion.metrics.report import check_plotting
        from ether_diffusion.tiny_world.concepts import find_concept

        logging.basicConfig(format="%(message)s", level=logging.INFO)
        check_plotting()
        for subject in vars(parsed).get("subjects", ()):
            find_concept(subject)
        study(parsed)

    return run_command(name, lambda: parser.parse_args(arguments), run)


def write_study(folder: Path, name: str, found: "Mapping[str, Json]", **pictures: bytes) -> None:
    """Write name.json, and each picture as its key.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{json.dumps(found, indent=1, allow_nan=False)}\n"
    write_files(
        folder, {f"{name}.json": text.encode()} | {f"{key}.png": png for key, png in pictures.items()}
    )


def kept_scores(folder: Path, asked: "Mapping[str, Json]", measure: Callable[[], Scores]) -> Scores:
    """Return what was measured in a folder before for the same settings, or measure it and keep it there.

    Raises:
        ValueError: an earlier run had other settings.
    """
    file = folder / SCORES_FILE
    if file.is_file():
        stored = json.loads(file.read_bytes())
        if stored["run"] != asked:
            raise ValueError(f"{folder} holds a run of other settings; name another folder for this study")
        found: dict[str, float] = stored["scores"]
        return found
    scores = measure()
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"run": asked, "scores": scores}, indent=1, allow_nan=False)
    write_files(folder, {SCORES_FILE: f"{data}\n".encode()})
    return scores


def settings_of(row: str) -> "dict[str, Json]":
    """Return the options of a row of the benchmark, with the rate of its method where it has none."""
    from ether_diffusion.benchmark.plan import BenchmarkSettings, method_of

    method, options = method_of(row)
    return {"adapter": method, "learning_rate": BenchmarkSettings(BASE, {}).learning_rate(row), **options}


def check_settings(trainings: Sequence[Training]) -> None:
    """Raise a ValueError for what cannot be trained, before anything is."""
    from ether_diffusion.training.config import DreamBoothConfig

    places: dict[str, Json] = {
        "pretrained_model_name_or_path": BASE, "instance_data_dir": "photos", "output_dir": "adapter"
    }  # fmt: skip
    for training in trainings:
        DreamBoothConfig.from_flat({**SHARED, **training.settings, **places})


def learn_all(
    trainings: Sequence[Training], root: Path, num_inference_steps: int
) -> list[tuple[Training, Scores]]:
    """Train, draw and score all, or read what came of them before; nothing where one diverged.

    Raises:
        ValueError: settings cannot be used, or an earlier run had others.
        StoppedError: a signal stopped the training; called again, it goes on.
    """
    from research.subject_scores import learn_and_score

    results = []
    for training in trainings:
        results.append((training, learn_and_score(training, root, num_inference_steps)))
        logger.info("%s: %s", json.dumps(training.asked), json.dumps(results[-1][1]))
    return results


def summarise(results: Sequence[tuple[Training, Scores]]) -> Cells:
    """Return estimates by cell, in order, with errors over subjects, or over seeds of one subject.

    What any run of a cell lacks, the cell lacks: there it came to nothing.
    """
    from ether_diffusion.metrics.scores import estimate

    group = "seed" if len({training.asked["subject"] for training, _ in results}) == 1 else "subject"
    cells: dict[Any, dict[Any, list[tuple[str, Scores]]]] = {}
    for training, scores in results:
        row, column = (training.asked[name] for name in training.cell)
        cells.setdefault(row, {}).setdefault(column, []).append((str(training.asked[group]), scores))
    return {
        row: {
            column: {
                name: estimate([scores[name] for _, scores in found], [key for key, _ in found])
                for name in sorted(set.intersection(*(set(scores) for _, scores in found)))
            }
            for column, found in columns.items()
        }
        for row, columns in cells.items()
    }


def cells_json(cells: Cells) -> "dict[str, Json]":
    """Return estimates as JSON."""
    return {
        str(row): {
            f"{column:g}": {name: asdict(found) for name, found in scores.items()}
            for column, scores in columns.items()
        }
        for row, columns in cells.items()
    }


def draw_curves(
    panels: Mapping[str, str],
    cells: Cells,
    base: Scores,
    labels: Mapping[Any, str],
    *,
    size: tuple[float, float],
    xlabel: str,
    ticks: Sequence[float] = (),
    title: str = "",
) -> bytes:
    """Return a PNG of `size` inches: a panel for each score, a curve for each row, a line for the base.

    With `ticks` the axis is logarithmic to the base 2 and has them alone.
    """
    from ether_diffusion.benchmark.plan import LABELS
    from ether_diffusion.metrics.report import new_figure, png_of

    figure = new_figure(*size)
    figure.suptitle(title)
    for axes, (name, words) in zip(figure.subplots(2, len(panels) // 2).flat, panels.items(), strict=True):
        if name in base:
            axes.axhline(base[name], color="black", linestyle="--", linewidth=1, label=LABELS["base"])
        axes.set_xscale("log", base=2 if ticks else 10)
        if name.endswith("_distance"):
            axes.set_yscale("log")
        for row, columns in cells.items():
            there = {column: found[name] for column, found in columns.items() if name in found}
            axes.errorbar(
                list(there),
                [found.mean for found in there.values()],
                yerr=[found.standard_error or 0.0 for found in there.values()],
                marker="o",
                markersize=4,
                capsize=3,
                label=labels.get(row, str(row)),
            )
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(words)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.3)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(cells) + 1)
    return png_of(figure)
