"""Train Tiny World: `python -m recipes.tiny_world --stage autoencoder --time_budget_minutes 30`."""

import argparse
import logging

from ether_diffusion.flags import add_flags
from recipes.tiny_world.loop import RunConfig
from recipes.tiny_world.stages import STAGES, run_stage


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line: the stage, and one flag for each field of RunConfig."""
    parser = argparse.ArgumentParser("python -m recipes.tiny_world", description=__doc__)
    parser.add_argument("--stage", required=True, choices=STAGES, help="What to train or prepare.")
    add_flags(parser, RunConfig)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse, build the config, run the stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = vars(parse_arguments(arguments))
    stage = options.pop("stage")
    run_stage(stage, RunConfig(**options))


if __name__ == "__main__":
    main()
