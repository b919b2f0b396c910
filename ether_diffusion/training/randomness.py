"""Random numbers of training: each draw is a function of what it is for, so that resuming needs no state."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor

T = TypeVar("T")


def stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU generator that depends on nothing but the arguments: the same in every process and run."""
    name = repr((seed, purpose, indices)).encode()
    value = int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(value)


def draw_int(end: int, generator: torch.Generator) -> int:
    """Draw from 0, 1, …, end − 1."""
    return int(torch.randint(end, (), generator=generator))


def happens(share: float, generator: torch.Generator) -> bool:
    """Draw whether something happens that does so in this share of cases."""
    return bool(torch.rand((), generator=generator, dtype=torch.float64) < share)


def shuffled(values: Sequence[T], generator: torch.Generator) -> list[T]:
    """Return the values in an order that is drawn."""
    return [values[index] for index in torch.randperm(len(values), generator=generator).tolist()]


def draw_inpainting_mask(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a mask (1, height, width) of 1 in a rectangle or an ellipse, each as likely, and 0 elsewhere.

    Its sides are uniform up to the whole image's, and it lies anywhere inside, as in `random_mask` of
    diffusers' research project dreambooth_inpaint.
    """
    mask = Image.new("L", size[::-1])
    half_height, half_width = (draw_int(side + 1, generator) // 2 for side in size)
    y = half_height + draw_int(size[0] - 2 * half_height + 1, generator)
    x = half_width + draw_int(size[1] - 2 * half_width + 1, generator)
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if draw_int(2, generator) else draw.rectangle)(box, fill=1)
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).float().reshape(1, *size)
