"""The command `ether`: draw with adapters, measure, look into, export, merge and convert them, and more."""

import argparse
import inspect
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from ether_diffusion.console import run_command
from ether_diffusion.flags import add_flags
from ether_diffusion.options import Options
from ether_diffusion.scripts import command_options as told
from ether_diffusion.serving.options import Serve

COMMANDS: dict[str, tuple[str, type[Options]]] = {
    "inspect": ("adapter_commands", told.Inspect),
    "export": ("adapter_commands", told.Export),
    "merge": ("adapter_commands", told.Merge),
    "mix": ("adapter_commands", told.Mix),
    "convert": ("adapter_commands", told.Convert),
    "generate": ("generate_command", told.Generate),
    "evaluate": ("evaluate_command", told.Evaluate),
    "benchmark": ("benchmark_command", told.Benchmark),
    "plan": ("benchmark_command", told.Plan),
    "bases": ("doctor_command", told.Bases),
    "doctor": ("doctor_command", told.Doctor),
    "serve": ("serve_command", Serve),
    "ui": (".ui.server", told.Ui),
}
"""The modules, seen from here, whose functions of these names carry them out, and what these are told."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: its own, or 2 for what the user can mend, in one sentence."""
    parser = argparse.ArgumentParser(prog="ether", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (_, options) in COMMANDS.items():
        said, _, more = (inspect.getdoc(options) or "").partition("\n\n")
        short = said[:1].lower() + said[1:].removesuffix(".")
        own = commands.add_parser(name, help=short, description=more or None)
        parts = [part for part in options.__bases__ if issubclass(part, Options) and part.title]
        for part in parts or [options]:
            add_flags(own.add_argument_group(part.title) if part.title else own, part)
    return run_command(
        "ether", lambda: parser.parse_args(arguments), _run, say=lambda error: " ".join(str(error).split())
    )


def _run(parsed: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    module, options = COMMANDS[parsed.command]
    given = options(**{n: value for n, value in vars(parsed).items() if n not in ("debug", "command")})
    # what it works with takes seconds to import, for which no help waits
    work = getattr(import_module(f".{module}", "ether_diffusion.scripts"), parsed.command)
    return work(given) or 0


if __name__ == "__main__":
    sys.exit(main())
