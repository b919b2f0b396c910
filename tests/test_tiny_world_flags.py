"""The command line of Tiny World's training."""

import argparse
import subprocess
import sys
from pathlib import Path

from ether_diffusion.flags import add_flags
from recipes.tiny_world.evaluate import EvaluationConfig, parse_config
from recipes.tiny_world.loop import RunConfig


def test_every_field_of_a_config_is_a_flag_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    assert RunConfig(**vars(parser.parse_args([]))) == RunConfig()


def test_flags_have_the_types_of_their_fields() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, RunConfig)
    words = ["--pause_file", "quiet", "--compiled", "--seed", "3", "--time_budget_minutes", "2"]
    config = RunConfig(**vars(parser.parse_args(words)))
    assert (config.pause_file, config.compiled, config.seed) == (Path("quiet"), True, 3)
    assert config.time_budget_minutes == 2.0


def test_the_evaluation_reads_its_command_line() -> None:
    assert parse_config(["--base", "elsewhere", "--outside"]) == EvaluationConfig(
        base="elsewhere", outside=True
    )


def test_the_help_has_every_flag_with_its_line() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=300))
    add_flags(parser, RunConfig)
    lines = parser.format_help()
    assert "Last part of the budget over which the rate falls to 5 %; 0: constant." in lines
    assert all(f"--{name}" in lines for name in RunConfig.model_fields)


def test_the_recipe_runs_from_the_checkout() -> None:
    command = [sys.executable, "-m", "recipes.tiny_world"]
    root = Path(__file__).parent.parent
    done = subprocess.run([*command, "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m recipes.tiny_world ")
    refused = subprocess.run([*command, "--stage", "nap"], cwd=root, capture_output=True, check=False)
    assert refused.returncode == 2
