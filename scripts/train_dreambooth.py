"""Train a personal adapter from a few photos: `train-dreambooth --instance_data_dir photos …`."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.console import run_command, use_one_thread
from ether_diffusion.flags import FlagParser, add_flag, add_flags
from ether_diffusion.options import Options, OptionsError, PathText, Text, declared, option, shown
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.training.config import DreamBoothConfig, OutputConfig, presets, unknown_name
from ether_diffusion.training.config.files import read_config_file, read_jobs_file
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A command that trains: what its help says, and the configuration that its flags make."""

    name: str
    usage: str
    description: str
    epilog: str
    config_type: type[DreamBoothConfig]


DREAMBOOTH = Program(
    "train-dreambooth",
    "train-dreambooth --instance_data_dir PATH --instance_prompt TEXT [flag …]",
    "Train a personal adapter from a few photos of a subject.",
    "Example: train-dreambooth --instance_data_dir photos --token sks --instance_prompt 'a {token} dog'. "
    "A switch is turned off by --no-NAME, and a number that may be absent by the word none. Old flags of "
    "diffusers' scripts are accepted, each with a line on what it became: "
    f"{', '.join(f'--{name}' for name in presets.OLD_NAMES)}.",
    DreamBoothConfig,
)
_PRESETS = " ".join(map(": ".join, presets.PRESETS.items()))


class CallFlags(Options):
    """What is about this call, not about the run: none of it is saved."""

    config: PathText | None = option(None, "File of options, .yaml, .toml or .json; flags outrank it.")
    preset: presets.PresetName | None = option(
        None, f"Named set of options; a file and flags outrank it. {_PRESETS}"
    )
    jobs: PathText | None = option(
        None,
        "List of runs, .yaml or .json, that are trained together; each has options of its own, which outrank "
        "flags, and needs an output_dir.",
    )
    ray: bool = option(False, "Spread jobs over a Ray cluster: that of RAY_ADDRESS, or this machine's.")
    dry_run: bool = option(False, "Do one step and one validation image, say what the run costs, and stop.")
    allow_changes: bool = option(False, "Go on with a run whose settings or photos have changed.")
    debug: bool = option(False, "Show the traceback of an error.")
    hub_token: Text | None = option(
        None, "Token for the hub, never saved; others on this machine can see it. Better: `hf auth login`."
    )


@dataclass(frozen=True)
class Call:
    """Configurations, how they are to be run, and what to say: facts, old names, what has no effect.

    Several `configs` are trained together; `spread` are those of one subject at several learning rates, by
    the folder that theirs lie in.
    """

    configs: tuple[DreamBoothConfig, ...]
    spread: Mapping[Path, tuple[DreamBoothConfig, ...]]
    is_list: bool
    ray: bool
    dry_run: bool
    allow_changes: bool
    hub_token: str | None
    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def config(self) -> DreamBoothConfig:
        """The only configuration, or the first."""
        return self.configs[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training; the exit code is 0, 130 or 143 if interrupted, or 2 for what the user can mend."""
    return run_program(DREAMBOOTH, arguments)


def run_program(program: Program, arguments: Sequence[str] | None) -> int:
    """Run one training by its command line; the exit code is as `main`'s."""
    return run_command(
        program.name,
        lambda: parse_flags(arguments, program),
        lambda parsed: _run(read_call(parsed, program)),
        say=lambda error: "\n".join(printable(line, 2000) for line in str(error).splitlines()),
    )


def make_parser(program: Program = DREAMBOOTH) -> FlagParser:
    """Return the parser of a command; parsed options that were not given are absent."""
    parser = FlagParser(program.name, program.usage, program.description, program.epilog)
    add_flags(parser.add_argument_group("this call"), CallFlags)
    for section in program.config_type.sections().values():
        add_flags(parser.add_argument_group(section.title), section, only_given=True)
    for name, old in presets.OLD_NAMES.items():
        add_flag(parser, name, old.kind, None, argparse.SUPPRESS)
    return parser


def parse_flags(arguments: Sequence[str] | None = None, program: Program = DREAMBOOTH) -> argparse.Namespace:
    """Parse the command line; a flag that is not known ends the program with 2, naming the nearest."""
    parser = make_parser(program)
    parsed, rest = parser.parse_known_args(arguments)
    if rest:
        known = [*program.config_type.options(), *declared(CallFlags), *presets.OLD_NAMES]
        names = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
        unknown = "; ".join(unknown_name(name, known) for name in names)
        parser.error(unknown or f"{shown(rest[0])} stands behind no flag")
    return parsed


def read_call(parsed: argparse.Namespace, program: Program = DREAMBOOTH) -> Call:
    """Make the configurations of what was parsed: the preset, the file, the flags, then each job's own.

    Options or a file that cannot be used are a ValueError or a FileNotFoundError.
    """
    preset, jobs = parsed.preset, [{}] if parsed.jobs is None else read_jobs_file(parsed.jobs)
    in_file = {} if parsed.config is None else read_config_file(parsed.config)
    in_file, warnings = _ours(in_file, str(parsed.config))
    flags, of_flags = presets.translate_old_names(
        {name: value for name, value in vars(parsed).items() if name not in declared(CallFlags)}
    )
    shared, said = presets.stack(in_file, flags), [*warnings, *of_flags]
    found, spread = list[DreamBoothConfig](), dict[Path, tuple[DreamBoothConfig, ...]]()
    lines, ignored, problems = list[str](), list[str](), list[str]()
    for number, job in enumerate(jobs, 1):
        own, warnings = _ours(job, f"job {number} of {parsed.jobs}")
        given = presets.stack(shared, own)
        values = presets.stack({} if preset is None else presets.PRESET_VALUES[preset], given)
        if parsed.jobs is not None and "output_dir" not in own:
            problems.append(f"job {number} of {parsed.jobs} has no output_dir; give it one of its own")
            continue
        try:
            configs = [program.config_type.from_flat(each) for each in _spread(values)]
        except OptionsError as error:
            place = "" if parsed.jobs is None else f"job {number} of {parsed.jobs}: "
            problems += [f"{place}{problem}" for problem in error.problems]
            continue
        found += configs
        if len(configs) > 1:
            spread[Path(str(values.get("output_dir", configs[0].output.output_dir.parent)))] = tuple(configs)
        old = ["validation_epochs is deprecated; use validation_steps"] * bool(given.get("validation_epochs"))
        said += [*warnings, *old]
        lines += [] if preset is None else [_preset_line(preset, values, given)]
        lines.append(configs[0].changed_defaults(values))
        ignored += configs[0].ignored({**flags, **own}, preset=values.keys() - given.keys())
    if problems:
        raise OptionsError(problems)
    # a tracker keeps the command line: https://github.com/huggingface/diffusers/issues/6916
    if parsed.hub_token is not None and any(each.output.report_to in ("wandb", "all") for each in found):
        raise ValueError(
            "hub_token beside report_to=wandb would show the token to the tracker; use `hf auth login`"
        )
    is_list = parsed.jobs is not None or len(found) > 1
    if parsed.dry_run and is_list:
        raise ValueError("dry_run is of one run; leave jobs out, and give one learning_rate")
    if parsed.ray and not is_list:
        raise ValueError("ray spreads jobs over machines; give a list of them as jobs")
    once = (tuple(dict.fromkeys(filter(None, each))) for each in (lines, said, ignored))
    of_call = parsed.dry_run, parsed.allow_changes, parsed.hub_token
    return Call(tuple(found), spread, is_list, parsed.ray, *of_call, *once)


def _ours(values: dict[str, Json], where: str) -> tuple[dict[str, Json], list[str]]:
    """Translate what a file says; it says nothing of this call."""
    if refused := sorted(declared(CallFlags).keys() & values.keys()):
        raise ValueError(f"{', '.join(refused)} in {where} is about one call; give it as a flag")
    return presets.translate_old_names(values)


def _spread(values: dict[str, Json]) -> list[dict[str, Json]]:
    """Return a flat configuration for each learning rate, several of them in folders of their own."""
    rates = values.get("learning_rate")
    if not isinstance(rates, list) or len(rates) < 2:
        return [values | {"learning_rate": rates[0]} if isinstance(rates, list) and rates else values]
    names = [
        f"learning_rate-{rate:g}" if isinstance(rate, float) else f"learning_rate-{rate}" for rate in rates
    ]
    if len({*names}) < len(names):
        raise OptionsError([f"learning_rate={shown(rates)} names one twice; give each once"])
    parent = str(values.get("output_dir", OutputConfig().output_dir))
    return [
        values | {"learning_rate": rate, "output_dir": f"{parent}/{name}"}
        for rate, name in zip(rates, names, strict=True)
    ]


def _preset_line(preset: presets.PresetName, values: Mapping[str, Json], given: Mapping[str, Json]) -> str:
    own = presets.PRESET_VALUES[preset]
    sets = [f"{name}={own[name]}" for name in own if name in values and name not in given]
    outranked = [name for name in own if name not in values or name in given]
    rest = f"; outranked: {', '.join(outranked)}" if outranked else ""
    return f"preset {preset} sets {', '.join(sets) or 'nothing'}{rest}"


def _run(call: Call) -> int:
    """Say what is notable about the configuration, and train."""
    speaks = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if speaks else logging.ERROR)
    # libraries report each request and each file at this level
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for level, said in ((logging.WARNING, (*call.warnings, *call.ignored)), (logging.INFO, call.lines)):
        for line in said:
            logger.log(level, "%s", line)
    if all(each.base.pretrained_model_name_or_path in EMBEDDED for each in call.configs):
        use_one_thread()
    wanted = os.environ.get("ACCELERATE_LOG_LEVEL", "INFO")  # accelerate stumbles over it when it is imported
    if wanted.upper() not in logging.getLevelNamesMapping():
        raise ValueError(
            f"ACCELERATE_LOG_LEVEL={printable(wanted)} is no level of logging; unset it, or use INFO"
        )
    # slow; what is wrong by now needs no wait
    if call.is_list:
        from ether_diffusion.training.jobs import train_jobs

        flags = {"allow_changes": call.allow_changes, "ray": call.ray}
        return train_jobs(call.configs, call.spread, **flags, hub_token=call.hub_token)
    from ether_diffusion.training.run import train_dreambooth

    flags = {"allow_changes": call.allow_changes, "dry_run": call.dry_run}
    return train_dreambooth(call.config, **flags, hub_token=call.hub_token)


if __name__ == "__main__":
    sys.exit(main())
