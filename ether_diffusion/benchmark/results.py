"""What a benchmark came to: its results by method, the paper's table, and a sheet of pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ether_diffusion.benchmark.plan import BASE, REAL, BenchmarkRun, BenchmarkSettings, label_of
from ether_diffusion.benchmark.runs import PICTURES, find_result
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.metrics.report import aligned, new_figure, png_of
from ether_diffusion.metrics.scores import COLUMNS, Estimate, estimate
from ether_diffusion.pipelines.metadata import png_bytes
from ether_diffusion.strict_json import Json

FORMAT_VERSION = 1
MAX_SUBJECTS = 8
"""Columns of a contact sheet."""


def summarise(
    runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings, *, form: str
) -> dict[str, Any]:
    """Return the results of all runs that are done, as an object for JSON.

    Errors are over subjects, or over seeds of one subject; a run that diverged has no scores, and is counted.
    """
    results = [result for run in runs if (result := find_result(run, root)) is not None]
    by_method = {REAL: [{**result, "scores": result[REAL]} for result in results if REAL in result]}
    for run in runs:
        by_method.setdefault(run.method, [each for each in results if each["method"] == run.method])
    return {
        "format_version": FORMAT_VERSION,
        "form": form,
        "settings": settings.to_json(),
        "subjects": list(dict.fromkeys(run.subject.name for run in runs)),
        "num_prompts": max(len(run.subject.prompts) for run in runs),
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "num_runs": len(runs),
        "num_done": len(results),
        "methods": {method: _row(found) for method, found in by_method.items() if found},
        "differences": differences(by_method),
        "runs": results,
    }


def differences(by_method: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Json]:
    """Return how much less like the subjects each method is than the best of those that train.

    Differences are of the same subject, its seeds averaged, with their 95 % interval by 10,000 bootstraps
    over subjects (Efron 1979); a run that diverged is left out with its pair.
    """
    trained = {method: _by_subject(of) for method, of in by_method.items() if method not in (REAL, BASE)}
    trained = {method: of for method, of in trained.items() if of}
    every = [each for of in trained.values() for each in of.values()]
    column = next((name for name in COLUMNS if every and all(name in each for each in every)), None)
    if column is None or len(trained) < 2:
        return {}
    scores = {method: {name: each[column] for name, each in of.items()} for method, of in trained.items()}
    best = max(scores, key=lambda method: math.fsum(scores[method].values()) / len(scores[method]))
    to_best: dict[str, Json] = {}
    for method, of in scores.items():
        values = [of[name] - scores[best][name] for name in of if name in scores[best]]
        if method != best and len(values) > 1:
            low, high = _interval(torch.tensor(values, dtype=torch.float64))
            mean = math.fsum(values) / len(values)
            to_best[method] = {"mean": mean, "low": low, "high": high, "num_subjects": len(values)}
    return {"column": column, "best": best, "to_best": to_best}


def _interval(values: torch.Tensor) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values (n,)."""
    places = torch.randint(len(values), (10_000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[places].mean(1).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def _by_subject(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean scores over seeds by subject."""
    scored = [result for result in results if result["scores"]]
    found: dict[str, dict[str, float]] = {}
    for subject in dict.fromkeys(result["subject"] for result in scored):
        own = [result["scores"] for result in scored if result["subject"] == subject]
        found[subject] = {name: math.fsum(each[name] for each in own) / len(own) for name in own[0]}
    return found


def _row(results: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    scored = [result for result in results if result["scores"]]
    names = [name for name in COLUMNS if scored and all(name in result["scores"] for result in scored)]
    several = len({result["subject"] for result in scored}) > 1
    groups = [result["subject" if several else "seed"] for result in scored]
    row: dict[str, Json] = {
        "scores": {n: asdict(estimate([each["scores"][n] for each in scored], groups)) for n in names},
        "num_runs": len(results),
        "num_diverged": sum("diverged" in result for result in results),
    }
    for name in ("parameters", "bytes", "seconds", "learning_rate"):
        values = [result[name] for result in results if name in result]
        if values:
            row[name] = values[0] if name != "seconds" else round(math.fsum(values) / len(values), 1)
    return row


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the paper's table, the first their head."""
    rows = summary["methods"]
    names = [name for name in COLUMNS if any(name in row["scores"] for row in rows.values())]
    lines = [["", "parameters", *(COLUMNS[name] for name in names), "rate", "seconds", "KiB"]]
    for method, row in rows.items():
        scores = {name: str(Estimate(**found)) for name, found in row["scores"].items()}
        diverged = f" ({row['num_diverged']} diverged)" if row["num_diverged"] else ""
        cost = {"parameters": ",", "learning_rate": "g", "seconds": ".1f", "bytes": ".0f"}
        shown = {n: format(row[n] / 1024 if n == "bytes" else row[n], f) for n, f in cost.items() if n in row}
        lines.append(
            [
                f"{label_of(method)}{diverged}",
                shown.get("parameters", "-"),
                *(scores.get(name, "-") for name in names),
                *(shown.get(name, "-") for name in ("learning_rate", "seconds", "bytes")),
            ]
        )
    return lines


def shown(summary: Mapping[str, Any]) -> str:
    """Return the table as lines, with what it is of."""
    done = f"{summary['num_done']} of {summary['num_runs']} runs, "
    num_images = summary["settings"]["num_images"]
    what = f"{len(summary['subjects'])} subjects × {summary['num_prompts']} prompts × {num_images} pictures"
    errors = "± is the standard error over subjects" if len(summary["subjects"]) > 1 else "± is over seeds"
    lines = [f"{done}{what}; {errors}", *aligned(table(summary))]
    found = summary["differences"]
    if found.get("to_best"):
        lines.append(
            f"{COLUMNS[found['column']]} less that of {label_of(found['best'])}, and its 95 % interval:"
        )
        lines += aligned(
            [
                [label_of(method), f"{each['mean']:+.3f}", f"{each['low']:+.3f} to {each['high']:+.3f}"]
                for method, each in found["to_best"].items()
            ]
        )
    return "\n".join(lines)


def draw_front(summary: Mapping[str, Any]) -> bytes | None:
    """Return a PNG: likeness over the number of parameters; None without two methods or matplotlib."""
    column, rows = summary["differences"].get("column"), summary["methods"]
    shown = {name: row for name, row in rows.items() if "parameters" in row and column in row["scores"]}
    if len(shown) < 2 or find_spec("matplotlib") is None:
        return None
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for method, row in shown.items():
        score = row["scores"][column]
        axes.errorbar(row["parameters"], score["mean"], yerr=score["standard_error"], fmt="o", capsize=3)
        axes.annotate(
            label_of(method), (row["parameters"], score["mean"]), (6, 6), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel=f"{COLUMNS[column]} ± standard error")
    return png_of(figure)


def benchmark_sheet(runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings) -> bytes:
    """Return a PNG of a picture by each method (rows) of each subject (columns, eight at most).

    Subject k is drawn from its prompt k, so that the prompts differ; a run without pictures is a gray field.
    """
    subjects = list({run.subject.name: run.subject for run in runs}.values())[:MAX_SUBJECTS]
    methods = list(dict.fromkeys(run.method for run in runs))
    places = [k % len(each.prompts) for k, each in enumerate(subjects)]
    rows = []
    for method in methods:
        folders = [BenchmarkRun(method, each, runs[0].seed).folder(root) / PICTURES for each in subjects]
        numbers = [f"{place * settings.num_images:04d}.png" for place in places]
        rows.append([_opened(f / number) for f, number in zip(folders, numbers, strict=True)])
    above = [f"{each.name}: {each.prompts[place]}" for each, place in zip(subjects, places, strict=True)]
    beside = [label_of(method) for method in methods]
    return png_bytes(draw_contact_sheet(rows, row_labels=beside, column_labels=above))


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        return Image.new("RGB", (64, 64), "gray")
    with Image.open(path) as image:
        return image.convert("RGB")
