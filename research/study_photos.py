"""Train on subjects of Tiny World with few photos and with more, for long or not, and plot what comes of it.

`python -m research.study_photos --output_dir runs/photos` trains photos × steps × subjects × seeds adapters,
about a minute each on one CPU core; stopped, the same command goes on.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean

from research.studying import run_study

logger = logging.getLogger(__name__)

SUBJECTS = ("panda", "sailboat")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write photos.json and photos.png. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_photos", nargs="+", type=int, default=[1, 2, 4, 6], help="(1 2 4 6)")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[50, 100, 200, 400], help="of trainings (50 100 200 400)"
    )
    parser.add_argument("--method", default="ether", help="(ether, which ether plan advises)")
    parser.add_argument("--learning_rate", type=float, help="(the method's own for Tiny World)")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--inference_steps", type=int, default=15, help="of each picture (15)")
    parser.add_argument("--output_dir", type=Path, required=True)
    return run_study("study_photos", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.evaluation.benchmark.plan import TINY_LEARNING_RATES
    from ether_diffusion.evaluation.figures import check_plotting
    from ether_diffusion.tiny_world.concepts import find_concept
    from ether_diffusion.tiny_world.subjects import NUM_PHOTOS
    from research.learning_rates import carry_out_base, least_prompt
    from research.photos import PhotoRun, by_photos, draw_curves, enough_steps

    check_plotting()
    rate = parsed.learning_rate or TINY_LEARNING_RATES.get(parsed.method)
    if rate is None:
        raise ValueError(f"--method is one of {', '.join(TINY_LEARNING_RATES)}; found {parsed.method}")
    for subject in parsed.subjects:
        find_concept(subject)
    wrong = [count for count in parsed.num_photos if not 1 <= count <= NUM_PHOTOS]
    if wrong:
        raise ValueError(f"a subject of Tiny World has 1 to {NUM_PHOTOS} photos; asked for {wrong[0]}")
    steps = parsed.inference_steps
    base = [
        carry_out_base(subject, seed, parsed.output_dir, num_inference_steps=steps)
        for subject, seed in product(parsed.subjects, parsed.seeds)
    ]
    results = {}
    for subject, seed, num_photos, length in product(
        parsed.subjects, parsed.seeds, parsed.num_photos, parsed.steps
    ):
        run = PhotoRun(parsed.method, rate, num_photos, length, subject, seed)
        results[run] = run.carry_out(parsed.output_dir, steps)
        logger.info("%s: %s", run, json.dumps(results[run]))
    summary, least = by_photos(results), least_prompt(base)
    means = {name: fmean(scores[name] for scores in base) for name in base[0]}
    found = {
        "method": parsed.method,
        "learning_rate": rate,
        "inference_steps": steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "base": means,
        "least_prompt": least,
        "photos": {
            str(number): {
                str(length): {name: asdict(each) for name, each in scores.items()}
                for length, scores in row.items()
            }
            for number, row in summary.items()
        },
        "enough_steps": {str(number): enough_steps(row, least) for number, row in summary.items()},
    }
    text = json.dumps(found, indent=1, allow_nan=False)
    plot = draw_curves(summary, means, parsed.method)
    write_files(parsed.output_dir, {"photos.json": f"{text}\n".encode(), "photos.png": plot})


if __name__ == "__main__":
    sys.exit(main())
