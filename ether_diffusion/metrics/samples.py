"""The pictures that are scored, and those of no use set aside by name."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ether_diffusion.bases import fault_of
from ether_diffusion.wording import listed, printable

MIN_SIDE_PX = 8
BLACK_BELOW = 3
"""A picture whose brightest value of 255 is below is what a safety filter or an overflow leaves."""


@dataclass(frozen=True)
class Sample:
    """A picture with its name, and what it was drawn from where that is known."""

    name: str
    image: Image.Image
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class SetAside:
    """A picture that is not scored, and why, as what follows its name."""

    name: str
    reason: str


@dataclass(frozen=True)
class SortedSamples:
    """Pictures to be scored, in the order of their names as given, and those that are not."""

    usable: tuple[Sample, ...]
    set_aside: tuple[SetAside, ...]


def find_fault(image: Image.Image) -> str | None:
    """Say why a picture shows nothing, or None: it has no pixels, is not finite, black or of one colour."""
    fault = fault_of(image)
    if fault is not None:
        return str(fault)
    if 0 in image.size:
        return "has no pixels"
    pixels = np.asarray(image if image.mode in ("F", "I", "L") else image.convert("RGB"))
    if not np.isfinite(pixels).all():
        return "has values that are not finite"
    if pixels.max() < BLACK_BELOW:
        return "is black"
    if (pixels == pixels[:1, :1]).all():
        return "is empty: one colour throughout"
    return None


def sort_samples(samples: Iterable[Sample]) -> SortedSamples:
    """Set aside what shows nothing, and what is not of the size of most: scores would mix two things.

    Raises:
        ValueError: no size is that of more than half, or nothing is left.
    """
    usable: list[Sample] = []
    set_aside: list[SetAside] = []
    for sample in samples:
        fault = find_fault(sample.image)
        if fault is None:
            usable.append(sample)
        else:
            set_aside.append(SetAside(sample.name, fault))
    if not usable:
        reasons = "; ".join(f"{printable(each.name)} {each.reason}" for each in set_aside[:5])
        raise ValueError(f"found no picture to score{f': {reasons}' if reasons else ''}")
    (size, count), *_ = Counter(sample.image.size for sample in usable).most_common(1)
    if count * 2 <= len(usable):
        sizes = sorted({f"{sample.image.width}x{sample.image.height}" for sample in usable})
        raise ValueError(f"found pictures of the sizes {listed(sizes)} px; score pictures of one size")
    set_aside += [
        SetAside(each.name, f"is {each.image.width}x{each.image.height} px, and most are {size[0]}x{size[1]}")
        for each in usable
        if each.image.size != size
    ]
    return SortedSamples(tuple(each for each in usable if each.image.size == size), tuple(set_aside))
