"""Drawing many scenes, by several processes where asked."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from ether_diffusion.tiny_world.world import Scene, draw

BATCH = 64


def draw_many(
    scenes: Iterable[Scene], *, size: int, renders_folder: Path, num_processes: int = 1
) -> Iterator[torch.Tensor]:
    """Draw scenes in batches of BATCH or, the last, fewer: (b, 3, size, size) in [-1, 1]."""
    draw_batch = partial(_draw_batch, size=size, renders_folder=renders_folder)
    drawn = (map if num_processes == 1 else _pool(num_processes).map)(draw_batch, _batches(scenes))
    for pixels in drawn:
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def _pool(num_processes: int) -> ProcessPoolExecutor:
    # Kept, for sixteen processes need ten seconds to start. A fork would take the accelerator's state along.
    return ProcessPoolExecutor(num_processes, get_context("spawn"))


def _batches(scenes: Iterable[Scene]) -> Iterator[list[Scene]]:
    left = iter(scenes)
    while batch := list(islice(left, BATCH)):
        yield batch


def _draw_batch(scenes: list[Scene], *, size: int, renders_folder: Path) -> np.ndarray:
    """Return bytes (b, size, size, 3): a process hands them on ten times quicker than pictures or floats."""
    return np.stack([np.asarray(draw(each, size=size, renders_folder=renders_folder)) for each in scenes])
