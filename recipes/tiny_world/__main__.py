"""Train Tiny World: `python -m recipes.tiny_world --stage autoencoder --time_budget_minutes 30`."""

import argparse
import logging
import sys

from ether_diffusion.console import run_command
from ether_diffusion.flags import add_flags
from recipes.tiny_world.loop import RunConfig
from recipes.tiny_world.stages import STAGES, run_stage


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: the stage, and one flag for each field of RunConfig."""
    parser = argparse.ArgumentParser("python -m recipes.tiny_world", description=__doc__)
    parser.add_argument("--stage", required=True, choices=STAGES, help="What to train or prepare.")
    add_flags(parser, RunConfig)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, build the config, run the stage. Return 0, or 2 for what the user can mend."""
    return run_command("train_tiny_world", lambda: parse_arguments(arguments), _run)


def _run(parsed: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = vars(parsed)
    stage = options.pop("stage")
    run_stage(stage, RunConfig(**options))


if __name__ == "__main__":
    sys.exit(main())
