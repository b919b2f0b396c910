"""The flags of train-dreambooth and train-control, and what they make: preset, then file, then flags."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.flags import FlagParser, add_flag, add_flags
from ether_diffusion.options import option, shown
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.dreambooth import unknown_name
from ether_diffusion.training.config.files import read_config_file
from ether_diffusion.training.config.layers import stack
from ether_diffusion.training.config.legacy import LEGACY_OPTIONS, translate_legacy
from ether_diffusion.training.config.presets import PRESET_VALUES, PRESETS, PresetName

PROGRAM = "train-dreambooth"
USAGE = f"{PROGRAM} --instance_data_dir PATH --instance_prompt TEXT [flag …]"
EPILOG = (
    f"Example: {PROGRAM} --instance_data_dir photos --token sks --instance_prompt 'a {{token}} dog'. "
    "A switch is turned off by --no-NAME, and a number that may be absent by the word none. Old flags of "
    "diffusers' scripts are accepted, each with a line on what it became: "
    f"{', '.join(f'--{name}' for name in LEGACY_OPTIONS)}."
)
TITLES = {
    "base": "base model",
    "data": "photos and prompts",
    "prior": "prior preservation",
    "adapter": "adapter",
    "optimization": "optimization",
    "compute": "compute",
    "validation": "validation images",
    "evaluation": "evaluation in training",
    "output": "result, checkpoints, trackers, hub",
}
"""The title of each section's group in the help."""


@dataclass(frozen=True)
class Program:
    """A command that trains: what its help says, and the configuration that its flags make."""

    name: str
    usage: str
    description: str
    epilog: str
    config_type: type[DreamBoothConfig]
    titles: Mapping[str, str]


DREAMBOOTH = Program(
    PROGRAM,
    USAGE,
    "Train a personal adapter from a few photos of a subject.",
    EPILOG,
    DreamBoothConfig,
    TITLES,
)


@dataclass(frozen=True)
class CallFlags:
    """What is about this call, not about the run: none of it is saved."""

    config: Path | None = option(None, "File of options, .yaml, .toml or .json; flags outrank it.")
    preset: PresetName | None = option(
        None,
        f"Named set of options; a file and flags outrank it. {' '.join(map(': '.join, PRESETS.items()))}",
    )
    dry_run: bool = option(False, "Do one step and one validation image, say what the run costs, and stop.")
    allow_changes: bool = option(False, "Go on with a run whose settings or photos have changed.")
    debug: bool = option(False, "Show the traceback of an error.")
    hub_token: str | None = option(
        None, "Token for the hub, never saved; others on this machine can see it. Better: `hf auth login`."
    )


@dataclass(frozen=True)
class Call:
    """A configuration, how it is to be run, and what to tell about it.

    `given` are the options that a preset, a file or a flag gave, `by_flag` those that a flag gave, and
    `by_preset` those that only a preset gave.
    """

    config: DreamBoothConfig
    dry_run: bool
    allow_changes: bool
    hub_token: str | None
    given: frozenset[str]
    by_flag: frozenset[str]
    by_preset: frozenset[str]
    lines: tuple[str, ...]
    warnings: tuple[str, ...]


def dreambooth_parser(program: Program = DREAMBOOTH) -> FlagParser:
    """Return the parser of a command; parsed options that were not given are absent."""
    parser = FlagParser(program.name, program.usage, program.description, program.epilog)
    add_flags(parser.add_argument_group("this call"), CallFlags)
    for section, config_type in program.config_type.sections.items():
        add_flags(parser.add_argument_group(program.titles[section]), config_type, only_given=True)
    for name, legacy in LEGACY_OPTIONS.items():
        add_flag(parser, name, legacy.kind, None, argparse.SUPPRESS)
    return parser


def parse_flags(arguments: Sequence[str] | None = None, program: Program = DREAMBOOTH) -> argparse.Namespace:
    """Parse the command line; a flag that is not known ends the program with 2, naming the nearest."""
    parser = dreambooth_parser(program)
    parsed, rest = parser.parse_known_args(arguments)
    if rest:
        names = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
        known = (*program.config_type.option_names(), *CallFlags.__dataclass_fields__, *LEGACY_OPTIONS)
        parser.error(
            "; ".join(unknown_name(name, known) for name in names)
            or f"{shown(rest[0])} stands behind no flag"
        )
    return parsed


def read_call(parsed: argparse.Namespace, program: Program = DREAMBOOTH) -> Call:
    """Make the configuration of what was parsed.

    Raises:
        ValueError: options or a file that cannot be used; all problems of the options are listed.
        FileNotFoundError: there is no such file of options.
    """
    of_call = CallFlags.__dataclass_fields__.keys()
    in_file = {} if parsed.config is None else read_config_file(parsed.config)
    refused = sorted(of_call & in_file.keys())
    if refused:
        raise ValueError(f"{', '.join(refused)} in {parsed.config} is about one call; give it as a flag")
    in_file, warnings = translate_legacy(in_file)
    flags, warnings_on_flags = translate_legacy(
        {name: _as_json(value) for name, value in vars(parsed).items() if name not in of_call}
    )
    given = stack(in_file, flags)
    values = stack({} if parsed.preset is None else PRESET_VALUES[parsed.preset], given)
    config = program.config_type.from_flat(values)
    if parsed.hub_token is not None:
        _refuse_leak(config)
    if given.get("validation_epochs") is not None:
        warnings.append("validation_epochs is deprecated; use validation_steps")
    return Call(
        config,
        dry_run=parsed.dry_run,
        allow_changes=parsed.allow_changes,
        hub_token=parsed.hub_token,
        given=frozenset(values),
        by_flag=frozenset(flags),
        by_preset=frozenset(values.keys() - given.keys()),
        lines=_preset_lines(parsed.preset, values, given),
        warnings=(*warnings, *warnings_on_flags),
    )


def _preset_lines(
    preset: PresetName | None, values: Mapping[str, Json], given: Mapping[str, Json]
) -> tuple[str, ...]:
    if preset is None:
        return ()
    own = PRESET_VALUES[preset]
    sets = {name: value for name, value in own.items() if name in values and name not in given}
    taken = ", ".join(f"{name}={value}" for name, value in sets.items())
    outranked = [name for name in own if name not in sets]
    rest = f"; outranked: {', '.join(outranked)}" if outranked else ""
    return (f"preset {preset} sets {taken or 'nothing'}{rest}",)


def _refuse_leak(config: DreamBoothConfig) -> None:
    # a tracker keeps the command line: https://github.com/huggingface/diffusers/issues/6916
    if config.output.report_to in ("wandb", "all"):
        raise ValueError(
            "hub_token beside report_to=wandb would show the token to the tracker; use `hf auth login`"
        )


def _as_json(value: object) -> Json:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    assert value is None or isinstance(value, bool | int | float | str)
    return value
