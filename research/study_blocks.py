"""Learn Tiny World's subjects with n = 1, 4 and 16 blocks, on one side and on both, and compare.

`python -m research.study_blocks --output_dir runs/blocks` trains variants × blocks × subjects × seeds
adapters, about a minute each on one CPU core; stopped, the same command goes on. It writes blocks.json and
blocks.png.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from research.studying import run_study

logger = logging.getLogger(__name__)

SUBJECTS = ("fox", "taxi", "owl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4, 16], help="per side (1 4 16)")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100, help="of each training (100)")
    parser.add_argument("--inference_steps", type=int, default=15, help="of each picture (15)")
    parser.add_argument("--output_dir", type=Path, required=True)
    return run_study("study_blocks", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.durable_files import write_files
    from ether_diffusion.evaluation.figures import check_plotting
    from ether_diffusion.tiny_world.concepts import find_concept
    from research.blocks import (
        VARIANTS,
        by_blocks,
        carry_out,
        draw_bars,
        plan_runs,
    )

    check_plotting()
    for subject in parsed.subjects:
        find_concept(subject)
    results = {}
    for run in plan_runs(list(VARIANTS), parsed.blocks, parsed.subjects, parsed.seeds):
        results[run] = carry_out(
            run, parsed.output_dir, max_train_steps=parsed.steps, num_inference_steps=parsed.inference_steps
        )
        logger.info("%s: %s", run, json.dumps(results[run]))
    summary = by_blocks(results)
    found = {
        "steps": parsed.steps,
        "inference_steps": parsed.inference_steps,
        "subjects": list(parsed.subjects),
        "seeds": list(parsed.seeds),
        "runs": [{**asdict(run), "scores": dict(scores)} for run, scores in results.items()],
        "variants": {
            variant: {
                str(num_blocks): {name: asdict(each) for name, each in scores.items()}
                for num_blocks, scores in row.items()
            }
            for variant, row in summary.items()
        },
    }
    text = json.dumps(found, indent=1, allow_nan=False)
    write_files(parsed.output_dir, {"blocks.json": f"{text}\n".encode(), "blocks.png": draw_bars(summary)})


if __name__ == "__main__":
    sys.exit(main())
