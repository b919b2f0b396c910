"""`ether evaluate --control_pairs`: do pictures follow their control images?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.scripts.chosen_adapters import metadata_of
from ether_diffusion.scripts.drawing import find_device, open_with_adapters, show_progress
from ether_diffusion.scripts.generate_request import adapter_names, base_name, read_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ether_diffusion.bases import Base
    from ether_diffusion.benchmark.evaluation import ControlDrawing
    from ether_diffusion.metrics.control_scores import ControlPair, ControlYardsticks
    from ether_diffusion.metrics.report import Report
    from ether_diffusion.metrics.samples import Sample
    from ether_diffusion.strict_json import Json

# The library is imported inside the functions: `ether --help` must not wait for torch.

CONTROL_FLAGS = ("control_type", "segmenter", "palette", "landmarks")
"""The arguments that mean nothing without --control_pairs."""
IDLE = ("photos", "prompts", "other_prompts", "captions", "identifier", "lpips_weights")
"""The arguments that mean nothing with it."""
STEPS = 30


def add_control_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of following a control image."""
    group = parser.add_argument_group("adapters that follow a control image")
    group.add_argument(
        "--control_pairs",
        type=Path,
        help="instead of --photos: folder of photos, control images and their metadata.jsonl",
    )
    group.add_argument("--control_type", help="palette, silhouette, canny, … (what the adapter says)")
    group.add_argument(
        "--segmenter",
        help="tiny_world, or folder or hub id of a semantic segmentation model (tiny_world for its base)",
    )
    group.add_argument(
        "--palette", type=Path, help='JSON with the colour of each class, {"wall": [120, 120, 120]}'
    )
    group.add_argument(
        "--landmarks", action="store_true", default=None, help="measure faces, too; needs face-alignment"
    )


def check_control_arguments(arguments: argparse.Namespace) -> None:
    """Refuse flags of control without pairs to follow, and others with them.

    Raises:
        ValueError: as said.
    """
    following = arguments.control_pairs is not None
    idle = [
        f"--{name}" for name in (IDLE if following else CONTROL_FLAGS) if getattr(arguments, name) is not None
    ]
    if not idle:
        return
    if not following:
        raise ValueError(f"{', '.join(idle)} would change nothing without --control_pairs")
    raise ValueError(f"{', '.join(idle)} would change nothing with --control_pairs; leave out")


def measure_control(arguments: argparse.Namespace) -> "tuple[Report, dict[str, bytes]]":
    """Measure an adapter or pictures drawn before; return the report, and the pictures if these are wanted.

    Raises:
        FileNotFoundError, ValueError: something cannot be used.
    """
    from ether_diffusion.benchmark.evaluation import read_control_pairs
    from ether_diffusion.metrics.report import check_maps, report_control
    from ether_diffusion.pipelines.metadata import png_bytes

    pairs = read_control_pairs(arguments.control_pairs)
    device = find_device(arguments.device)
    if arguments.generated is not None:
        rows = {"generated": _read_generated(arguments.generated, pairs)}
        yardsticks = _load_yardsticks(arguments, arguments.control_type, False, device)
        check_maps(pairs, yardsticks)
        return report_control(rows, pairs, yardsticks, _settings(arguments, pairs)), {}
    rows, yardsticks, settings = _draw(arguments, pairs, device)
    files = {}
    if arguments.pictures is not None:
        files = {
            f"{row}/{sample.name}.png": png_bytes(sample.image)
            for row, samples in rows.items()
            for sample in samples
        }
    return report_control(rows, pairs, yardsticks, settings), files


def _draw(
    arguments: argparse.Namespace, pairs: "Sequence[ControlPair]", device: "torch.device"
) -> "tuple[dict[str, list[Sample]], ControlYardsticks, dict[str, Json]]":
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.bases import open_base
    from ether_diffusion.benchmark.evaluation import draw_pairs
    from ether_diffusion.control.loading import encoder_of
    from ether_diffusion.metrics.report import check_maps
    from ether_diffusion.pipelines.in_use import loaded_adapters
    from ether_diffusion.pipelines.opening import check_scheduler
    from ether_diffusion.scripts.evaluate_request import is_tiny_world

    if arguments.scheduler is not None:
        check_scheduler(arguments.scheduler)
    (name,) = adapter_names([arguments.adapter])
    chosen = read_adapter(arguments.adapter, with_encoder=True)
    encoder = encoder_of(chosen)
    known = metadata_of([chosen])
    base = open_base(base_name(argparse.Namespace(base=arguments.base, adapter=[arguments.adapter]), known))
    drawing = _plan(arguments, base)
    kind = arguments.control_type or encoder.config.control_type
    yardsticks = _load_yardsticks(arguments, kind, is_tiny_world(base), device)
    check_maps(pairs, yardsticks)
    pipeline = open_with_adapters(
        base,
        {name: chosen},
        device=device,
        dtype=arguments.dtype,
        scheduler=arguments.scheduler,
        controls=[name],
    )
    adapter = {name: 1.0} if name in loaded_adapters(pipeline) else {}
    rows = draw_pairs(pipeline, pairs, drawing, adapter=adapter, control=name, on_progress=show_progress)
    settings = _settings(arguments, pairs) | {
        "adapter": Path(arguments.adapter).name,
        "base": Path(base.name).name if Path(base.name).is_absolute() else base.name,
        "control_type": kind,
        "seeds": list(drawing.seeds),
        "steps": drawing.steps,
        "guidance_scale": drawing.guidance_scale,
        "scheduler": arguments.scheduler,
    }
    return rows, yardsticks, settings


def _plan(arguments: argparse.Namespace, base: "Base") -> "ControlDrawing":
    from ether_diffusion.benchmark.evaluation import ControlDrawing

    number, first = arguments.num_images or 1, arguments.seed or 0
    if number < 1:
        raise ValueError(f"--num_images is from 1; found {number}")
    width, height = read_size(arguments.size)
    guidance = arguments.guidance_scale
    return ControlDrawing(
        seeds=tuple(range(first, first + number)),
        steps=STEPS if arguments.steps is None else arguments.steps,
        guidance_scale=base.guidance_scale if guidance is None else guidance,
        batch_size=1 if arguments.batch_size is None else arguments.batch_size,
        width=width,
        height=height,
    )


def _load_yardsticks(
    arguments: argparse.Namespace, control_type: str | None, of_tiny_world: bool, device: "torch.device"
) -> "ControlYardsticks":
    """Load what control images of a type are measured with; of what is not named, say why it is left out."""
    from ether_diffusion.control.palette import read_palette
    from ether_diffusion.metrics.control_scores import (
        MIOU,
        PALETTE,
        SILHOUETTE,
        ControlYardsticks,
        load_face_finder,
    )
    from ether_diffusion.metrics.encoders import load_encoder
    from ether_diffusion.metrics.overlap import check_classes
    from ether_diffusion.metrics.segmenters import load_finder, tiny_palette
    from ether_diffusion.tiny_world import ALIAS

    size, left_out = arguments.encoder_batch_size, {}
    faces = load_face_finder(device=device) if arguments.landmarks else None
    wanted = arguments.segmenter or (ALIAS if of_tiny_world else None)
    finder, palette = None, None
    if control_type not in (PALETTE, SILHOUETTE):
        left_out[MIOU] = f"control images of the type {control_type} have no classes"
    elif wanted is None:
        left_out[MIOU] = "no --segmenter is named"
    else:
        finder = load_finder(wanted, device=device, batch_size=size)
    if finder is not None and control_type == PALETTE:
        if arguments.palette is None and finder.source != ALIAS:
            raise ValueError("control images of a palette need its colours; give --palette")
        palette = tiny_palette() if arguments.palette is None else read_palette(arguments.palette)
        check_classes(palette, finder.classes)
    elif finder is not None and not finder.things:
        raise ValueError("a silhouette needs a segmenter that tells things from background: tiny_world")
    names = arguments.encoder or ([ALIAS] if of_tiny_world else [])
    encoders = [load_encoder(name, device=device, batch_size=size) for name in names]
    return ControlYardsticks(control_type, finder, palette, encoders, faces, left_out)


def _read_generated(folder: Path, pairs: "Sequence[ControlPair]") -> "list[Sample]":
    """Read pictures named as their pairs, or with _seed and a number behind.

    Raises:
        ValueError: some are of no pair.
    """
    from ether_diffusion.metrics.samples import MIN_SIDE_PX, Sample
    from ether_diffusion.training.decoding import decode_photo
    from ether_diffusion.training.photos import find_photos
    from ether_diffusion.wording import listed

    names = {pair.name for pair in pairs}
    found = find_photos(folder, min_side=MIN_SIDE_PX).photos
    stems = {photo.path.stem: photo.path for photo in found}
    unknown = [stem for stem in stems if (stem.rpartition("_seed")[0] or stem) not in names]
    if unknown:
        raise ValueError(f"{listed(unknown)} are pictures of no pair; name them as the photos are")
    return [Sample(stem, decode_photo(path, min_side=MIN_SIDE_PX)[0]) for stem, path in stems.items()]


def _settings(arguments: argparse.Namespace, pairs: "Sequence[ControlPair]") -> "dict[str, Json]":
    return {
        "control_pairs": arguments.control_pairs.name,
        "num_pairs": len(pairs),
        "control_type": arguments.control_type,
        "generated": None if arguments.generated is None else arguments.generated.name,
    }
