"""`ether evaluate --control_pairs`: do pictures follow their control images?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ether_diffusion.adapters import read_adapter
from ether_diffusion.bases import open_base
from ether_diffusion.benchmark.evaluation import (
    ControlDrawing,
    draw_pairs,
    picture_files,
    read_control_pairs,
    read_pictures_of,
)
from ether_diffusion.control.loading import encoder_of
from ether_diffusion.control.palette import read_palette
from ether_diffusion.metrics.control_scores import (
    MIOU,
    PALETTE,
    SILHOUETTE,
    ControlPair,
    ControlYardsticks,
    load_face_finder,
)
from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.overlap import check_classes, load_finder, tiny_palette
from ether_diffusion.metrics.report import Report, check_maps, report_control
from ether_diffusion.metrics.scores import Sample
from ether_diffusion.pipelines.opening import check_scheduler
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts.drawing import (
    adapter_names,
    find_base,
    find_device,
    open_with_adapters,
    show_progress,
)
from ether_diffusion.scripts.evaluate_command import base_facts, is_tiny_world, read_drawing
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS


def measure_control(options: told.Evaluate, folder: Path) -> tuple[Report, Mapping[str, bytes]]:
    """Measure an adapter or pictures drawn before; return the report and the pictures that are wanted."""
    pairs, device = read_control_pairs(folder), find_device(options.device)
    facts: dict[str, Json] = {
        "control_pairs": folder.name,
        "num_pairs": len(pairs),
        "control_type": options.control_type,
        "generated": None if options.generated is None else options.generated.name,
    }
    if options.generated is not None:
        rows = {"generated": read_pictures_of(pairs, options.generated)}
        yardsticks = _yardsticks(options, options.control_type, of_tiny_world=False, device=device)
        check_maps(pairs, yardsticks)
    else:
        rows, yardsticks, further = _drawn(options, pairs, device)
        facts |= further
    files = {} if options.pictures is None else picture_files(rows)
    return report_control(rows, pairs, yardsticks, facts), files


def _drawn(
    options: told.Evaluate, pairs: Sequence[ControlPair], device: torch.device
) -> tuple[dict[str, list[Sample]], ControlYardsticks, dict[str, Json]]:
    assert options.adapter is not None
    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    (name,) = adapter_names([options.adapter])
    chosen = read_adapter(options.adapter, with_encoder=True)
    kind = options.control_type or encoder_of(chosen).config.control_type
    base = open_base(find_base(options.base, {options.adapter: chosen}))
    drawing = ControlDrawing(**read_drawing(options, base, num_images=1))
    yardsticks = _yardsticks(options, kind, of_tiny_world=is_tiny_world(base), device=device)
    check_maps(pairs, yardsticks)
    pipeline = open_with_adapters(
        base,
        {name: chosen},
        device=device,
        dtype=options.dtype,
        scheduler=options.scheduler,
        controls=[name],
    )
    adapter = {name: 1.0} if chosen.parts else {}
    rows = draw_pairs(pipeline, pairs, drawing, adapter=adapter, control=name, on_progress=show_progress)
    return rows, yardsticks, base_facts(options, base, drawing) | {"control_type": kind}


def _yardsticks(
    options: told.Evaluate, control_type: str | None, *, of_tiny_world: bool, device: torch.device
) -> ControlYardsticks:
    """Load what control images of a type are measured with; of what is not named, say why it is left out."""
    size, left_out = options.encoder_batch_size, {}
    faces = load_face_finder(device=device) if options.landmarks else None
    wanted = options.segmenter or (ALIAS if of_tiny_world else None)
    finder, palette = None, None
    if control_type not in (PALETTE, SILHOUETTE):
        left_out[MIOU] = f"control images of the type {control_type} have no classes"
    elif wanted is None:
        left_out[MIOU] = "no --segmenter is named"
    else:
        finder = load_finder(wanted, device=device, batch_size=size)
    if finder is not None and control_type == PALETTE:
        if options.palette is None and finder.source != ALIAS:
            raise ValueError("control images of a palette need its colours; give --palette")
        palette = tiny_palette() if options.palette is None else read_palette(options.palette)
        check_classes(palette, finder.classes)
    elif finder is not None and not finder.things:
        raise ValueError("a silhouette needs a segmenter that tells things from background: tiny_world")
    names = options.encoder or ([ALIAS] if of_tiny_world else [])
    encoders = [load_encoder(name, device=device, batch_size=size) for name in names]
    return ControlYardsticks(control_type, finder, palette, encoders, faces, left_out)
