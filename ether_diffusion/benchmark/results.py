"""What a benchmark came to: estimates by method, as the paper's table, as JSON, and in pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.benchmark.plan import BASE, BenchmarkRun, BenchmarkSettings
from ether_diffusion.benchmark.runs import PICTURES, REAL, find_result
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.metrics.likeness import Estimate, estimate
from ether_diffusion.metrics.report import aligned, shown_estimate
from ether_diffusion.metrics.scores import COLUMNS
from ether_diffusion.pipelines.metadata import png_bytes
from ether_diffusion.strict_json import Json

FORMAT_VERSION = 1
MAX_SUBJECTS = 8
"""Columns of a contact sheet."""
LABELS = {
    REAL: "real images",
    BASE: "no adapter",
    "full": "DreamBooth (full)",
    "lora": "LoRA r=4",
    "oft": "OFT n=4",
    "hra": "HRA r=4",
    "delora": "DeLoRA r=4",
    "boft": "BOFT n=4",
    "ether": "ETHER",
    "ether_plus": "ETHER+",
}


def summarise(
    runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings, *, form: str
) -> dict[str, Any]:
    """Return the results of all runs that are done, as an object for JSON.

    Errors are over subjects, or over seeds of one subject; a run that diverged has no scores, and is counted.
    """
    results = [result for run in runs if (result := find_result(run, root)) is not None]
    rows: dict[str, Json] = {}
    real = [{**result, "scores": result[REAL]} for result in results if REAL in result]
    for method in (REAL, *dict.fromkeys(run.method for run in runs)):
        of_method = real if method == REAL else [each for each in results if each["method"] == method]
        if of_method:
            rows[method] = _row(of_method)
    return {
        "format_version": FORMAT_VERSION,
        "form": form,
        "settings": settings.to_json(),
        "subjects": list(dict.fromkeys(run.subject.name for run in runs)),
        "num_prompts": max(len(run.subject.prompts) for run in runs),
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "num_runs": len(runs),
        "num_done": len(results),
        "methods": rows,
        "runs": list(results),
    }


def _row(results: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    scored = [result for result in results if result["scores"]]
    names = [name for name in COLUMNS if scored and all(name in result["scores"] for result in scored)]
    several = len({result["subject"] for result in scored}) > 1
    groups = [result["subject" if several else "seed"] for result in scored]
    row: dict[str, Json] = {
        "scores": {
            name: asdict(estimate([each["scores"][name] for each in scored], groups)) for name in names
        },
        "num_runs": len(results),
        "num_diverged": sum("diverged" in result for result in results),
    }
    for name in ("parameters", "bytes", "seconds"):
        values = [result[name] for result in results if name in result]
        if values:
            row[name] = values[0] if name != "seconds" else round(math.fsum(values) / len(values), 1)
    if "learning_rate" in results[0]:
        row["learning_rate"] = results[0]["learning_rate"]
    return row


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the paper's table, the first their head."""
    rows = summary["methods"]
    names = [name for name in COLUMNS if any(name in row["scores"] for row in rows.values())]
    lines = [["", "parameters", *(COLUMNS[name] for name in names), "rate", "seconds", "KiB"]]
    for method, row in rows.items():
        scores = {name: Estimate(**found) for name, found in row["scores"].items()}
        diverged = f" ({row['num_diverged']} diverged)" if row["num_diverged"] else ""
        lines.append(
            [
                f"{LABELS.get(method, method)}{diverged}",
                f"{row['parameters']:,}" if "parameters" in row else "-",
                *(shown_estimate(scores.get(name)) for name in names),
                f"{row['learning_rate']:g}" if "learning_rate" in row else "-",
                f"{row['seconds']:.1f}" if "seconds" in row else "-",
                f"{row['bytes'] / 1024:.0f}" if "bytes" in row else "-",
            ]
        )
    return lines


def shown(summary: Mapping[str, Any]) -> str:
    """Return the table as lines, with what it is of."""
    done = f"{summary['num_done']} of {summary['num_runs']} runs, "
    num_images = summary["settings"]["num_images"]
    what = f"{len(summary['subjects'])} subjects × {summary['num_prompts']} prompts × {num_images} pictures"
    errors = "± is the standard error over subjects" if len(summary["subjects"]) > 1 else "± is over seeds"
    return "\n".join([f"{done}{what}; {errors}", *aligned(table(summary))])


def benchmark_sheet(runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings) -> bytes:
    """Return a PNG of a picture by each method (rows) of each subject (columns, eight at most).

    Subject k is drawn from its prompt k, so that the prompts differ; a run without pictures is a gray field.
    """
    first = runs[0].seed
    subjects = list({run.subject.name: run.subject for run in runs}.values())[:MAX_SUBJECTS]
    methods = list(dict.fromkeys(run.method for run in runs))
    labels = [f"{each.name}: {each.prompts[k % len(each.prompts)]}" for k, each in enumerate(subjects)]
    rows = []
    for method in methods:
        folders = [BenchmarkRun(method, subject, first).folder(root) / PICTURES for subject in subjects]
        numbers = [k % len(each.prompts) * settings.num_images for k, each in enumerate(subjects)]
        rows.append([_opened(f / f"{number:04d}.png") for f, number in zip(folders, numbers, strict=True)])
    names = [LABELS.get(method, method) for method in methods]
    return png_bytes(draw_contact_sheet(rows, row_labels=names, column_labels=labels))


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        return Image.new("RGB", (64, 64), "gray")
    with Image.open(path) as image:
        return image.convert("RGB")
