"""Draw with the embedded base under random transforms of growing strength: ETHER, ETHER+, OFT and none.

`python -m research.study_transforms --output_dir runs/transforms` trains nothing and takes a few minutes on
one CPU core. It writes transforms.json, transforms.png and transforms_sheet.png.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from research.study import run_study, study_parser, write_study

logger = logging.getLogger(__name__)

METHODS = ("ether", "ether_plus", "ether_plus_one_sided", "oft", "naive")
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 0.97)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME")
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS, help="from 0 to below 1")
    parser.add_argument("--inference_steps", type=int, default=20, help="of each picture (20)")
    parser.add_argument("--seed", type=int, default=0)
    return run_study("study_transforms", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from ether_diffusion.pipelines.metadata import png_bytes
    from research.transforms import carry_out, check_strength, draw_curves, draw_sheet

    for strength in parsed.strengths:
        check_strength(strength)
    study = carry_out(
        tuple(dict.fromkeys(parsed.methods)),
        sorted(set(parsed.strengths)),
        num_inference_steps=parsed.inference_steps,
        seed=parsed.seed,
        on_progress=logger.info,
    )
    found = {"inference_steps": parsed.inference_steps, "seed": parsed.seed, **study.to_json()}
    sheet = png_bytes(draw_sheet(study, prompt=0))
    write_study(parsed.output_dir, "transforms", found, transforms=draw_curves(study), transforms_sheet=sheet)


if __name__ == "__main__":
    sys.exit(main())
