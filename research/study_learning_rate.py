"""Train each method on Tiny World's subjects at learning rates over magnitudes, and plot what comes of it.

`python -m research.study_learning_rate --output_dir runs/rates` trains methods × rates × subjects × seeds
adapters, about forty seconds each on one CPU core; stopped, the same command goes on.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from research.studying import run_study

if TYPE_CHECKING:
    from ether_diffusion.evaluation.likeness import Estimate
    from research.kept_scores import Scores

logger = logging.getLogger(__name__)

METHODS = ("ether", "ether_plus", "lora", "oft", "hra", "delora", "full")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SUBJECTS = ("panda", "sailboat")
"""None of the benchmark, which takes its learning rates from here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write study.json and study.png. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, "boft"), metavar="NAME")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100, help="of each training (100)")
    parser.add_argument("--inference_steps", type=int, default=15, help="of each picture (15)")
    parser.add_argument("--output_dir", type=Path, required=True)
    return run_study("study_learning_rate", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.evaluation.figures import check_plotting
    from ether_diffusion.tiny_world.concepts import find_concept
    from research.learning_rate_plot import draw_study
    from research.learning_rates import by_rates, carry_out, carry_out_base, plan_runs

    check_plotting()
    for subject in parsed.subjects:
        find_concept(subject)
    steps = parsed.inference_steps
    base = [
        carry_out_base(subject, seed, parsed.output_dir, num_inference_steps=steps)
        for subject in dict.fromkeys(parsed.subjects)
        for seed in dict.fromkeys(parsed.seeds)
    ]
    results = {}
    for run in plan_runs(parsed.methods, parsed.learning_rates, parsed.subjects, parsed.seeds):
        results[run] = carry_out(
            run, parsed.output_dir, max_train_steps=parsed.steps, num_inference_steps=steps
        )
        logger.info("%s: %s", run, json.dumps(results[run]))
    summary = by_rates(results)
    study = _study(parsed, base, summary)
    text = json.dumps(study, indent=1, allow_nan=False)
    write_files(
        parsed.output_dir,
        {"study.json": f"{text}\n".encode(), "study.png": draw_study(summary, study["base"])},
    )
    for method, each in study["usable_range"].items():
        shown = (
            "none"
            if each is None
            else f"{each['lowest']:g} to {each['highest']:g}, {each['ratio']:.3g} times"
        )
        logger.info("%s: usable learning rates %s", method, shown)


def _study(
    parsed: argparse.Namespace,
    base: "Sequence[Scores]",
    summary: "Mapping[str, Mapping[float, Mapping[str, Estimate]]]",
) -> dict[str, Any]:
    """Return what the study came to, as an object for JSON."""
    from research.learning_rates import fidelity_range, least_prompt

    least = least_prompt(base)
    ranges = {method: fidelity_range(rates, least_prompt=least) for method, rates in summary.items()}
    by_fidelity = {method: fidelity_range(rates) for method, rates in summary.items()}
    return {
        "steps": parsed.steps,
        "inference_steps": parsed.inference_steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "base": {name: fmean(scores[name] for scores in base) for name in base[0]},
        "least_prompt": least,
        "methods": {
            method: {
                f"{rate:g}": {name: asdict(found) for name, found in scores.items()}
                for rate, scores in rates.items()
            }
            for method, rates in summary.items()
        },
        "usable_range": {name: None if found is None else asdict(found) for name, found in ranges.items()},
        "range_by_fidelity_alone": {
            name: None if found is None else asdict(found) for name, found in by_fidelity.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
