"""docs/results.md: every claim of the paper with its verdict, and the tables behind it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.benchmark.summary import LABELS, table
from ether_diffusion.evaluation.columns import OBJECT, RECOGNISED
from ether_diffusion.evaluation.likeness import Estimate
from ether_diffusion.evaluation.report import shown_estimate
from research.claims import CLAIMS
from research.measured import FILES, Measured, NotMeasuredError

COMMANDS = {
    "benchmark": "ether benchmark --output_dir runs/benchmark --num_processes 2 --keep_adapters",
    "learning_rates": "python -m research.study_learning_rate --output_dir runs/rates",
    "photos": "python -m research.study_photos --output_dir runs/photos",
    "blocks": "python -m research.study_blocks --output_dir runs/blocks",
    "energy": "python -m research.study_energy --adapters runs/benchmark --output_dir runs/energy",
    "transforms": "python -m research.study_transforms --output_dir runs/transforms",
    "cost": "python -m research.study_cost --latent 32 --rounds 3 --output_dir runs/cost",
    "control": "python -m research.study_control --output_dir runs/control",
}
"""What makes each file; its study.json or own JSON is copied into docs/results."""
HEAD = """# What was measured, and what of the paper it bears out

Written by `python -m research.write_results` from the files in `docs/results`; edit neither by hand. The
paper is ETHER, Bini et al. 2024, [arXiv:2405.20271](https://arxiv.org/abs/2405.20271).

Nothing here was trained on SD 1.5: subjects, blocks, learning rates, transforms and control are of the
embedded base, Tiny World (64 × 64 px), so "reproduced" means that the paper's **order** holds there, not its
figures. Parameters are counted on SD 1.5's UNet. That one method scores more than another is called
reproduced only if the difference on the same subjects is more than two standard errors above zero; the rules
are functions in `research/`, one for each claim.

Where the paper has DINO, "object" stands here: the likeness of the middle of a picture to that of the true
picture of its scene, which only a drawn world has, in the features of Tiny World's image tower. Likeness of
whole pictures to whole photos, which was tried first, does not measure subjects there: the true pictures of
a sailboat on new backgrounds have 0.159, the base, which knows no sailboat, 0.172. That was seen in the study
of learning rates, before the benchmark below was run. Learning rates are the best of that study, for all
methods alike, on subjects that the benchmark has not.
"""


def results_page(measured: Measured, folder: Path) -> str:
    """Return the page; pictures that lie in the folder are shown."""
    parts = [HEAD, _claims(measured), _benchmark(measured), _ranges(measured)]
    parts += [_photos(measured), _pictures(folder)]
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
        "± is the standard error over subjects; the last step is scored, none is chosen by its score."
    )
    return f"## Subjects, in the paper's columns\n\n{told}\n\n{_markdown(table(summary))}"


def _ranges(measured: Measured) -> str:
    try:
        study: Mapping[str, Any] = measured.value("learning_rates", "usable_range")
    except NotMeasuredError:
        return ""
    file = measured.files["learning_rates"]
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
        rows.append([LABELS.get(method, method), *cells, _ratio(alone), tried])
    seeds = len(file["seeds"])
    told = (
        "Usable is a rate whose fidelity, the likeness of the object to the true picture, is within 5 % of "
        "the method's best, and whose likeness to the prompts is no more than a tenth below the base's "
        f"({file['least_prompt']:.3f} or more). The ratio is of the greatest to "
        "the least usable rate, ≥ where that is the end of what was tried. Subjects: "
        f"{', '.join(file['subjects'])}; {file['steps']} steps; {seeds} seed{'s' if seeds > 1 else ''}."
    )
    return f"## Learning rates\n\n{told}\n\n{_markdown(rows)}"


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
    base = file["base"]
    told = (
        f"{LABELS[file['method']]} at {file['learning_rate']:g}: likeness of the object to the true picture, "
        f"and the share recognised; without an adapter {base[OBJECT]:.3f} and {base[RECOGNISED]:.0%}. Enough "
        "are the fewest steps within 5 % of the best that keep the prompt. A subject of Tiny World is the "
        "same drawing in all of its photos, so that one says more than a real one would. Subjects: "
        f"{', '.join(file['subjects'])}; {len(file['seeds'])} seed{'s' if len(file['seeds']) > 1 else ''}."
    )
    return f"## Photos and steps\n\n{told}\n\n{_markdown(rows)}"


def _cell(scores: Mapping[str, Any]) -> str:
    if OBJECT not in scores:
        return "nothing to see"
    return f"{shown_estimate(Estimate(**scores[OBJECT]))}, {scores[RECOGNISED]['mean']:.0%}"


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
