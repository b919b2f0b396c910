"""What the commands of studies share: how one is run, and how its errors are said."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from ether_diffusion.scripts.starting import start_command

USER_ERROR = 2


def run_study(
    name: str,
    parser: argparse.ArgumentParser,
    study: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the arguments and carry out a study. Return 0, or 2 for what the user can mend, in a sentence."""
    start_command()
    parsed = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        study(parsed)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USER_ERROR
    return 0
