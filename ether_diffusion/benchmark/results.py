"""What a benchmark came to, here or on several machines: its results, the paper's table, and pictures."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field

from ether_diffusion.benchmark.plan import BASE, REAL, BenchmarkRun, BenchmarkSettings, label_of, labels_of
from ether_diffusion.benchmark.runs import (
    PICTURES,
    RESULT_FILE,
    Count,
    Result,
    find_result,
    read_result,
)
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.metrics.report import aligned, new_figure, png_of
from ether_diffusion.metrics.scores import COLUMNS, OUTSIDE_JUDGES, Estimate, estimate
from ether_diffusion.pipelines.metadata import png_bytes
from ether_diffusion.strict_json import Json, StrictModel, read_json
from ether_diffusion.tiny_world.pictures import RECOGNISED
from ether_diffusion.wording import listed, printable

FORMAT_VERSION = 1
BENCHMARK_FILE = "benchmark.json"
SAME_SCORE = 0.02
"""So much the base's own scores may differ between machines, whose sums are rounded otherwise."""
_KNOWN_OF_RUNS = ("scores", "weights of the base")
"""What results say only of runs that are done; earlier ones have no weights."""
MAX_SUBJECTS = 8
"""Columns of a contact sheet."""


def summarise(
    runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings, *, form: str
) -> dict[str, Any]:
    """Return the results of all runs that are done, as an object for JSON, those of other rows there too.

    Errors are over subjects, or over seeds of one subject; a run that diverged has no scores, and is counted.
    """
    files = {run.folder(root) / RESULT_FILE for run in runs}
    others = [read_result(file) for file in sorted(root.glob(f"runs/*/*/{RESULT_FILE}")) if file not in files]
    asked = [{"method": run.method, "subject": run.subject.name, "seed": run.seed} for run in runs]
    names = {key: list(dict.fromkeys(each[key] for each in asked + others)) for key in asked[0]}
    about: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "form": form,
        "settings": settings.to_json(),
        "subjects": names["subject"],
        "num_prompts": max(len(run.subject.prompts) for run in runs),
        "seeds": names["seed"],
        "num_runs": len(runs) + len(others),
    }
    results = [result for run in runs if (result := find_result(run, root)) is not None]
    return _summary(about, results + others, names["method"])


def _summary(
    about: Mapping[str, Any], results: Sequence[Mapping[str, Any]], methods: Iterable[str]
) -> dict[str, Any]:
    by_method: dict[str, list[Mapping[str, Any]]] = {
        REAL: [{**result, "scores": result[REAL]} for result in results if REAL in result]
    }
    by_method |= {method: [each for each in results if each["method"] == method] for method in methods}
    return {
        **about,
        "num_done": len(results),
        "methods": {method: _row(found) for method, found in by_method.items() if found},
        "differences": differences(by_method),
        "runs": list(results),
    }


class _Settings(StrictModel, extra="allow"):
    training: dict[str, Any]
    learning_rates: dict[str, int | float]
    num_images: Count


class _Results(StrictModel):
    """What `summarise` makes; all but the runs of a merger is counted anew."""

    format_version: Literal[1]
    form: str
    settings: _Settings
    subjects: list[str]
    num_prompts: Count
    seeds: list[Count]
    num_runs: Count
    num_done: Count
    methods: dict[str, Any]
    differences: dict[str, Any] = Field(default_factory=dict)
    runs: list[Result]

    def check_runs(self, where: str) -> None:
        """Raise a ValueError for runs of what the results do not name, and for one that is there twice."""
        places = Counter((run.method, run.subject, run.seed) for run in self.runs)
        for (method, subject, seed), number in places.items():
            what = f"{where} holds {printable(method)} of {printable(subject)} with seed {seed}"
            if number > 1:
                raise ValueError(f"{what} twice; take one of them out")
            if subject not in self.subjects or seed not in self.seeds:
                raise ValueError(f"{what}, which is none of its own; merge results as they were written")


def merge(files: Sequence[Path]) -> dict[str, Any]:
    """Return the results of several machines as one: files that `summarise` made, or folders with one.

    The base is drawn on each; where two did so for the same subject and seed, the first is taken.

    Raises:
        ValueError: they are not of one benchmark, or hold a run twice.
    """
    found: dict[str, _Results] = {}
    for given in files:
        file = given / BENCHMARK_FILE if given.is_dir() else given
        if not file.is_file():
            raise FileNotFoundError(f"there are no results {printable(file)}; give a {BENCHMARK_FILE}")
        found[printable(given)] = read_json(file.read_bytes(), _Results, printable(file))
        found[printable(given)].check_runs(printable(file))
    if len(found) < 2:
        raise ValueError(f"found {len(found)} file of results; give two or more, each once")
    name, first = next(iter(found.items()))
    runs: dict[tuple[str, str, int], tuple[str, dict[str, Any]]] = {}
    num_twice = 0
    for where, each in found.items():
        _check_same(name, first, where, each)
        for run in (run.model_dump(exclude_unset=True) for run in each.runs):
            place = run["method"], run["subject"], run["seed"]
            if place in runs:
                _check_base_twice(place, *runs[place], where, run)
                num_twice += 1
            runs.setdefault(place, (where, run))
    results = [run for _, run in runs.values()]
    settings = {**first.settings.model_dump(), "learning_rates": _rates(found, results)}
    every = found.values()
    about = {
        "format_version": FORMAT_VERSION,
        "form": first.form,
        "settings": settings,
        "subjects": list(dict.fromkeys(subject for each in every for subject in each.subjects)),
        "num_prompts": first.num_prompts,
        "seeds": list(dict.fromkeys(seed for each in every for seed in each.seeds)),
        "num_runs": sum(each.num_runs for each in every) - num_twice,
    }
    return _summary(about, results, dict.fromkeys(run["method"] for run in results))


def _check_same(name: str, first: _Results, where: str, other: _Results) -> None:
    """Refuse results of other settings, weights or scores than the first."""

    def facts(results: _Results) -> dict[str, object]:
        scored = [run for run in results.runs if run.scores]
        prints = {run.base_fingerprint for run in results.runs if run.base_fingerprint is not None}
        return {
            "form": results.form,
            **results.settings.model_dump(exclude={"learning_rates"}),
            "num_prompts": results.num_prompts,
            "scores": sorted({score for run in scored for score in run.scores}),
            "weights of the base": sorted(map(str, prints)),
        }

    ours, theirs = facts(first), facts(other)
    for fact in dict.fromkeys((*ours, *theirs)):
        if ours.get(fact) != theirs.get(fact) and not (
            fact in _KNOWN_OF_RUNS and [] in (ours[fact], theirs[fact])
        ):
            shown = f"{fact} {ours.get(fact)} in {name} and {theirs.get(fact)} in {where}"
            raise ValueError(f"these are not of one benchmark: found {printable(shown, 400)}")


def _check_base_twice(
    place: tuple[str, str, int], where: str, first: Mapping[str, Any], other: str, second: Mapping[str, Any]
) -> None:
    """Refuse a run that is there twice, but for the base's own where its scores are the same."""
    method, subject, seed = place
    what = f"{method} of {subject} with seed {seed} is in {where} and in {other}"
    if method != BASE:
        raise ValueError(f"{what}; leave one of them out")
    for name in (column for column in COLUMNS if column in first["scores"] and column != RECOGNISED):
        scores = [each["scores"].get(name, math.nan) for each in (first, second)]
        if not abs(scores[0] - scores[1]) <= SAME_SCORE:
            shown = f"{name} {scores[0]:.3f} and {scores[1]:.3f}"
            raise ValueError(f"{what} with {shown}; these were not measured alike")


def _rates(found: Mapping[str, _Results], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the rates of all files, of which those that were trained at must be one for each method."""
    trained: dict[str, float] = {}
    for run in results:
        rate = run.get("learning_rate")
        if rate is not None and trained.setdefault(run["method"], rate) != rate:
            at = f"{trained[run['method']]:g} and at {rate:g}"
            raise ValueError(
                f"{run['method']} was trained at {at}; merge results of one rate for each method"
            )
    told = [each.settings.learning_rates for each in found.values()]
    return {method: rate for rates in told for method, rate in rates.items()} | trained


def differences(by_method: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Json]:
    """Return how much less like the subjects each method is than the best of those that train.

    Differences are of the same subject, its seeds averaged, with their 95 % interval by 10,000 bootstraps
    over subjects (Efron 1979); a run that diverged is left out with its pair. An outside judge, who does not
    say which is best, tells of the same pairs.
    """
    trained = {method: _by_subject(of) for method, of in by_method.items() if method not in (REAL, BASE)}
    trained = {method: of for method, of in trained.items() if of}
    every = [each for of in trained.values() for each in of.values()]
    common = [name for name in COLUMNS if every and all(name in each for each in every)]
    if not common or len(trained) < 2:
        return {}
    column = next((name for name in common if name not in OUTSIDE_JUDGES), common[0])
    means = {m: math.fsum(each[column] for each in of.values()) / len(of) for m, of in trained.items()}
    best = max(means, key=means.__getitem__)
    found: dict[str, Json] = {"column": column, "best": best, "to_best": _to_best(trained, best, column)}
    outside = [name for name in common if name in OUTSIDE_JUDGES and name != column]
    if outside:
        found["outside"] = {"column": outside[0], "to_best": _to_best(trained, best, outside[0])}
    return found


def _to_best(
    trained: Mapping[str, Mapping[str, Mapping[str, float]]], best: str, column: str
) -> dict[str, Json]:
    to_best: dict[str, Json] = {}
    for method, of in trained.items():
        values = [
            each[column] - trained[best][name][column] for name, each in of.items() if name in trained[best]
        ]
        if method != best and len(values) > 1:
            low, high = interval(values)
            mean = math.fsum(values) / len(values)
            to_best[method] = {"mean": mean, "low": low, "high": high, "num_subjects": len(values)}
    return to_best


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of differences, by 10,000 bootstraps (Efron 1979)."""
    values = torch.tensor(differences, dtype=torch.float64)
    places = torch.randint(len(values), (10_000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[places].mean(1).quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def _by_subject(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean scores over seeds by subject."""
    scored = [result for result in results if result["scores"]]
    found: dict[str, dict[str, float]] = {}
    for subject in dict.fromkeys(result["subject"] for result in scored):
        own = [result["scores"] for result in scored if result["subject"] == subject]
        common = [name for name in own[0] if all(name in each for each in own)]
        found[subject] = {name: math.fsum(each[name] for each in own) / len(own) for name in common}
    return found


def _row(results: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    scored = [result for result in results if result["scores"]]
    some = [name for name in COLUMNS if any(name in result["scores"] for result in scored)]
    names = [name for name in some if all(name in result["scores"] for result in scored)]
    several = len({result["subject"] for result in scored}) > 1
    groups = [result["subject" if several else "seed"] for result in scored]
    row: dict[str, Json] = {
        "scores": {n: asdict(estimate([each["scores"][n] for each in scored], groups)) for n in names},
        "num_runs": len(results),
        "num_diverged": sum("diverged" in result for result in results),
    }
    if names != some:
        row["left_out"] = [name for name in some if name not in names]
    for name in ("parameters", "bytes", "learning_rate"):
        values = [result[name] for result in results if name in result]
        if values:
            row[name] = values[0]
    return row


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the paper's table, the first their head."""
    rows = summary["methods"]
    names = [name for name in COLUMNS if any(name in row["scores"] for row in rows.values())]
    labels = labels_of(rows)
    lines = [["", "parameters", *(COLUMNS[name] for name in names), "rate", "KiB"]]
    for method, row in rows.items():
        scores = {name: str(Estimate(**found)) for name, found in row["scores"].items()}
        diverged = f" ({row['num_diverged']} diverged)" if row["num_diverged"] else ""
        cost = {"parameters": ",", "learning_rate": "g", "bytes": ".0f"}
        shown = {n: format(row[n] / 1024 if n == "bytes" else row[n], f) for n, f in cost.items() if n in row}
        lines.append(
            [
                f"{labels[method]}{diverged}",
                shown.get("parameters", "-"),
                *(scores.get(name, "-") for name in names),
                *(shown.get(name, "-") for name in ("learning_rate", "bytes")),
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
    for method, row in summary["methods"].items():
        if "left_out" in row:
            columns = listed(COLUMNS[name] for name in row["left_out"])
            lines.append(f"{label_of(method)}: not all of its runs have {columns}, which is left out")
    best, labels = summary["differences"].get("best"), labels_of(summary["methods"])
    for found in (summary["differences"], summary["differences"].get("outside", {})):
        if not found.get("to_best"):
            continue
        lines.append(f"{COLUMNS[found['column']]} less that of {labels[best]}, and its 95 % interval:")
        lines += aligned(
            [
                [labels[method], f"{each['mean']:+.3f}", f"{each['low']:+.3f} to {each['high']:+.3f}"]
                for method, each in found["to_best"].items()
            ]
        )
    return "\n".join(lines)


def draw_front(summary: Mapping[str, Any]) -> bytes | None:
    """Return a PNG: differences to the best row over parameters, a panel for each judge, ETHER's rows in red.

    None without two methods or matplotlib.
    """
    found, rows = summary["differences"], summary["methods"]
    judges = [each for each in (found, found.get("outside")) if each and each["to_best"]]
    if not judges or find_spec("matplotlib") is None:
        return None
    best, labels = found["best"], labels_of(rows)
    figure = new_figure(7 * len(judges), 6)
    for axes, judge in zip(figure.subplots(1, len(judges), squeeze=False).flat, judges, strict=True):
        points = {best: {"mean": 0.0, "low": 0.0, "high": 0.0}, **judge["to_best"]}
        places = {row: (rows[row]["parameters"], each["mean"]) for row, each in points.items()}
        numbers = [number for number, _ in places.values()]
        what = f"{COLUMNS[judge['column']]} less the best's, 95 % interval"
        axes.set(xscale="log", xlabel="trained parameters", ylabel=what)
        axes.set_xlim(min(numbers) / 2, max(numbers) * 12)  # which leaves room for a label
        axes.grid(alpha=0.3)
        for row, each in points.items():
            bars = [[each["mean"] - each["low"]], [each["high"] - each["mean"]]]
            color = "tab:red" if row.startswith("ether") else "tab:blue"
            axes.plot(*places[row], "o", color=color, zorder=5)
            axes.errorbar(*places[row], yerr=bars, color=color, alpha=0.3)
        _write_labels(axes, {labels[row]: place for row, place in places.items()})
    return png_of(figure)


def _write_labels(axes: Any, places: Mapping[str, tuple[float, float]]) -> None:
    """Write a label beside each point, above those that it would lie on."""
    axes.figure.draw_without_rendering()  # else points are not yet where they will be
    written: list[tuple[float, float, float]] = []
    for label, place in sorted(places.items(), key=lambda each: each[1][1]):
        x, y = axes.transData.transform(place)
        right = x + 8 + 6 * len(label)
        height = max([y + 2, *(top + 12 for start, end, top in written if x < end and start < right)])
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
        offset = (7, height - y)
        axes.annotate(label, place, offset, textcoords="offset pixels", fontsize=8, bbox=behind)
        written.append((x, right, height))


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
    beside = [*labels_of(methods).values()]
    return png_bytes(draw_contact_sheet(rows, row_labels=beside, column_labels=above))


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        return Image.new("RGB", (64, 64), "gray")
    with Image.open(path) as image:
        return image.convert("RGB")
