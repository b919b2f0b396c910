"""`ether evaluate --control_pairs`: do pictures follow their control images?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ether_diffusion.scripts.drawing import (
    adapter_names,
    base_name,
    find_device,
    metadata_of,
    open_with_adapters,
    read_size,
    show_progress,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ether_diffusion.bases import Base
    from ether_diffusion.metrics.control_scores import ControlPair, ControlYardsticks
    from ether_diffusion.metrics.report import Report
    from ether_diffusion.metrics.samples import Sample
    from ether_diffusion.strict_json import Json

# The library is imported inside the functions: `ether --help` must not wait for torch.

CONTROL_FLAGS = ("control_type", "segmenter", "palette", "landmarks")
"""The arguments that mean nothing without --control_pairs."""
IDLE = ("photos", "prompts", "other_prompts", "captions", "identifier", "lpips_weights")
"""The arguments that mean nothing with it."""


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


def is_tiny_world(base: "Base") -> bool:
    """Say whether a base is the embedded one, which has an encoder of its own."""
    from ether_diffusion.tiny_world import WEIGHTS_FOLDER

    return base.folder.resolve() == WEIGHTS_FOLDER.resolve()


def read_drawing(arguments: argparse.Namespace, base: "Base", *, num_images: int) -> dict[str, Any]:
    """Return how pictures are drawn, `num_images` where nothing else was asked for.

    Raises:
        ValueError: a flag cannot be used.
    """
    number = num_images if arguments.num_images is None else arguments.num_images
    if number < 1:
        raise ValueError(f"--num_images is from 1; found {number}")
    first, (width, height) = arguments.seed or 0, read_size(arguments.size)
    return {
        "seeds": tuple(range(first, first + number)),
        "steps": 30 if arguments.steps is None else arguments.steps,
        "guidance_scale": base.guidance_scale
        if arguments.guidance_scale is None
        else arguments.guidance_scale,
        "batch_size": 1 if arguments.batch_size is None else arguments.batch_size,
        "width": width,
        "height": height,
    }


def base_facts(arguments: argparse.Namespace, base: "Base", drawing: Any) -> "dict[str, Json]":
    """Return what a report says of what was drawn, and how."""
    return {
        "adapter": Path(arguments.adapter).name,
        "base": Path(base.name).name if Path(base.name).is_absolute() else base.name,
        "seeds": list(drawing.seeds),
        "steps": drawing.steps,
        "guidance_scale": drawing.guidance_scale,
        "scheduler": arguments.scheduler,
    }


def measure_control(arguments: argparse.Namespace) -> "tuple[Report, Mapping[str, bytes]]":
    """Measure an adapter or pictures drawn before; return the report, and the pictures if these are wanted.

    Raises:
        FileNotFoundError, ValueError: something cannot be used.
    """
    from ether_diffusion.benchmark.evaluation import picture_files, read_control_pairs, read_pictures_of
    from ether_diffusion.metrics.report import check_maps, report_control

    pairs = read_control_pairs(arguments.control_pairs)
    device = find_device(arguments.device)
    settings: dict[str, Json] = {
        "control_pairs": arguments.control_pairs.name,
        "num_pairs": len(pairs),
        "control_type": arguments.control_type,
        "generated": None if arguments.generated is None else arguments.generated.name,
    }
    if arguments.generated is not None:
        rows = {"generated": read_pictures_of(pairs, arguments.generated)}
        yardsticks = _load_yardsticks(arguments, arguments.control_type, False, device)
        check_maps(pairs, yardsticks)
    else:
        rows, yardsticks, facts = _draw(arguments, pairs, device)
        settings |= facts
    files = {} if arguments.pictures is None else picture_files(rows)
    return report_control(rows, pairs, yardsticks, settings), files


def _draw(
    arguments: argparse.Namespace, pairs: "Sequence[ControlPair]", device: "torch.device"
) -> "tuple[dict[str, list[Sample]], ControlYardsticks, dict[str, Json]]":
    from ether_diffusion.adapters import read_adapter
    from ether_diffusion.bases import open_base
    from ether_diffusion.benchmark.evaluation import ControlDrawing, draw_pairs
    from ether_diffusion.control.loading import encoder_of
    from ether_diffusion.metrics.report import check_maps
    from ether_diffusion.pipelines.in_use import loaded_adapters
    from ether_diffusion.pipelines.opening import check_scheduler

    if arguments.scheduler is not None:
        check_scheduler(arguments.scheduler)
    (name,) = adapter_names([arguments.adapter])
    chosen = read_adapter(arguments.adapter, with_encoder=True)
    kind = arguments.control_type or encoder_of(chosen).config.control_type
    named = argparse.Namespace(base=arguments.base, adapter=[arguments.adapter])
    base = open_base(base_name(named, metadata_of([chosen])))
    drawing = ControlDrawing(**read_drawing(arguments, base, num_images=1))
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
    return rows, yardsticks, base_facts(arguments, base, drawing) | {"control_type": kind}


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
