"""What `ether evaluate` was asked for, checked before anything slow is loaded, and its results written."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ether_diffusion.bases import Base
    from ether_diffusion.metrics.report import Report
    from ether_diffusion.pipelines.sampling import Sampling

DRAWING = {
    "prompts": None,
    "other_prompts": None,
    "base": None,
    "seed": 0,
    "num_images": 4,
    "size": None,
    "steps": 30,
    "guidance_scale": None,
    "scheduler": None,
    "batch_size": 1,
    "dtype": None,
    "pictures": None,
}
"""The arguments that only drawing uses, with their defaults; None the base's or the adapter's own."""


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, and outputs that are there or cannot be written.

    Raises:
        FileExistsError, ValueError: as said.
    """
    if (arguments.adapter is None) == (arguments.generated is None):
        raise ValueError("give either an adapter to draw with, or --generated with pictures drawn before")
    following = arguments.control_pairs is not None
    if not following and arguments.photos is None:
        raise ValueError("found nothing to compare with; give --photos, or --control_pairs")
    if arguments.generated is not None:
        idle = [f"--{name}" for name in DRAWING if getattr(arguments, name) is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)} would change nothing: pictures of --generated are drawn")
    elif arguments.captions is not None:
        raise ValueError("--captions are of pictures drawn before, and there are none; give --generated")
    elif not following and not arguments.prompts:
        raise ValueError("found no --prompts; give a file with one a line, or some")
    outputs = [arguments.json, arguments.plot, arguments.pictures]
    for output in (output for output in outputs if output is not None):
        _check_new(output)
    named = [output.absolute() for output in outputs if output is not None]
    if len(set(named)) < len(named):
        raise ValueError(f"{named[0]} is named for two results; name two files")


def fill_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with what drawing takes where nothing was said."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return argparse.Namespace(**{**vars(arguments), **DRAWING, **given})


def read_prompts(values: list[str], flag: str) -> tuple[str, ...]:
    """Return prompts: those of a file, one a line without empty lines, or the values themselves.

    Raises:
        FileNotFoundError: one value that ends as a file of text, and there is none.
        ValueError: there are none, one is there twice, or the file is no text.
    """
    from ether_diffusion.training.captions import decode_text
    from ether_diffusion.training.plain_files import UnusableFileError
    from ether_diffusion.wording import printable

    prompts = [value.strip() for value in values]
    if len(values) == 1 and Path(values[0]).is_file():
        try:
            lines = decode_text(Path(values[0]).read_bytes()).split("\n")
        except UnusableFileError as reason:
            raise ValueError(f"{printable(values[0])} {reason}") from None
        prompts = [line.strip() for line in lines if line.strip()]
    elif len(values) == 1 and values[0].endswith(".txt"):
        raise FileNotFoundError(f"there is no file of prompts {printable(values[0])}")
    if not prompts or "" in prompts:
        raise ValueError(f"{flag} has an empty prompt or none; write one a line")
    twice = [prompt for prompt in dict.fromkeys(prompts) if prompts.count(prompt) > 1]
    if twice:
        raise ValueError(f"{flag} has {printable(twice[0])!r} twice; its pictures would be the same")
    return tuple(prompts)


def read_plan(
    arguments: argparse.Namespace, prompts: tuple[str, ...], base: "Base", adapter_name: str
) -> "Sampling":
    """Return what is to be drawn.

    Raises:
        ValueError: a flag is out of range, or does not fit the others.
    """
    from ether_diffusion.benchmark.evaluation import plan_sampling
    from ether_diffusion.metrics.scores import OTHER_PROMPTS, other_tiny_prompts
    from ether_diffusion.scripts.generate_request import read_size

    if arguments.num_images < 1:
        raise ValueError(f"--num_images is from 1; found {arguments.num_images}")
    if len(prompts) * arguments.num_images < 2:
        raise ValueError("this would be one picture; give more prompts or --num_images")
    if arguments.other_prompts:
        others = read_prompts(arguments.other_prompts, "--other_prompts")
    else:
        others = other_tiny_prompts() if is_tiny_world(base) else OTHER_PROMPTS
    guidance = arguments.guidance_scale
    width, height = read_size(arguments.size)
    return plan_sampling(
        prompts,
        others,
        {adapter_name: 1.0},
        seeds=range(arguments.seed, arguments.seed + arguments.num_images),
        steps=arguments.steps,
        guidance_scale=base.guidance_scale if guidance is None else guidance,
        width=width,
        height=height,
        batch_size=arguments.batch_size,
    )


def is_tiny_world(base: "Base") -> bool:
    """Say whether a base is the embedded one, which has an encoder of its own."""
    from ether_diffusion.tiny_world import WEIGHTS_FOLDER

    return base.folder.resolve() == WEIGHTS_FOLDER.resolve()


def _check_new(output: Path) -> None:
    if os.path.lexists(output):
        raise FileExistsError(f"{output} is there already; name a new one")
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"nothing can be written into {there}; name another place than {output}")


def write_results(arguments: argparse.Namespace, report: "Report", pictures: "Mapping[str, bytes]") -> None:
    """Write what was asked for, after all of it is made: a report that fails leaves nothing."""
    from ether_diffusion.durable_files import write_files, write_folder
    from ether_diffusion.metrics.plots import draw_report

    files: list[tuple[Path, bytes]] = []
    if arguments.json is not None:
        text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        files.append((arguments.json, f"{text}\n".encode()))
    if arguments.plot is not None:
        files.append((arguments.plot, draw_report(report)))
    for path, data in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: data})
    if pictures:
        arguments.pictures.parent.mkdir(parents=True, exist_ok=True)
        write_folder(arguments.pictures, pictures)
