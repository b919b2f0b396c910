"""The command `ether evaluate`: is the subject there, is the prompt followed, and what was harmed?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.adapters import read_adapter
from ether_diffusion.bases import Base, open_base
from ether_diffusion.benchmark.evaluation import (
    draw_samples,
    picture_files,
    read_caption_file,
    read_generated,
    read_lines,
    read_photos,
)
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.lpips import find_lpips
from ether_diffusion.metrics.plots import check_plotting, draw_report
from ether_diffusion.metrics.report import OTHER, Report, Yardsticks, report_drawn, report_generated
from ether_diffusion.metrics.scores import OTHER_PROMPTS, SortedSamples, other_tiny_prompts
from ether_diffusion.pipelines.opening import check_scheduler
from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts.drawing import (
    adapter_names,
    check_new,
    drawing,
    find_base,
    find_device,
    hush_libraries,
    open_with_adapters,
    show_progress,
    warn_of_cuts,
)
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS, WEIGHTS_FOLDER
from ether_diffusion.wording import printable

DRAWING = ("prompts", "other_prompts", "base", "seed", "num_images", "size", "steps", "guidance_scale",
           "scheduler", "batch_size", "dtype", "pictures")  # fmt: skip
"""The options that only drawing uses."""
CONTROL = ("control_type", "segmenter", "palette", "landmarks")
"""Those that mean nothing without --control_pairs."""
NOT_CONTROL = ("photos", "prompts", "other_prompts", "captions", "identifier", "lpips_weights")
"""Those that mean nothing with it."""
OUTSIDE_ENCODERS = ("dino", "dinov2", "clip")

Files = Mapping[str, bytes]


def evaluate(options: told.Evaluate) -> None:
    """Measure, write what was asked for, and print the table."""
    _check(options)
    hush_libraries()
    if options.plot is not None:
        check_plotting()
    if options.encoder_batch_size < 1:
        raise ValueError(f"--encoder_batch_size is from 1; found {options.encoder_batch_size}")
    pictures: Files = {}
    if options.control_pairs is not None:
        from ether_diffusion.scripts.evaluate_control import measure_control

        report, pictures = measure_control(options, options.control_pairs)
    else:
        assert options.photos is not None
        photos, device = read_photos(options.photos), find_device(options.device)
        if options.generated is not None:
            report = _measure_generated(options, options.generated, photos, device)
        else:
            report, pictures = _draw_and_measure(options, photos, device)
    files: list[tuple[Path, bytes]] = []  # all of it is made first: a report that fails leaves nothing
    if options.json_ is not None:
        text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        files.append((options.json_, f"{text}\n".encode()))
    if options.plot is not None:
        files.append((options.plot, draw_report(report)))
    for path, data in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: data})
    if pictures and options.pictures is not None:
        options.pictures.parent.mkdir(parents=True, exist_ok=True)
        write_folder(options.pictures, pictures)
    print(report.table())


def _check(options: told.Evaluate) -> None:
    """Refuse what does not go together, and outputs that are there or cannot be written."""
    follows = options.control_pairs is not None

    def given(names: tuple[str, ...]) -> str:
        return ", ".join(f"--{name}" for name in names if getattr(options, name) is not None)

    if follows and given(NOT_CONTROL):
        raise ValueError(f"{given(NOT_CONTROL)} would change nothing with --control_pairs; leave out")
    if not follows and given(CONTROL):
        raise ValueError(f"{given(CONTROL)} would change nothing without --control_pairs")
    if (options.adapter is None) == (options.generated is None):
        raise ValueError("give either an adapter to draw with, or --generated with pictures drawn before")
    if not follows and options.photos is None:
        raise ValueError("found nothing to compare with; give --photos, or --control_pairs")
    if options.generated is not None and given(DRAWING):
        raise ValueError(f"{given(DRAWING)} would change nothing: pictures of --generated are drawn")
    if options.generated is None and options.captions is not None:
        raise ValueError("--captions are of pictures drawn before, and there are none; give --generated")
    if options.generated is None and not follows and not options.prompts:
        raise ValueError("found no --prompts; give a file with one a line, or some")
    outputs = [each for each in (options.json_, options.plot, options.pictures) if each is not None]
    for output in outputs:
        check_new(output)
    if len({output.absolute() for output in outputs}) < len(outputs):
        raise ValueError(f"{outputs[0].absolute()} is named for two results; name two files")


def _measure_generated(
    options: told.Evaluate, folder: Path, photos: SortedSamples, device: torch.device
) -> Report:
    captions = None if options.captions is None else read_caption_file(options.captions)
    generated = read_generated(folder, captions)
    facts: dict[str, Json] = _photo_facts(options, photos) | {
        "generated": folder.name,
        "num_pictures": len(generated.usable),
    }
    return report_generated(photos, generated, _yardsticks(options, OUTSIDE_ENCODERS, device), facts)


def _draw_and_measure(
    options: told.Evaluate, photos: SortedSamples, device: torch.device
) -> tuple[Report, Files]:
    """Draw what is asked for and return its report, with the pictures as files where these are wanted."""
    assert options.adapter is not None
    assert options.prompts is not None
    prompts = _read_prompts(options.prompts, "--prompts")
    (name,) = adapter_names([options.adapter])
    chosen = read_adapter(options.adapter)
    if not chosen.parts:
        raise ValueError(f"{options.adapter} is a control encoder by itself; give --control_pairs")
    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    base = open_base(find_base(options.base, {options.adapter: chosen}))
    how = read_drawing(options, base, num_images=4)
    if len(prompts) * len(how["seeds"]) < 2:
        raise ValueError("this would be one picture; give more prompts or --num_images")
    others = other_tiny_prompts() if is_tiny_world(base) else OTHER_PROMPTS
    if options.other_prompts:
        others = _read_prompts(options.other_prompts, "--other_prompts")
    both = set(prompts) & set(others)
    if both:
        raise ValueError(f"{min(both)!r} is among the prompts with and without the subject; take one away")
    sampling = Sampling(prompts=(*prompts, *others), choices=({}, {name: 1.0}), **how)
    yardsticks = _yardsticks(options, (ALIAS,) if is_tiny_world(base) else OUTSIDE_ENCODERS, device)
    warn_of_cuts(base, sampling.prompts)
    pipeline = open_with_adapters(
        base, {name: chosen}, device=device, dtype=options.dtype, scheduler=options.scheduler
    )
    drawn = draw_samples(pipeline, sampling, len(prompts), on_progress=show_progress)
    other = {f"{OTHER}_{row}": samples for row, samples in drawn.other.items()}
    files = {} if options.pictures is None else picture_files({**drawn.subject, **other})
    facts = base_facts(options, base, sampling) | _photo_facts(options, photos)
    facts |= {
        "prompts": list(prompts),
        "other_prompts": list(others),
        "width": sampling.width,
        "height": sampling.height,
        "batch_size": sampling.batch_size,
    }
    return report_drawn(photos, drawn, yardsticks, facts), files


def _photo_facts(options: told.Evaluate, photos: SortedSamples) -> dict[str, Json]:
    assert options.photos is not None
    return {
        "photos": options.photos.name,
        "num_photos": len(photos.usable),
        "identifier": options.identifier,
    }


def is_tiny_world(base: Base) -> bool:
    """Say whether a base is the embedded one, which has an encoder of its own."""
    return base.folder.resolve() == WEIGHTS_FOLDER.resolve()


def read_drawing(options: told.Evaluate, base: Base, *, num_images: int) -> dict[str, Any]:
    """Return how pictures are drawn, `num_images` where nothing else was asked for."""
    number = num_images if options.num_images is None else options.num_images
    if number < 1:
        raise ValueError(f"--num_images is from 1; found {number}")
    first = options.seed or 0
    return {"seeds": tuple(range(first, first + number)), **drawing(options, base)}


def base_facts(options: told.Evaluate, base: Base, drawn: Any) -> dict[str, Json]:
    """Return what a report says of what was drawn, and how."""
    return {
        "adapter": Path(options.adapter or "").name,
        "base": Path(base.name).name if Path(base.name).is_absolute() else base.name,
        "seeds": list(drawn.seeds),
        "steps": drawn.steps,
        "guidance_scale": drawn.guidance_scale,
        "scheduler": options.scheduler,
    }


def _read_prompts(values: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Return prompts: those of a file, one a line without empty lines, or the values themselves."""
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


def _yardsticks(options: told.Evaluate, defaults: tuple[str, ...], device: torch.device) -> Yardsticks:
    encoders = [
        load_encoder(name, device=device, batch_size=options.encoder_batch_size)
        for name in options.encoder or defaults
    ]
    kinds = [encoder.kind for encoder in encoders]
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"found several encoders of the kind {twice[0]}; measure with one at a time")
    lpips, problem = find_lpips(options.lpips_weights, device=device)
    return Yardsticks(encoders, lpips, options.identifier, {} if problem is None else {"lpips": problem})
