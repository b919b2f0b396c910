"""Scores from unit vectors of pictures and texts, and how sure their means are."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_values`, and its standard error over `num_groups`; None where there is one group."""

    mean: float
    standard_error: float | None
    num_values: int
    num_groups: int


def estimate(values: Sequence[float] | Tensor, groups: Sequence[Hashable]) -> Estimate:
    """Return the mean of values, and its standard error where values of one group are not independent.

    Groups are subjects where there are several, else seeds. With m the mean of N values and G groups,
    SE² = G / (G − 1) · Σ_g (Σ_{i in g} (x_i − m))² / N²: for groups of one size that of their means.

    Raises:
        ValueError: no values, or not a group for each.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("found no values to average")
    mean = math.fsum(numbers) / len(numbers)
    residuals: defaultdict[Hashable, list[float]] = defaultdict(list)
    for number, group in zip(numbers, groups, strict=True):
        residuals[group].append(number - mean)
    num_groups = len(residuals)
    if num_groups == 1:
        return Estimate(mean, None, len(numbers), 1)
    squares = math.fsum(math.fsum(each) ** 2 for each in residuals.values())
    error = math.sqrt(num_groups / (num_groups - 1) * squares) / len(numbers)
    return Estimate(mean, error, len(numbers), num_groups)


def likeness_to(photos: Tensor, pictures: Tensor) -> Tensor:
    """Return for each picture (g, d) its mean cosine with all photos (r, d): (g).

    Their mean is that over all real × generated pairs: DINO and CLIP-I of the published tables.
    """
    return (pictures @ photos.T).mean(dim=1)


def likeness_among(photos: Tensor) -> Tensor:
    """Return for each photo (r, d) its mean cosine with the others: (r), the row "real images".

    Raises:
        ValueError: there are fewer than two.
    """
    if len(photos) < 2:
        raise ValueError(f"likeness among photos needs at least two; found {len(photos)}")
    cosines = photos @ photos.T
    return (cosines.sum(dim=1) - cosines.diagonal()) / (len(photos) - 1)


def likeness_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each row of one (g, d) with the same row of the other: (g).

    Of pictures with their prompts it is CLIP-T; of the base's with the adapter's, 1 minus it is drift.
    """
    return (first * second).sum(dim=1)


def relative_drift(drawn: Tensor, base: Tensor, prompts: Tensor) -> Tensor:
    """Return how far pictures (g, d) are from the base's of the same prompt and seed (g, d): (g).

    In units of the mean distance (1 − cosine) between the base's pictures of different prompts, whose numbers
    are `prompts` (g): 0 is the base's own picture, 1 as far from it as those of other prompts are.
    """
    distance = (1 - likeness_of_pairs(drawn, base)).clamp(min=0)
    is_apart = prompts[:, None] != prompts[None, :]
    between = (1 - base @ base.T)[is_apart].mean()
    return distance / between.clamp(min=1e-6)
