"""Sizes to train at: one square, or buckets of aspect ratios of which each photo takes the nearest."""

import math
from collections.abc import Sequence

from ether_diffusion.training.data.geometry import Size

LARGE = 256
"""From this resolution (px) on, buckets' sides are multiples of 64, as in other trainers."""
MAX_STRETCH = 2
"""Buckets' sides are between the resolution divided and multiplied by this: aspects from 1:4 to 4:1."""


def check_sides(size: Size, multiple: int, found: str) -> None:
    """Refuse sides that the base cannot halve as often as it must; `found` names what asked for them.

    Raises:
        ValueError: `multiple` (px) does not divide a side.
    """
    if all(side > 0 and side % multiple == 0 for side in size):
        return
    wrong = next(side for side in size if side <= 0 or side % multiple)
    below = max(wrong // multiple, 1) * multiple
    raise ValueError(
        f"{found} is no multiple of {multiple} px, which the VAE and the UNet of this base need together; "
        f"use {below}, {below + multiple}, …"
    )


def automatic_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Return sizes of at most the square's area, so that none needs more memory, and about that.

    Sides are multiples of 64 px from a resolution of 256 on, below of `multiple`; and always of `multiple`.
    """
    step = math.lcm(64, multiple) if resolution >= LARGE else multiple
    shortest, longest = resolution // MAX_STRETCH, resolution * MAX_STRETCH
    sizes = {(resolution, resolution)}
    for side in range(-(-shortest // step) * step, longest + 1, step):
        other = min(resolution**2 // side, longest) // step * step
        if other >= shortest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest_bucket(photo: Size, buckets: Sequence[Size]) -> int:
    """Return the index of the bucket of the nearest aspect ratio, of several the largest one."""

    def distance(index: int) -> tuple[float, int]:
        height, width = buckets[index]
        return abs(math.log(photo[1] * height / (photo[0] * width))), -height * width

    return min(range(len(buckets)), key=distance)
