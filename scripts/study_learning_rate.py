"""Train each method on Tiny World's subjects at learning rates over magnitudes, and plot what comes of it.

`python scripts/study_learning_rate.py --output_dir runs/rates` trains methods × rates × subjects × seeds
adapters, about a minute each on one CPU core; stopped, the same command goes on.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ether_diffusion.scripts.studying import run_study

logger = logging.getLogger(__name__)

METHODS = ("ether", "ether_plus", "lora", "oft", "hra", "delora", "full")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SUBJECTS = ("fox", "taxi")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write study.json and study.png. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, "boft"), metavar="NAME")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200, help="of each training (200)")
    parser.add_argument("--inference_steps", type=int, default=20, help="of each picture (20)")
    parser.add_argument("--output_dir", type=Path, required=True)
    return run_study("study_learning_rate", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.evaluation.learning_rate_plot import draw_study
    from ether_diffusion.evaluation.learning_rates import carry_out, fidelity_range, plan_runs, summarise
    from ether_diffusion.evaluation.plot import check_plotting
    from ether_diffusion.tiny_world.concepts import find_concept

    check_plotting()
    for subject in parsed.subjects:
        find_concept(subject)
    results = {}
    for run in plan_runs(parsed.methods, parsed.learning_rates, parsed.subjects, parsed.seeds):
        results[run] = carry_out(
            run, parsed.output_dir, max_train_steps=parsed.steps, num_inference_steps=parsed.inference_steps
        )
        logger.info("%s: %s", run, json.dumps(results[run]))
    summary = summarise(results)
    ranges = {method: fidelity_range(rates) for method, rates in summary.items()}
    study = {
        "steps": parsed.steps,
        "inference_steps": parsed.inference_steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "methods": {
            method: {
                f"{rate:g}": {name: asdict(found) for name, found in scores.items()}
                for rate, scores in rates.items()
            }
            for method, rates in summary.items()
        },
        "usable_range": {method: None if each is None else asdict(each) for method, each in ranges.items()},
    }
    text = json.dumps(study, indent=1, allow_nan=False)
    write_files(parsed.output_dir, {"study.json": f"{text}\n".encode(), "study.png": draw_study(summary)})
    for method, each in ranges.items():
        shown = "none" if each is None else f"{each.lowest:g} to {each.highest:g}, {each.ratio:.3g} times"
        logger.info("%s: usable learning rates %s", method, shown)


if __name__ == "__main__":
    sys.exit(main())
