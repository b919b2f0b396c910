"""The command `ether`: draw with adapters, measure, look into, export, merge and convert them, and more."""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from ether_diffusion.console import run_command
from ether_diffusion.flags import add_flags
from ether_diffusion.options import Options
from ether_diffusion.scripts import command_options as told


class Command(NamedTuple):
    """A command: the module whose function of its name carries it out, its options, and its help."""

    module: str
    options: type[Options]
    help: str
    description: str | None = None


COMMANDS = {
    "inspect": Command("adapter_commands", told.Inspect, "say what an adapter holds; loads no model"),
    "export": Command(
        "adapter_commands", told.Export, "write an adapter as a LoRA file, exactly, for other tools"
    ),
    "merge": Command(
        "adapter_commands", told.Merge, "write a whole model with the adapter merged into its weights"
    ),
    "convert": Command(
        "adapter_commands",
        told.Convert,
        "turn a language-model checkpoint of ETHER's authors into an adapter",
    ),
    "generate": Command(
        "generate_command", told.Generate, "draw pictures with an adapter, with their settings inside"
    ),
    "evaluate": Command(
        "evaluate_command",
        told.Evaluate,
        "measure an adapter: likeness to the photos and the prompts, drift from the base",
    ),
    "benchmark": Command(
        "benchmark_command",
        told.Benchmark,
        "compare methods: each learns several subjects, and is measured as in the ETHER paper",
        "Train every method on every subject, draw the protocol's prompts, and print the paper's "
        "table. Stopped or killed anywhere, the same command goes on; started several times with one "
        "--output_dir, as on several GPUs, they share the work.",
    ),
    "plan": Command(
        "benchmark_command", told.Plan, "say what to train with and for how long, and what that rests on"
    ),
    "bases": Command("doctor_command", told.Bases, "list the bases that lie on this machine"),
    "doctor": Command(
        "doctor_command",
        told.Doctor,
        "say what this machine has and can do: packages, memory, devices, the Hub, and a step of training",
    ),
    "ui": Command(
        "ui_command", told.Ui, "open the studio in a browser: train, draw and compare without commands"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: its own, or 2 for what the user can mend, in one sentence."""
    parser = argparse.ArgumentParser(prog="ether", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (_, options, said, description) in COMMANDS.items():
        own = commands.add_parser(name, help=said, description=description)
        parts = [part for part in options.__bases__ if issubclass(part, Options) and part.title]
        groups: list[type[Options]] = parts or [options]
        for part in groups:
            add_flags(own.add_argument_group(part.title) if part.title else own, part)
    return run_command(
        "ether", lambda: parser.parse_args(arguments), _run, say=lambda error: " ".join(str(error).split())
    )


def _run(parsed: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    command = COMMANDS[parsed.command]
    options = command.options(**{n: v for n, v in vars(parsed).items() if n not in ("debug", "command")})
    # what it works with takes seconds to import, for which no help waits
    work = getattr(import_module(f"ether_diffusion.scripts.{command.module}"), parsed.command)
    return work(options) or 0


if __name__ == "__main__":
    sys.exit(main())
