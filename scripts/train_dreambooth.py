"""Train a personal adapter from a few photos: `train-dreambooth --instance_data_dir photos …`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from ether_diffusion.console import run_command, use_one_thread
from ether_diffusion.scripts.dreambooth_flags import DREAMBOOTH, Call, Program, parse_flags, read_call
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.training.config.ignored import find_ignored
from ether_diffusion.training.config.repaired import repaired_defaults
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; the exit code is 0, 130 or 143 if interrupted, or 2 for what the user can mend."""
    return run_program(DREAMBOOTH, arguments)


def run_program(program: Program, arguments: Sequence[str] | None) -> int:
    """Run one training by its command line; the exit code is as `main`'s."""
    return run_command(
        program.name,
        lambda: parse_flags(arguments, program),
        lambda parsed: run(parsed, program),
        say=lambda error: "\n".join(printable(line, 2000) for line in str(error).splitlines()),
    )


def run(parsed: argparse.Namespace, program: Program = DREAMBOOTH) -> int:
    """Build the configuration, say what is notable about it, and train.

    Raises:
        ValueError: the configuration or what it names cannot be used.
        OSError: a file cannot be read or written.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if speaks else logging.ERROR)
    # libraries report each request and each file at this level
    logging.getLogger("httpx").setLevel(logging.WARNING)
    call = read_call(parsed, program)
    announce(call)
    if call.config.base.pretrained_model_name_or_path == ALIAS:
        use_one_thread()
    # slow; what is wrong by now needs no wait
    from ether_diffusion.training.in_training import open_evaluator
    from ether_diffusion.training.run import train_dreambooth

    return train_dreambooth(
        call.config,
        allow_changes=call.allow_changes,
        dry_run=call.dry_run,
        hub_token=call.hub_token,
        open_evaluator=open_evaluator,
    )


def announce(call: Call) -> None:
    """Log what a preset set, which defaults are not diffusers', and which options are deprecated or idle."""
    for line in call.lines:
        logger.info("%s", line)
    for line in call.warnings:
        logger.warning("%s", line)
    for line in find_ignored(call.config, call.by_flag, preset=call.by_preset):
        logger.warning("%s", line)
    repaired = repaired_defaults(call.config, call.given)
    if repaired:
        logger.info("%s", repaired)


if __name__ == "__main__":
    sys.exit(main())
