"""The command `ether evaluate`: is the subject there, is the prompt followed, and what was harmed?"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.scripts.drawing import (
    adapter_names,
    base_name,
    find_device,
    hush_libraries,
    metadata_of,
    open_with_adapters,
    show_progress,
    warn_of_cuts,
)
from ether_diffusion.scripts.evaluate_control import (
    add_control_flags,
    base_facts,
    check_control_arguments,
    is_tiny_world,
    measure_control,
    read_drawing,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ether_diffusion.bases import Base
    from ether_diffusion.metrics.report import Report, Yardsticks
    from ether_diffusion.metrics.samples import SortedSamples
    from ether_diffusion.pipelines.sampling import Sampling

# The library is imported inside the command: `ether --help` must not wait for torch.

DRAWING = (
    "prompts",
    "other_prompts",
    "base",
    "seed",
    "num_images",
    "size",
    "steps",
    "guidance_scale",
    "scheduler",
    "batch_size",
    "dtype",
    "pictures",
)
"""The arguments that only drawing uses."""
OUTSIDE_ENCODERS = ("dino", "dinov2", "clip")


def add_evaluate_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add evaluate to the commands of `ether`."""
    parser = commands.add_parser(
        "evaluate", help="measure an adapter: likeness to the photos and the prompts, drift from the base"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("adapter", nargs="?", help="folder or hub id of an adapter to draw with")
    what.add_argument("--photos", type=Path, help="folder of real photos of the subject")
    what.add_argument(
        "--prompts", nargs="+", help="file with a prompt a line, or prompts, that name the subject"
    )
    what.add_argument(
        "--other_prompts", nargs="+", help="the same without the subject, for drift (ten of everyday things)"
    )
    what.add_argument("--generated", type=Path, help="folder of pictures drawn before, instead of an adapter")
    what.add_argument(
        "--captions",
        type=Path,
        help='JSON Lines with their prompts, {"file_name": …, "text": …} (what PNGs of ours say themselves)',
    )
    with_what = parser.add_argument_group("measured with")
    with_what.add_argument(
        "--encoder",
        action="append",
        help="dino, dinov2, clip or tiny_world, a folder or a hub id; may be given several times "
        "(tiny_world for the embedded base, else dino, dinov2 and clip)",
    )
    with_what.add_argument(
        "--lpips_weights",
        type=Path,
        help="file with torchvision's weights of AlexNet (that in torch's cache, or no LPIPS)",
    )
    with_what.add_argument(
        "--identifier", help="a made-up word of the prompts, e.g. sks, that CLIP is not to compare with"
    )
    with_what.add_argument("--encoder_batch_size", type=int, default=16, help="pictures encoded at once (16)")
    add_control_flags(parser)
    _add_drawing(parser)
    result = parser.add_argument_group("result (new files; what is there is never overwritten)")
    result.add_argument("--json", type=Path, help="file for all numbers")
    result.add_argument("--plot", type=Path, help="PNG with the scores and their standard errors")
    result.add_argument(
        "--pictures",
        type=Path,
        help="folder for what is drawn: base/, adapter/, other_base/, other_adapter/",
    )
    parser.set_defaults(run=_evaluate)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how to draw")
    how.add_argument("--base", help="folder, hub id or tiny_world (the base that the adapter names)")
    how.add_argument("--seed", type=int, help="of the first picture of each prompt (0)")
    how.add_argument("--num_images", type=int, help="pictures per prompt, with seed, seed + 1, … (4)")
    how.add_argument("--size", help="width and height in px, as 512 or 512x768 (the base's own)")
    how.add_argument("--steps", type=int, help="denoising steps (30)")
    how.add_argument(
        "--guidance_scale", type=float, help="how closely to follow the prompt (the base's usual)"
    )
    how.add_argument("--scheduler", help="sampler, e.g. ddim, dpm++, euler (the base's own)")
    how.add_argument("--batch_size", type=int, help="pictures drawn at once (1)")
    how.add_argument("--device", help="cpu, cuda, … (the accelerator if there is one)")
    how.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(float32 on the CPU, else float16)"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    check_control_arguments(arguments)
    _check_arguments(arguments)
    hush_libraries()
    from ether_diffusion.benchmark.evaluation import read_photos
    from ether_diffusion.metrics.plots import check_plotting

    if arguments.plot is not None:
        check_plotting()
    if arguments.encoder_batch_size < 1:
        raise ValueError(f"--encoder_batch_size is from 1; found {arguments.encoder_batch_size}")
    pictures: Mapping[str, bytes] = {}
    if arguments.control_pairs is not None:
        report, pictures = measure_control(arguments)
    elif arguments.generated is not None:
        photos = read_photos(arguments.photos)
        report = _measure_generated(arguments, photos, find_device(arguments.device))
    else:
        photos = read_photos(arguments.photos)
        report, pictures = _draw_and_measure(arguments, photos, find_device(arguments.device))
    _write_results(arguments, report, pictures)
    print(report.table())


def _check_arguments(arguments: argparse.Namespace) -> None:
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
    outputs = [each for each in (arguments.json, arguments.plot, arguments.pictures) if each is not None]
    for output in outputs:
        if os.path.lexists(output):
            raise FileExistsError(f"{output} is there already; name a new one")
        there = next(parent for parent in output.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"nothing can be written into {there}; name another place than {output}")
    named = [output.absolute() for output in outputs]
    if len(set(named)) < len(named):
        raise ValueError(f"{named[0]} is named for two results; name two files")


def _measure_generated(
    arguments: argparse.Namespace, photos: "SortedSamples", device: "torch.device"
) -> "Report":
    from ether_diffusion.benchmark.evaluation import read_caption_file, read_generated
    from ether_diffusion.metrics.report import report_generated

    captions = None if arguments.captions is None else read_caption_file(arguments.captions)
    generated = read_generated(arguments.generated, captions)
    yardsticks = _load_yardsticks(arguments, OUTSIDE_ENCODERS, device)
    return report_generated(
        photos,
        generated,
        yardsticks,
        {
            "photos": arguments.photos.name,
            "generated": arguments.generated.name,
            "num_photos": len(photos.usable),
            "num_pictures": len(generated.usable),
            "identifier": arguments.identifier,
        },
    )


def _draw_and_measure(
    arguments: argparse.Namespace, photos: "SortedSamples", device: "torch.device"
) -> "tuple[Report, dict[str, bytes]]":
    """Draw what is asked for and return its report, with the pictures as files where these are wanted."""
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.bases import open_base
    from ether_diffusion.benchmark.evaluation import draw_samples, picture_files
    from ether_diffusion.metrics.report import OTHER, report_drawn
    from ether_diffusion.pipelines.opening import check_scheduler

    prompts = _read_prompts(arguments.prompts, "--prompts")
    (name,) = adapter_names([arguments.adapter])
    chosen = read_adapter(arguments.adapter)
    if not chosen.parts:
        raise ValueError(f"{arguments.adapter} is a control encoder by itself; give --control_pairs")
    if arguments.scheduler is not None:
        check_scheduler(arguments.scheduler)
    named = argparse.Namespace(base=arguments.base, adapter=[arguments.adapter])
    base = open_base(base_name(named, metadata_of([chosen])))
    sampling = _plan(arguments, prompts, base, name)
    defaults = ("tiny_world",) if is_tiny_world(base) else OUTSIDE_ENCODERS
    yardsticks = _load_yardsticks(arguments, defaults, device)
    warn_of_cuts(base, sampling.prompts)
    pipeline = open_with_adapters(
        base, {name: chosen}, device=device, dtype=arguments.dtype, scheduler=arguments.scheduler
    )
    drawn = draw_samples(pipeline, sampling, len(prompts), on_progress=show_progress)
    files = {}
    if arguments.pictures is not None:
        other = {f"{OTHER}_{row}": samples for row, samples in drawn.other.items()}
        files = picture_files({**drawn.subject, **other})
    settings = base_facts(arguments, base, sampling) | {
        "photos": arguments.photos.name,
        "num_photos": len(photos.usable),
        "prompts": list(prompts),
        "other_prompts": list(sampling.prompts[len(prompts) :]),
        "identifier": arguments.identifier,
        "width": sampling.width,
        "height": sampling.height,
        "batch_size": sampling.batch_size,
    }
    return report_drawn(photos, drawn, yardsticks, settings), files


def _plan(
    arguments: argparse.Namespace, prompts: tuple[str, ...], base: "Base", adapter_name: str
) -> "Sampling":
    """Return what is drawn: every prompt, then those of others, by the base and with the adapter."""
    from ether_diffusion.metrics.scores import OTHER_PROMPTS, other_tiny_prompts
    from ether_diffusion.pipelines.sampling import Sampling

    drawing = read_drawing(arguments, base, num_images=4)
    if len(prompts) * len(drawing["seeds"]) < 2:
        raise ValueError("this would be one picture; give more prompts or --num_images")
    if arguments.other_prompts:
        others = _read_prompts(arguments.other_prompts, "--other_prompts")
    else:
        others = other_tiny_prompts() if is_tiny_world(base) else OTHER_PROMPTS
    both = set(prompts) & set(others)
    if both:
        raise ValueError(f"{min(both)!r} is among the prompts with and without the subject; take one away")
    return Sampling(prompts=(*prompts, *others), choices=({}, {adapter_name: 1.0}), **drawing)


def _read_prompts(values: list[str], flag: str) -> tuple[str, ...]:
    """Return prompts: those of a file, one a line without empty lines, or the values themselves.

    Raises:
        FileNotFoundError: one value that ends as a file of text, and there is none.
        ValueError: there are none, one is there twice, or the file is no text.
    """
    from ether_diffusion.benchmark.evaluation import read_lines
    from ether_diffusion.wording import printable

    prompts = [value.strip() for value in values]
    if len(values) == 1 and Path(values[0]).is_file():
        prompts = [line.strip() for line in read_lines(Path(values[0])) if line.strip()]
    elif len(values) == 1 and values[0].endswith(".txt"):
        raise FileNotFoundError(f"there is no file of prompts {printable(values[0])}")
    if not prompts or "" in prompts:
        raise ValueError(f"{flag} has an empty prompt or none; write one a line")
    twice = [prompt for prompt in dict.fromkeys(prompts) if prompts.count(prompt) > 1]
    if twice:
        raise ValueError(f"{flag} has {printable(twice[0])!r} twice; its pictures would be the same")
    return tuple(prompts)


def _load_yardsticks(
    arguments: argparse.Namespace, defaults: tuple[str, ...], device: "torch.device"
) -> "Yardsticks":
    from ether_diffusion.metrics.encoders import load_encoder
    from ether_diffusion.metrics.lpips import find_lpips
    from ether_diffusion.metrics.report import Yardsticks

    encoders = [
        load_encoder(name, device=device, batch_size=arguments.encoder_batch_size)
        for name in arguments.encoder or defaults
    ]
    kinds = [encoder.kind for encoder in encoders]
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"found several encoders of the kind {twice[0]}; measure with one at a time")
    lpips, problem = find_lpips(arguments.lpips_weights, device=device)
    left_out = {} if problem is None else {"lpips": problem}
    return Yardsticks(encoders, lpips, arguments.identifier, left_out)


def _write_results(arguments: argparse.Namespace, report: "Report", pictures: "Mapping[str, bytes]") -> None:
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
