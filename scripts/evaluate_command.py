"""`ether evaluate`: is the subject there, is the prompt or control image followed, and what was harmed?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.adapters import Adapter, read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.benchmark import evaluation
from ether_diffusion.control.conditioning import encoder_of
from ether_diffusion.control.palette import read_palette
from ether_diffusion.durable_files import write_files, write_folder
from ether_diffusion.metrics.control_scores import (
    MIOU,
    PALETTE,
    SILHOUETTE,
    ControlYardsticks,
    check_classes,
    load_face_finder,
    load_finder,
    tiny_palette,
)
from ether_diffusion.metrics.encoders import Encoder, load_encoder
from ether_diffusion.metrics.lpips import find_lpips
from ether_diffusion.metrics.report import (
    OTHER,
    Report,
    Yardsticks,
    check_maps,
    check_plotting,
    draw_report,
    report_control,
    report_subject,
)
from ether_diffusion.metrics.scores import (
    OTHER_PROMPTS,
    Sample,
    SortedSamples,
    other_tiny_prompts,
    sort_samples,
)
from ether_diffusion.pipelines.opening import check_scheduler, find_device
from ether_diffusion.pipelines.sampling import Sampling
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts import drawing
from ether_diffusion.serving.engine import Engine
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS, embedded_name
from ether_diffusion.wording import printable

DRAWING = ("prompts", "other_prompts", "base", "seed", "num_images", "size", "steps", "guidance_scale",
           "scheduler", "batch_size", "dtype", "pictures")  # fmt: skip
"""The options that only drawing uses."""
CONTROL = ("control_type", "segmenter", "palette", "landmarks")
"""Those that mean nothing without --control_pairs."""
NOT_CONTROL = ("photos", "prompts", "other_prompts", "captions", "identifier", "lpips_weights")
"""Those that mean nothing with it."""

Measured = tuple[Report, Mapping[str, Sequence[Sample]]]
"""A report, and what was drawn for it by row."""


def evaluate(options: told.Evaluate) -> None:
    """Measure, write what was asked for, and print the table."""
    _check(options)
    drawing.hush_libraries()
    if options.plot is not None:
        check_plotting()
    device = find_device(options.device)
    follows = options.control_pairs is not None
    report, drawn = _measure_control(options, device) if follows else _measure_subject(options, device)
    files: list[tuple[Path, bytes]] = []  # all of it is made first: a report that fails leaves nothing
    if options.json_ is not None:
        text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        files.append((options.json_, f"{text}\n".encode()))
    if options.plot is not None:
        files.append((options.plot, draw_report(report)))
    for path, data in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files(path.parent, {path.name: data})
    if options.pictures is not None:
        options.pictures.parent.mkdir(parents=True, exist_ok=True)
        write_folder(options.pictures, evaluation.picture_files(drawn))
    print(report.table())


def _check(options: told.Evaluate) -> None:
    """Refuse what does not go together, and outputs that are there or cannot be written."""
    follows, is_drawn = options.control_pairs is not None, options.generated is None
    for names, without, when in (
        (NOT_CONTROL, not follows, "with --control_pairs"),
        (CONTROL, follows, "without --control_pairs"),
        (DRAWING, is_drawn, "where pictures of --generated are drawn already"),
        (("captions",), not is_drawn, "without --generated: they are of pictures drawn before"),
    ):
        given = ", ".join(f"--{name}" for name in names if getattr(options, name) is not None)
        if given and not without:
            raise ValueError(f"{given} would change nothing {when}; leave out")
    if (options.adapter is None) == is_drawn:
        raise ValueError("give either an adapter to draw with, or --generated with pictures drawn before")
    if not follows and options.photos is None:
        raise ValueError("found nothing to compare with; give --photos, or --control_pairs")
    if is_drawn and not follows and not options.prompts:
        raise ValueError("found no --prompts; give a file with one a line, or some")
    for flag, number in (
        ("encoder_batch_size", options.encoder_batch_size),
        ("num_images", options.num_images),
    ):
        if number is not None and number < 1:
            raise ValueError(f"--{flag} is from 1; found {number}")
    outputs = [each for each in (options.json_, options.plot, options.pictures) if each is not None]
    for output in outputs:
        drawing.check_new(output)
    for one, other in permutations([output.absolute() for output in outputs], 2):
        if one == other or one in other.parents:
            raise ValueError(f"{one} is named for two results, or one lies in it; name places apart")


def _measure_subject(options: told.Evaluate, device: torch.device) -> Measured:
    """Measure pictures drawn before against photos, or draw with an adapter and without, and do the same."""
    assert options.photos is not None
    photos = evaluation.read_photos(options.photos)
    facts: dict[str, Json] = {
        "photos": options.photos.name,
        "num_photos": len(photos.usable),
        "identifier": options.identifier,
    }
    if options.adapter is not None:
        return _draw_subject(options, options.adapter, photos, facts, device)
    assert options.generated is not None
    captions = None if options.captions is None else evaluation.read_caption_file(options.captions)
    generated = evaluation.read_generated(options.generated, captions)
    facts |= {"generated": options.generated.name, "num_pictures": len(generated.usable)}
    yardsticks = _yardsticks(options, is_tiny=False, device=device)
    return report_subject(photos, {"generated": generated}, yardsticks, facts), {}


def _draw_subject(
    options: told.Evaluate, path: str, photos: SortedSamples, facts: dict[str, Json], device: torch.device
) -> Measured:
    prompts = _read_prompts(options.prompts or (), "--prompts")
    adapter = read_adapter(path)
    if not adapter.parts:
        raise ValueError(f"{path} is a control encoder by itself; give --control_pairs")
    plan = _Plan(options, path, adapter, num_images=4)
    if len(prompts) * len(plan.sampling.seeds) < 2:
        raise ValueError("this would be one picture; give more prompts or --num_images")
    others = other_tiny_prompts() if plan.is_tiny else OTHER_PROMPTS
    if options.other_prompts:
        others = _read_prompts(options.other_prompts, "--other_prompts")
    both = set(prompts) & set(others)
    if both:
        raise ValueError(f"{min(both)!r} is among the prompts with and without the subject; take one away")
    sampling = replace(plan.sampling, prompts=(*prompts, *others))
    yardsticks = _yardsticks(options, is_tiny=plan.is_tiny, device=device)
    drawing.warn_of_cuts(plan.base, sampling.prompts)
    own, other = evaluation.draw_samples(
        plan.open(device), sampling, len(prompts), on_progress=drawing.show_progress
    )
    drawn = {**own, **{f"{OTHER}_{row}": each for row, each in other.items()}}
    facts |= {"prompts": list(prompts), "other_prompts": list(others)}
    facts |= {name: getattr(sampling, name) for name in ("width", "height", "batch_size")}
    rows = {row: sort_samples(samples) for row, samples in own.items()}
    return report_subject(photos, rows, yardsticks, facts | plan.facts(), other=other), drawn


def _measure_control(options: told.Evaluate, device: torch.device) -> Measured:
    """Measure how pictures drawn before, or by an adapter, follow the control images of pairs."""
    assert options.control_pairs is not None
    pairs = evaluation.read_control_pairs(options.control_pairs)
    facts: dict[str, Json] = {"control_pairs": options.control_pairs.name, "num_pairs": len(pairs)}
    facts |= {"control_type": options.control_type, "generated": None}
    if options.generated is not None:
        rows = {"generated": evaluation.read_pictures_of(pairs, options.generated)}
        yardsticks = _control_yardsticks(options, options.control_type, is_tiny=False, device=device)
        check_maps(pairs, yardsticks)
        return report_control(rows, pairs, yardsticks, facts | {"generated": options.generated.name}), {}
    assert options.adapter is not None
    adapter = read_adapter(options.adapter, with_encoder=True)
    kind = options.control_type or encoder_of(adapter).config.control_type
    plan = _Plan(options, options.adapter, adapter, num_images=1)
    yardsticks = _control_yardsticks(options, kind, is_tiny=plan.is_tiny, device=device)
    check_maps(pairs, yardsticks)
    engine = plan.open(device)
    rows = evaluation.draw_pairs(engine, pairs, plan.sampling, plan.name, on_progress=drawing.show_progress)
    return report_control(rows, pairs, yardsticks, facts | plan.facts() | {"control_type": kind}), rows


class _Plan:
    """An adapter to draw with, its base, and how pictures are drawn."""

    def __init__(self, options: told.Evaluate, path: str, adapter: Adapter, *, num_images: int) -> None:
        if options.scheduler is not None:
            check_scheduler(options.scheduler)
        self.options, self.adapter = options, adapter
        (self.name,) = drawing.adapter_names([path])
        self.base = open_base(drawing.find_base(options.base, {path: adapter}))
        self.is_tiny = embedded_name(self.base.folder) is not None
        first, number = options.seed or 0, options.num_images or num_images
        how = {"seeds": tuple(range(first, first + number)), **drawing.drawing(options, self.base)}
        how["scheduler"] = options.scheduler
        self.sampling = Sampling(prompts=("",), choices=({}, {self.name: 1.0}), **how)

    def open(self, device: torch.device) -> Engine:
        """Load the base and the adapter."""
        how: Any = {"device": device, "dtype": self.options.dtype, "max_rows": self.sampling.batch_size}
        return drawing.open_engine(self.base, {self.name: self.adapter}, **how)

    def facts(self) -> dict[str, Json]:
        """Return what a report says of what was drawn, and how."""
        name = self.base.name
        return {
            "adapter": Path(self.options.adapter or "").name,
            "base": Path(name).name if Path(name).is_absolute() else name,
            "seeds": list(self.sampling.seeds),
            "steps": self.sampling.steps,
            "guidance_scale": self.sampling.guidance_scale,
            "scheduler": self.options.scheduler,
        }


def _read_prompts(values: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Return prompts: those of a file, one a line without empty lines, or the values themselves."""
    prompts = [value.strip() for value in values]
    if len(values) == 1 and Path(values[0]).is_file():
        prompts = [line.strip() for line in evaluation.read_text(Path(values[0])).split("\n") if line.strip()]
    elif len(values) == 1 and values[0].endswith(".txt"):
        raise FileNotFoundError(f"there is no file of prompts {printable(values[0])}")
    if not prompts or "" in prompts:
        raise ValueError(f"{flag} has an empty prompt or none; write one a line")
    twice = [prompt for prompt in dict.fromkeys(prompts) if prompts.count(prompt) > 1]
    if twice:
        raise ValueError(f"{flag} has {printable(twice[0])!r} twice; its pictures would be the same")
    return tuple(prompts)


def _encoders(options: told.Evaluate, usual: tuple[str, ...], device: torch.device) -> list[Encoder]:
    size, names = options.encoder_batch_size, options.encoder or usual
    return [load_encoder(name, device=device, batch_size=size) for name in names]


def _yardsticks(options: told.Evaluate, *, is_tiny: bool, device: torch.device) -> Yardsticks:
    encoders = _encoders(options, (ALIAS,) if is_tiny else ("dino", "dinov2", "clip"), device)
    kinds = [encoder.kind for encoder in encoders]
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise ValueError(f"found several encoders of the kind {twice[0]}; measure with one at a time")
    lpips, problem = find_lpips(options.lpips_weights, device=device)
    return Yardsticks(encoders, lpips, options.identifier, {} if problem is None else {"lpips": problem})


def _control_yardsticks(
    options: told.Evaluate, control_type: str | None, *, is_tiny: bool, device: torch.device
) -> ControlYardsticks:
    """Load what control images of a type are measured with; of what is not named, say why it is left out."""
    faces = load_face_finder(device=device) if options.landmarks else None
    wanted, left_out = options.segmenter or (ALIAS if is_tiny else None), {}
    finder, palette = None, None
    if control_type not in (PALETTE, SILHOUETTE):
        left_out[MIOU] = f"control images of the type {control_type} have no classes"
    elif wanted is None:
        left_out[MIOU] = "no --segmenter is named"
    else:
        finder = load_finder(wanted, device=device, batch_size=options.encoder_batch_size)
        if control_type == PALETTE:
            if options.palette is None and finder.source != ALIAS:
                raise ValueError("control images of a palette need its colours; give --palette")
            palette = tiny_palette() if options.palette is None else read_palette(options.palette)
            check_classes(palette, finder.classes)
        elif not finder.things:
            raise ValueError("a silhouette needs a segmenter that tells things from background: tiny_world")
    encoders = _encoders(options, (ALIAS,) if is_tiny else (), device)
    return ControlYardsticks(control_type, finder, palette, encoders, faces, left_out)
