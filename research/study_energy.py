"""Measure how saved adapters of any method change the hyperspherical energy of the base's attention weights.

`python -m research.study_energy --adapters runs/benchmark --output_dir runs/energy` takes seconds an
adapter; it trains nothing and writes energy.json and energy.png.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from research.study import run_study, study_parser, write_study

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study. Return 0, or 2 for what the user can mend."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--adapters",
        nargs="+",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of adapters, or of runs that hold some",
    )
    parser.add_argument("--base", default="tiny_world", help="what they were trained on (tiny_world)")
    return run_study("study_energy", parser, _run, arguments)


def _run(parsed: argparse.Namespace) -> None:
    from research.energy import carry_out, draw_bars, find_adapters

    study = carry_out(find_adapters(parsed.adapters), parsed.base, on_progress=logger.info)
    found = {"base": parsed.base, **study.to_json()}
    write_study(parsed.output_dir, "energy", found, energy=draw_bars(study))


if __name__ == "__main__":
    sys.exit(main())
