"""The command `ether`: draw with adapters, measure them, look into them, export, merge and convert them."""

import argparse
import logging
import sys
from collections.abc import Sequence

from ether_diffusion.console import run_command
from ether_diffusion.scripts.adapter_commands import add_adapter_commands
from ether_diffusion.scripts.benchmark_command import add_benchmark_command
from ether_diffusion.scripts.evaluate_command import add_evaluate_command
from ether_diffusion.scripts.generate_command import add_generate_command
from ether_diffusion.scripts.plan_command import add_plan_command
from ether_diffusion.scripts.ui_command import add_ui_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: its own, or 2 for what the user can mend, in one sentence."""
    parser = argparse.ArgumentParser(prog="ether", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    add_adapter_commands(commands)
    add_generate_command(commands)
    add_evaluate_command(commands)
    add_benchmark_command(commands)
    add_plan_command(commands)
    add_ui_command(commands)
    return run_command(
        "ether", lambda: parser.parse_args(arguments), _run, say=lambda error: " ".join(str(error).split())
    )


def _run(parsed: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    return parsed.run(parsed) or 0


if __name__ == "__main__":
    sys.exit(main())
