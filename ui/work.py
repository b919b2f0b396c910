"""What the two kinds of jobs do in their turn: pictures beside the base's, and the cells of a grid."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.pipelines.grid import MANIFEST_NAME, PICTURES_FOLDER, SHEET_NAME, draw_grid, sheet_files
from ether_diffusion.pipelines.sampling import Picture, Sampling
from ether_diffusion.ui.events import (
    CellDone,
    Event,
    Finished,
    GridEvent,
    GridFinished,
    SavedPicture,
    Stopped,
    StopToken,
)
from ether_diffusion.ui.machine import Machine, Order
from ether_diffusion.ui.outputs import BASE_SUFFIX, Outputs, plain_png


@dataclass(frozen=True)
class Bench:
    """What a job works with."""

    machine: Machine
    outputs: Outputs
    order: Order
    keep_metadata: bool
    stop: StopToken


def generate_pictures(bench: Bench, notes: tuple[str, ...], emit: Callable[[Event], None]) -> None:
    """Draw each seed by the adapters and, where there is a second choice, by the base right after it."""
    start, touched_layers, stopped = time.monotonic(), 0, False
    sampling, outputs = bench.order.sampling, bench.outputs
    saved: tuple[list[SavedPicture], list[SavedPicture]] = ([], [])
    try:
        with bench.machine.turn(bench.order, bench.stop, emit) as turn:
            touched_layers, notes = turn.touched_layers, notes + turn.notes
            job = outputs.new_job()
            if turn.control is not None and bench.keep_metadata:
                outputs.keep_control(turn.control.image)
            for seed, choice in itertools.product(range(len(sampling.seeds)), range(len(sampling.choices))):
                picture = turn.drawing.draw((0, seed, choice), turn.control)
                notes += _fault_of(picture, sampling)
                name = f"{job}-i{seed:02d}{BASE_SUFFIX if choice else ''}"
                saved[choice].append(
                    outputs.save(picture, outputs.day_folder(job), name, keep_metadata=bench.keep_metadata)
                )
    except Stopped:
        stopped = True
    seconds = time.monotonic() - start
    emit(Finished(tuple(saved[0]), tuple(saved[1]), seconds, stopped, touched_layers, notes))


def draw_grid_cells(bench: Bench, emit: Callable[[GridEvent], None]) -> None:
    """Draw the cells of a grid row by row, then its sheet and its manifest."""
    start, touched_layers, stopped = time.monotonic(), 0, False
    sampling = bench.order.sampling
    notes: tuple[str, ...] = ()
    sheet: Path | None = None
    manifest: Path | None = None
    job = bench.outputs.new_job()
    folder = bench.outputs.day_folder(job) / job
    pictures: dict[str, Picture] = {}
    cells: list[SavedPicture] = []
    try:
        with bench.machine.turn(bench.order, bench.stop, emit) as turn:
            touched_layers, notes = turn.touched_layers, turn.notes
            sampling = turn.sampling
            for place in _places(sampling):
                picture = turn.drawing.draw(place)
                notes += _fault_of(picture, sampling)
                name = f"{job}-c{len(cells) + 1:03d}"
                pictures[f"{PICTURES_FOLDER}/{name}.png"] = picture
                cells.append(
                    bench.outputs.save(
                        picture, folder / PICTURES_FOLDER, name, keep_metadata=bench.keep_metadata
                    )
                )
                emit(CellDone(*place, cells[-1], len(cells), bench.order.num_images))
        sheet, manifest = _write_sheet(bench, sampling, folder, pictures)
    except Stopped:
        stopped = True
    seconds = time.monotonic() - start
    emit(GridFinished(job, tuple(cells), sheet, manifest, seconds, stopped, touched_layers, notes))


def _fault_of(picture: Picture, sampling: Sampling) -> tuple[str, ...]:
    """Return a note where a picture shows nothing, with the reason and what to do."""
    return (f"The picture of seed {sampling.seeds[picture.seed]} {picture.fault}.",) if picture.fault else ()


def _places(sampling: Sampling) -> list[tuple[int, int, int]]:
    sides = (sampling.prompts, sampling.seeds, sampling.choices)
    return [(p, s, c) for p, s, c in itertools.product(*(range(len(side)) for side in sides))]


def _write_sheet(
    bench: Bench, sampling: Sampling, folder: Path, pictures: dict[str, Picture]
) -> tuple[Path, Path | None]:
    if not bench.keep_metadata:
        sheet = plain_png(draw_grid(sampling, list(pictures.values())))
        return bench.outputs.write(folder, SHEET_NAME, sheet), None
    for name, data in sheet_files(sampling, pictures).items():
        bench.outputs.write(folder, name, data)
    return folder / SHEET_NAME, folder / MANIFEST_NAME
