"""Train methods on Tiny World's palette maps for equal steps, and compare how well they follow unseen ones.

`python -m research.study_control --output_dir runs/control` trains encoder-only, ETHER, ETHER+, LoRA and OFT,
about ten minutes each on one CPU core; stopped or killed, the same command goes on.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from research.study import run_study, study_parser

logger = logging.getLogger(__name__)

ENTRIES = ("none", "ether", "ether_plus", "lora", "oft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write its JSON, plot and sheet. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=ENTRIES,
        metavar="NAME[@RATE]",
        help="none is encoder-only; without a rate the paper's, where it has one (all five)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="updates of each training (300)")
    parser.add_argument("--batch_size", type=int, help="pairs of an update (16)")
    parser.add_argument("--num_pairs", type=int, help="scenes to learn from (1040)")
    parser.add_argument("--scenes_per_concept", type=int, help="drawn of each of eight concepts (18)")
    parser.add_argument("--inference_steps", type=int, help="of each picture (12)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="of training (bf16)")
    parser.add_argument("--results", type=Path, help="folder that gets the JSON, the plot and the sheet, too")
    return run_study("study_control", parser, _run, arguments)


def read_entry(text: str) -> tuple[str, float | None]:
    """Return method and rate of "oft@1e-4"; no rate is the method's own.

    Raises:
        ValueError: there is no such method, or the rate is no number above 0.
    """
    method, given, rate = text.partition("@")
    if method not in ENTRIES:
        raise ValueError(f"found the method {method!r}; use {', '.join(ENTRIES)}")
    if not given:
        return method, None
    try:
        found = float(rate)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"found the rate {rate!r} of {method}; use a number above 0")
    return method, found


def _run(parsed: argparse.Namespace) -> None:
    entries = [read_entry(text) for text in dict.fromkeys(parsed.methods)]
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.pipelines.metadata import png_bytes
    from research.control_plot import draw_study, study_sheet
    from research.control_results import (
        score_runs,
        study_json,
        study_table,
        tiny_yardsticks,
        true_run,
    )
    from research.control_study import StudyRun, StudySettings, carry_out, draw_base

    names = {field.name for field in fields(StudySettings)}
    given = {key: value for key, value in vars(parsed).items() if key in names and value is not None}
    settings, root, seeds = StudySettings(**given), parsed.output_dir, list(dict.fromkeys(parsed.seeds))
    runs = {"true": [true_run(settings)], "base": [draw_base(root, settings, seed) for seed in seeds]}
    for method, rate in entries:
        planned = [StudyRun(method, rate, seed) for seed in seeds]
        runs[planned[0].row] = [carry_out(run, root, settings) for run in planned]
        logger.info("%s is drawn", planned[0].row)
    yardsticks = tiny_yardsticks()
    rows = {name: score_runs(found, settings, yardsticks) for name, found in runs.items()}
    sheet = study_sheet({name: found[0] for name, found in runs.items()}, settings)
    files = {
        "control.json": study_json(rows, settings, seeds),
        "control.png": draw_study(rows),
        "control_sheet.png": png_bytes(sheet),
    }
    for folder in (root, *([parsed.results] if parsed.results else [])):
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, files)
    print(study_table(rows))


if __name__ == "__main__":
    sys.exit(main())
