"""Write docs/results.md, and what `ether plan` rests on, from the files in docs/results.

`python -m research.write_results` in the repository; a test regenerates both and compares bytes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ether_diffusion.benchmark.plan import CURVES_FILE, LABELS, label_of, labels_of, method_of
from ether_diffusion.benchmark.results import interval, table
from ether_diffusion.console import run_command
from ether_diffusion.durable_files import write_files
from ether_diffusion.metrics.control_scores import CANNY_F1, MIOU, OBJECT_IOU
from ether_diffusion.metrics.scores import COLUMNS, DRIFT, PROMPT, Estimate
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world.pictures import OBJECT, RECOGNISED
from research.claims import CLAIMS
from research.control_results import title_of
from research.measured import (
    FILES,
    Measured,
    NotMeasuredError,
    difference_of,
    paired_values,
)
from research.study_photos import ADVISED, NEARLY
from research.study_strength import without_rate

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = {
    "benchmark": "ether benchmark --base tiny_world_2 --seeds 0 1 2 --methods ether_plus "
    "'ether_plus:target_modules=.*to_(v|out.0)' ether lora:rank=1 lora:rank=2 lora lora:rank=16 oft hra "
    "delora ia3 full --output_dir runs/benchmark",
    "rates": "ether benchmark --base tiny_world_2 --num_images 1 --subjects panda crown tiger turtle unicorn "
    "sailboat hamburger snowman --methods ether_plus ether_plus:learning_rate=0.01 "
    "'ether_plus:target_modules=.*to_(v|out.0),learning_rate=0.003' "
    "'ether_plus:target_modules=.*to_(v|out.0),learning_rate=0.01' lora:rank=1,learning_rate=0.003 "
    "lora:rank=1,learning_rate=0.01 lora:learning_rate=0.001 lora:learning_rate=0.003 "
    "lora:learning_rate=0.01 lora:rank=16,learning_rate=0.001 lora:rank=16,learning_rate=0.003 "
    "delora:learning_rate=0.001 delora:learning_rate=0.003 oft:learning_rate=0.001 "
    "oft:learning_rate=0.003 hra:learning_rate=0.003 hra:learning_rate=0.01 hra:learning_rate=0.03 "
    "ia3:learning_rate=0.03 ia3:learning_rate=0.1 ether:learning_rate=0.01 ether:learning_rate=0.03 "
    "full:learning_rate=0.0001 full:learning_rate=0.0003 --output_dir runs/rates_by_likeness",
    "learning_rates": "python -m research.study_learning_rate --seeds 0 1 2 --output_dir runs/rates",
    "photos": "python -m research.study_photos --output_dir runs/photos",
    "strength": "python -m research.study_strength --output_dir runs/strength",
    "steps": "python -m research.study_strength --subjects panda --steps 50 100 200 400 --methods "
    "ether_plus:learning_rate=0.003 'ether_plus:target_modules=.*to_(v|out.0),learning_rate=0.003' "
    "ether:learning_rate=0.03 lora:rank=1,learning_rate=0.003 lora:rank=2,learning_rate=0.003 "
    "lora:learning_rate=0.003 lora:rank=16,learning_rate=0.003 oft:learning_rate=0.001 "
    "hra:learning_rate=0.01 delora:learning_rate=0.003 ia3:learning_rate=0.03 full:learning_rate=0.0001 "
    "--output_dir runs/steps",
    "taken_out": "at c843015, which had the options: python -m research.study_strength --steps 200 --methods "
    "ether_plus:sides=input,learning_rate=0.003 "
    "ether_plus:sides=input,strength=learned,strength_lr=0.03,learning_rate=0.003 "
    "ether_plus:sides=output,learning_rate=0.003 ether_plus:learning_rate=0.003 "
    "ether_plus:strength=learned,strength_lr=0.03,learning_rate=0.003 "
    "ether_plus:strength=learned,gradient_init=true,strength_lr=0.03,learning_rate=0.003 "
    "ether:num_blocks=1,learning_rate=0.01 ether:num_blocks=1,num_reflections=4,learning_rate=0.01 "
    "ether:num_blocks=1,sides=both,learning_rate=0.01 ether:num_blocks=1,sides=both,strength=learned,"
    "gradient_init=true,strength_lr=0.03,learning_rate=0.01 "
    "'ether_plus:target_modules=.*to_(v|out.0),learning_rate=0.003' --output_dir runs/taken_out",
    "unconditional": "at 5fcbc2a, which had the option: python -m research.study_strength --steps 200 "
    "--num_images 2 --subjects panda crown tiger turtle unicorn sailboat hamburger snowman --methods "
    "ether_plus:learning_rate=0.003 ether_plus:unconditional_strength=0,learning_rate=0.003 "
    "ether_plus:unconditional_strength=0.5,learning_rate=0.003 lora:learning_rate=0.001 "
    "lora:unconditional_strength=0,learning_rate=0.001 lora:unconditional_strength=0.5,learning_rate=0.001 "
    "--output_dir runs/unconditional",
    "timesteps": "python -m research.study_timesteps --seeds 0 1 --output_dir runs/timesteps",
    "blocks": "python -m research.study_blocks --output_dir runs/blocks",
    "energy": "cd runs/strength; python -m research.study_energy --output_dir ../energy --adapters "
    "full_learning_rate_0.0001 lora_learning_rate_0.001 oft_learning_rate_0.001 hra_learning_rate_0.03 "
    "delora_learning_rate_0.001 ia3_learning_rate_0.03 ether_learning_rate_0.01 "
    "ether_plus_learning_rate_0.003",
    "transforms": "python -m research.study_transforms --output_dir runs/transforms",
    "cost": "python -m research.study_cost --latent 32 --rounds 3 --output_dir runs/cost",
    "control": "python -m research.study_control --seeds 0 1 2 --output_dir runs/control",
    "control_silhouette": "python -m research.study_control --seeds 0 1 2 --control_type silhouette "
    "--output_dir runs/control_silhouette",
    "control_edges": "python -m research.study_control --seeds 0 1 2 --control_type edges "
    "--output_dir runs/control_edges",
}
"""What makes each file; its study.json or own JSON is copied into docs/results."""
HEAD = """# What was measured, and what of the paper it bears out

Written by `python -m research.write_results` from the files in `docs/results`; edit neither by hand. The
paper is ETHER, Bini et al. 2024, [arXiv:2405.20271](https://arxiv.org/abs/2405.20271).

Nothing here was trained on SD 1.5, but on the embedded base `tiny_world_2` (128 × 128 px). So "reproduced"
means that the paper's **order** holds there, not its figures. Parameters are counted on SD 1.5's UNet. That
one method scores more than another is called reproduced only if the difference on the same subjects is more
than two standard errors above zero; the rules are functions in `research/`, one for each claim.

Where the paper has DINO, "object" stands here: the likeness of the middle of a picture to that of the true
picture of its scene, which only a drawn world has, in the features of Tiny World's image tower; "outside"
is the same by an ImageNet network that no training or choice ever saw. Likeness of whole pictures to whole
photos, which was tried first, does not measure subjects there. Drift is 0 where pictures without the subject
are the base's own, and 1 where they are as far from them as those of another prompt; diversity is the mean
distance (1 − cosine) between pictures of one prompt. Learning rates were chosen by likeness, steps, blocks
and target modules by the loss, on subjects that the benchmark has not. Runs of the benchmark, of control, of
photos and steps, and of ETHER+ on v, out at all rates were trained and drawn on an H100 (in float32; control
was trained in bfloat16) and scored on a CPU; a CPU's pictures of the base score the same, within 0.0001.
"""
BY_LOSS = {
    "strength": "Methods and rates by loss",
    "steps": "Steps by loss",
    "taken_out": "What was taken out",
}
"""Titles of the studies by loss."""
LOSS_WORDS = {
    "strength": "The loss on true pictures of the subject in new scenes, and at the end the mean square "
    "change of what the base predicts of other things, over the same noise for all.",
    "steps": "The same for longer, of the rows of the benchmark, which takes 200 steps: after these the loss "
    "of DeLoRA alone falls by more than 2 %, that of most rises, and all change more of the base.",
    "taken_out": "Options that were built, held to their laws, and taken out again: strength=learned, "
    "W + λ (W' - W) with a trained λ for each weight; gradient_init, which starts it at 0 along the "
    "directions in which the loss of the first photos falls most; and num_reflections=4, W H₁ H₂ H₃ H₄. "
    "λ helped ETHER on both sides alone, where ETHER+ on the output side has fewer numbers, less loss and "
    "less change.",
}
CONTROL = {"control": "Semantic maps", "control_silhouette": "Silhouettes", "control_edges": "Edges"}
UNSEEN = "object_iou_of_unseen_concepts"
CONTROL_SCORES = {
    MIOU: "mIoU ↑",
    OBJECT_IOU: "IoU of the object ↑",
    UNSEEN: "of concepts unseen by the base ↑",
    CANNY_F1: "Canny F1 ↑",
}
CONTROL_HEAD = """## Control

Pictures of eight concepts that control never learned from, anywhere and turned, by what a segmenter and a
detector of edges find in them; ± is the standard error over concepts. All train a control encoder, and an
adapter beside it at its rate of the benchmark.
"""
PAIRS = (
    *(("ether", "ia3"), ("ether", "lora:rank=1"), (ADVISED, "lora:rank=1"), (ADVISED, "lora")),
    *(("ether_plus", "lora:rank=2"), ("ether_plus", "lora")),
    *(("ether_plus", "lora:rank=16"), ("ether_plus", "hra"), ("ether_plus", "oft")),
    *(("ether_plus", "delora"), ("ether_plus", ADVISED), ("ether_plus", "full")),
)
"""Rows of the benchmark that are compared."""
JUDGES = (OBJECT, "outside")
UNCONDITIONAL = "unconditional_strength"
WHOLE_MODEL = "full"
"""What is never advised: a file as large as the base is not what one takes for a subject."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write them. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with results/ (docs)")
    parser.add_argument("--curves", type=Path, help="file for ether plan (the package's own)")
    return run_command("write_results", lambda: parser.parse_args(arguments), _write)


def _write(parsed: argparse.Namespace) -> None:
    measured = Measured.read(parsed.docs / "results")
    page = results_page(measured, parsed.docs / "results")
    curves = json.dumps(curves_of(measured), indent=1, allow_nan=False)
    write_files(parsed.docs, {"results.md": page.encode()})
    target = parsed.curves or CURVES_FILE
    write_files(target.parent, {target.name: f"{curves}\n".encode()})


def results_page(measured: Measured, folder: Path) -> str:
    """Return the page; pictures that lie in the folder are shown."""
    parts = [HEAD, _claims(measured), _benchmark(measured), _rates(measured), _ranges(measured)]
    parts += [_photos(measured), *(_by_loss(measured, name, title) for name, title in BY_LOSS.items())]
    parts += [_control(measured), _unconditional(measured), _timesteps(measured), _pictures(folder)]
    return "\n".join([*(part for part in parts if part), _sources(measured)])


def _claims(measured: Measured) -> str:
    judged = [(claim, *claim.judge(measured)) for claim in CLAIMS]
    verdicts = [verdict for _, verdict, _ in judged]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(sorted(verdicts)))
    rows = [["", "the paper says", "where", "here", "numbers"]]
    rows += [
        [str(number), claim.statement, claim.source, f"**{verdict}**", numbers]
        for number, (claim, verdict, numbers) in enumerate(judged, start=1)
    ]
    return f"## The claims\n\n{len(judged)} claims: {counts}.\n\n{_markdown(rows)}"


def _benchmark(measured: Measured) -> str:
    try:
        summary: Mapping[str, Any] = measured.value("benchmark", "settings") and measured.files["benchmark"]
    except NotMeasuredError:
        return ""
    settings = summary["settings"]
    training = ", ".join(f"{name}={value}" for name, value in settings["training"].items())
    told = (
        f"{summary['num_done']} of {summary['num_runs']} runs: {len(summary['subjects'])} subjects "
        f"({', '.join(summary['subjects'])}) × {summary['num_prompts']} prompts × {settings['num_images']} "
        f"pictures, {len(summary['seeds'])} seed{'s' if len(summary['seeds']) > 1 else ''} of training, base "
        f"{settings['base']}; {training}; {settings['num_inference_steps']} denoising steps. "
        f"A row has {_numbers_of_runs(summary)} runs; ± is the standard error over subjects; the last step "
        f"is scored, none is chosen by its score.{_lacking(summary)}"
    )
    parts = [_markdown(table(summary)), _differences(summary), _pairs(measured)]
    return f"## The benchmark\n\n{told}\n\n" + "\n".join(part for part in parts if part)


def _lacking(summary: Mapping[str, Any]) -> str:
    """Say which rows have not all subjects, and how many they have."""
    done = {name: set[str]() for name in summary["methods"]}
    for run in summary["runs"]:
        done[run["method"]].add(run["subject"])
    labels, every = labels_of(done), len(summary["subjects"])
    few = [f"{labels[name]} ({len(of)})" for name, of in done.items() if 0 < len(of) < every]
    return f" Not of all subjects: {', '.join(few)}." if few else ""


def _numbers_of_runs(summary: Mapping[str, Any]) -> str:
    numbers = [row["num_runs"] for row in summary["methods"].values() if "parameters" in row]
    least, most = min(numbers, default=0), max(numbers, default=0)
    return f"{least}" if least == most else f"{least} to {most}"


def _differences(summary: Mapping[str, Any]) -> str:
    """Return how far each row is from the best, by each judge."""
    found = summary.get("differences", {})
    judges = [each for each in (found, found.get("outside")) if each and each["to_best"]]
    if not judges:
        return ""
    labels = labels_of(summary["methods"])
    rows = [["", *(COLUMNS[judge["column"]] for judge in judges)]]
    for method in judges[0]["to_best"]:
        told = [judge["to_best"].get(method) for judge in judges]
        rows.append([labels[method], *("-" if each is None else _within(**each) for each in told)])
    best = f"Less that of {labels[found['best']]} on the same subjects, with the 95 % interval over subjects"
    return f"{best}:\n\n{_markdown(rows)}"


def _pairs(measured: Measured) -> str:
    """Return how far rows of ETHER are from others, with as many parameters or more, by judge and drift."""
    methods = measured.value("benchmark", "methods")
    there = {name for row in methods.values() for name in row["scores"]}
    columns = [name for name in (*JUDGES, DRIFT) if name in there]
    rows = [["", "parameters", *(COLUMNS[column] for column in columns)]]
    labels = labels_of(methods)
    for one, other in PAIRS:
        try:
            values = [paired_values(measured, one, other, column) for column in columns]
        except NotMeasuredError:
            continue
        numbers = f"{methods[one]['parameters']:,} and {methods[other]['parameters']:,}"
        told = [_within(fmean(each), *interval(each)) for each in values]
        rows.append([f"{labels[one]} less {labels[other]}", numbers, *told])
    return f"By pairs:\n\n{_markdown(rows)}" if len(rows) > 1 else ""


def _within(mean: float, low: float, high: float, **_: object) -> str:
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _rates(measured: Measured) -> str:
    try:
        summary: Mapping[str, Any] = measured.value("rates", "settings") and measured.files["rates"]
    except NotMeasuredError:
        return ""
    told = (
        "As the benchmark, on other subjects and with one picture a prompt: its rates are those of the "
        f"greatest likeness here, by the first judge alone. {_subjects(summary)}."
    )
    return f"## Rates by likeness\n\n{told}\n\n{_markdown(table(summary))}"


def _ranges(measured: Measured) -> str:
    try:
        study: Mapping[str, Any] = measured.value("learning_rates", "usable_range")
    except NotMeasuredError:
        return ""
    file, labels = measured.files["learning_rates"], labels_of(study)
    rows = [["", "best rate", "usable", "ratio", "not between", "ratio by fidelity alone", "tried"]]
    for method, found in study.items():
        tried = ", ".join(file["methods"].get(method, {}))
        alone = file["range_by_fidelity_alone"].get(method)
        cells = ["-"] * 4
        if found is not None:
            missed = ", ".join(f"{rate:g}" for rate in found["missed"])
            cells = [
                f"{found['best']:g}",
                f"{found['lowest']:g} to {found['highest']:g}",
                _ratio(found),
                missed,
            ]
        rows.append([labels[method], *cells, _ratio(alone), tried])
    told = (
        "Usable is a rate whose fidelity, the likeness of the object to the true picture, is within 5 % of "
        "the method's best, and whose likeness to the prompts is no more than a tenth below the base's "
        f"({file['least_prompt']:.3f} or more). The ratio is of the greatest to "
        "the least usable rate, ≥ where that is the end of what was tried. "
        f"{_subjects(file)}; {file['steps']} steps."
    )
    return f"## Learning rates\n\n{told}\n\n{_markdown(rows)}"


def _subjects(file: Mapping[str, Any]) -> str:
    seeds = len(file["seeds"])
    return f"Subjects: {', '.join(file['subjects'])}; {seeds} seed{'s' if seeds > 1 else ''}"


def _ratio(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{'≥ ' if found['is_open'] else ''}{round(found['ratio'], 1):g}"


def _photos(measured: Measured) -> str:
    try:
        cells: Mapping[str, Any] = measured.value("photos", "photos")
    except NotMeasuredError:
        return ""
    file = measured.files["photos"]
    steps = list(dict.fromkeys(length for row in cells.values() for length in row))
    rows = [["photos", *(f"{length} steps" for length in steps), "enough"]]
    for number, row in cells.items():
        enough = file["enough_steps"][number]
        shown = [_cell(row[length]) if length in row else "-" for length in steps]
        rows.append([number, *shown, "-" if enough is None else str(enough)])
    base, label = file["base"], label_of(without_rate(file["method"]))
    told = (
        f"{label} at {file['learning_rate']:g}: likeness of the object to the true picture, "
        f"and the share recognised; without an adapter {base[OBJECT]:.3f} and {base[RECOGNISED]:.0%}. Enough "
        "are the fewest steps within 2 % of the best that keep the prompt. A subject of Tiny World is the "
        "same drawing in all of its photos, so that one says more than a real one would. "
        f"{_subjects(file)}."
    )
    return f"## Photos and steps\n\n{told}\n\n{_markdown(rows)}"


def _control(measured: Measured) -> str:
    """Return how well pictures follow each kind of control image, a table each."""
    tables = list[str]()
    for file, kind in CONTROL.items():
        if file not in measured.files:
            continue
        rows = [["", *CONTROL_SCORES.values(), "parameters"]]
        for name, row in measured.value(file, "rows").items():
            scores = {**row["scores"], UNSEEN: row[UNSEEN]}
            told = (str(Estimate(**scores[each])) for each in CONTROL_SCORES)
            numbers = "-" if row["parameters"] is None else f"{row['parameters']:,}"
            rows.append([title_of(name), *told, numbers])
        seeds = len(measured.value(file, "seeds"))
        tables.append(f"{kind}, {seeds} seed{'s' if seeds > 1 else ''}:\n\n{_markdown(rows)}")
    return "\n".join([CONTROL_HEAD, *tables]) if tables else ""


def _by_loss(measured: Measured, file_name: str, title: str) -> str:
    try:
        cells = measured.value(file_name, "methods")
    except NotMeasuredError:
        return ""
    file = measured.files[file_name]
    steps = list(dict.fromkeys(number for row in cells.values() for number in row))
    rows = [["", "rate", "parameters", *(f"loss, {number} steps" for number in steps), "change"]]
    for name, row in cells.items():
        if not all(row.values()):
            continue  # it diverged
        losses = [f"{row[number]['scene_loss']['mean']:.3f}" for number in steps]
        told = [label_of(without_rate(name)), f"{file['settings'][name]['learning_rate']:g}"]
        told += [f"{row[steps[0]]['parameters']['mean']:,.0f}", *losses]
        rows.append([*told, f"{row[steps[-1]]['prediction_drift']['mean']:.3f}"])
    told_of = f"{LOSS_WORDS[file_name]} Base {file['base']}. {_subjects(file)}."
    return f"## {title}\n\n{told_of}\n\n{_markdown(rows)}"


def _unconditional(measured: Measured) -> str:
    """Return how pictures change with the strength in the unconditional row, by subject."""
    try:
        runs = measured.value("unconditional", "runs")
    except NotMeasuredError:
        return ""
    scores = {(run["method"], run["subject"]): run["scores"] for run in runs}
    columns = (*JUDGES, PROMPT, RECOGNISED)
    rows = [["", "strength", *(COLUMNS[column] for column in columns)]]
    for row in dict.fromkeys(method for method, _ in scores):
        options = method_of(row)[1]
        if UNCONDITIONAL not in options:
            continue
        plain = row.replace(f"{UNCONDITIONAL}={options[UNCONDITIONAL]},", "")
        subjects = [subject for method, subject in scores if method == row]
        differences = (
            difference_of([scores[row, each][name] - scores[plain, each][name] for each in subjects])
            for name in columns
        )
        told = (f"{each.mean:+.3f} ± {each.standard_error:.3f}" for each in differences)
        rows.append([LABELS[method_of(row)[0]], f"{options[UNCONDITIONAL]:g}", *told])
    subjects = measured.value("unconditional", "subjects")
    told_of = (
        "An option of drawing that was taken out, too: what adapters' strengths were multiplied by in the "
        "half of guidance that is led away from (personalization guidance, arXiv:2508.00319). Less the score "
        "with 1, and the standard error over subjects: no score of ETHER+ rises by two of them, likeness "
        "falls at 0 and the prompt's at 0.5; with LoRA more is recognised, and neither judge sees it liker. "
        "`negative_adapters` of `ether serve` are the same, `{}` for 0. Base "
        f"{measured.value('unconditional', 'base')}, subjects: {', '.join(subjects)}; 16 pictures of each."
    )
    return f"## Strength in the unconditional row\n\n{told_of}\n\n{_markdown(rows)}"


def _timesteps(measured: Measured) -> str:
    try:
        cells = measured.value("timesteps", "schedules")
    except NotMeasuredError:
        return ""
    file = measured.files["timesteps"]
    steps = next(iter(next(iter(cells.values()))))
    scores = {"scene_loss": "loss on new scenes", "prediction_drift": "change of the base"}
    rows = [["s(t)", *scores.values()]]
    for schedule, row in cells.items():
        rows.append([schedule, *(str(Estimate(**row[steps][name])) for name in scores)])
    told = (
        "ETHER+ as W + s(t) (W' - W), trained and asked alike, with t from 0 without noise to 1: what T-LoRA "
        "does to LoRA. The scores are those of methods by loss. 1 - t, which is T-LoRA's way, learned "
        "less in each run; half of that, and the other way, as much as without, within 0.03, and the other "
        "way changed less of the base. It is no option of training: no LoRA file could hold it. "
        f"{_subjects(file)}; {steps} steps at {file['learning_rate']:g}, base {file['base']}."
    )
    return f"## Strength by timestep\n\n{told}\n\n{_markdown(rows)}"


def _cell(scores: Mapping[str, Any]) -> str:
    if OBJECT not in scores:
        return "nothing to see"
    return f"{Estimate(**scores[OBJECT])}, {scores[RECOGNISED]['mean']:.0%}"


def _pictures(folder: Path) -> str:
    pictures = sorted(path.name for path in folder.glob("*.png"))
    if not pictures:
        return ""
    shown = [f"![{Path(name).stem.replace('_', ' ')}]({folder.name}/{name})" for name in pictures]
    return "## Pictures\n\n" + "\n\n".join(shown) + "\n"


def _sources(measured: Measured) -> str:
    rows = [["file", "made by", ""]]
    rows += [
        [f"{name}.json", f"`{COMMANDS[name]}`", "" if name in measured.files else "not there yet"]
        for name in FILES
    ]
    return f"## Files\n\n{_markdown(rows)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def curves_of(measured: Measured) -> dict[str, Json]:
    """Return the numbers that advice rests on: scores and costs by method, and usable rates.

    Of a benchmark that is not complete, those of the rows with the most runs. Behind is what has 2 % less
    likeness than the best.
    """
    curves: dict[str, Json] = {"benchmark": None, "usable_range": None, "photos": _photos_of(measured)}
    if "learning_rates" in measured.files:
        curves["usable_range"] = measured.value("learning_rates", "usable_range")
    try:
        column, _ = measured.columns()
    except NotMeasuredError:
        return curves
    summary = measured.files["benchmark"]
    rows = {
        name: row
        for name, row in summary["methods"].items()
        if name != WHOLE_MODEL and "parameters" in row and row["scores"]
    }
    if not rows:
        return curves
    most = max(row["num_runs"] for row in rows.values())
    rows = {name: row for name, row in rows.items() if row["num_runs"] == most}
    best = max(rows, key=lambda name: rows[name]["scores"][column]["mean"])
    most_like = rows[best]["scores"][column]["mean"]
    kept = ("parameters", "bytes", "learning_rate")
    methods: dict[str, Json] = {
        name: {
            "likeness": row["scores"][column],
            "recognised": row["scores"].get(RECOGNISED),
            "is_behind": row["scores"][column]["mean"] < (1 - NEARLY) * most_like,
            DRIFT: row["scores"].get(DRIFT),
            **{each: row[each] for each in kept},
        }
        for name, row in rows.items()
    }
    curves["benchmark"] = {
        "base": summary["settings"]["base"],
        "column": column,
        "training": summary["settings"]["training"],
        "num_subjects": len(summary["subjects"]),
        "num_done": summary["num_done"],
        "num_runs": summary["num_runs"],
        "best": best,
        "methods": methods,
    }
    return curves


def _photos_of(measured: Measured) -> Json:
    """Return what the study of photos and steps found, without what advice does not say."""
    study = measured.files.get("photos")
    if study is None:
        return None
    return {
        "method": study["method"],
        "base": {OBJECT: study["base"][OBJECT]},
        "enough_steps": study["enough_steps"],
        "cells": {
            number: {
                steps: {OBJECT: scores[OBJECT]} if OBJECT in scores else {} for steps, scores in row.items()
            }
            for number, row in study["photos"].items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
