"""Drawing many scenes, by several processes where asked."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

from ether_diffusion.tiny_world.pictures import to_tensor
from ether_diffusion.tiny_world.world import Scene, draw

BATCH = 64


def draw_many(
    scenes: Iterable[Scene], *, size: int, renders_folder: Path, num_processes: int = 1
) -> Iterator[torch.Tensor]:
    """Draw scenes in batches of BATCH or, the last, fewer: (b, 3, size, size) in [-1, 1]."""
    draw_one = partial(draw, size=size, renders_folder=renders_folder)
    if num_processes == 1:
        yield from _batches(map(draw_one, scenes))
        return
    # A fork would take the accelerator's state along.
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        yield from _batches(pool.map(draw_one, scenes, chunksize=BATCH))


def _batches(pictures: Iterator[Image.Image]) -> Iterator[torch.Tensor]:
    while some := list(islice(pictures, BATCH)):
        yield to_tensor(some)
