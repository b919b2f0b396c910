"""Scores from unit vectors of pictures and texts, and how sure their means are."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

NEEDS_TORCHMETRICS = "it needs torchmetrics, which is not installed; pip install 'ether-diffusion[evaluate]'"


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
    num_groups, error = len(residuals), None
    if num_groups > 1:
        squares = math.fsum(math.fsum(each) ** 2 for each in residuals.values())
        error = math.sqrt(num_groups / (num_groups - 1) * squares) / len(numbers)
    return Estimate(mean, error, len(numbers), num_groups)


def pooled(
    counts: Sequence[Tensor], groups: Sequence[Hashable], statistic: Callable[[Tensor], float]
) -> Estimate:
    """Return a statistic of summed counts, with its standard error by leaving out one group at a time.

    With θ_g the statistic without group g of G: SE² = (G − 1) / G · Σ (θ_g − mean θ)², the jackknife (Efron
    and Stein 1981). For a mean over groups of one size it is that of `estimate`.

    Raises:
        ValueError: there are no counts, or not a group for each.
    """
    if not counts:
        raise ValueError("found no maps to compare")
    by_group: dict[Hashable, Tensor] = {}
    for each, group in zip(counts, groups, strict=True):
        by_group[group] = by_group[group] + each if group in by_group else each
    total, num_groups, error = torch.stack(list(by_group.values())).sum(0), len(by_group), None
    if num_groups > 1:
        without = [statistic(total - each) for each in by_group.values()]
        mean = math.fsum(without) / num_groups
        squares = math.fsum((each - mean) ** 2 for each in without)
        error = math.sqrt((num_groups - 1) / num_groups * squares)
    return Estimate(statistic(total), error, len(counts), num_groups)


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
    between = (1 - base @ base.T)[prompts[:, None] != prompts[None, :]].mean()
    return (1 - likeness_of_pairs(drawn, base)).clamp(min=0) / between.clamp(min=1e-6)


def frechet_distance(photos: Tensor, pictures: Tensor) -> float:
    """Return |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features (r, d) and (g, d), through torchmetrics.

    It is FID, where the features are Inception's. There is none where `frechet_obstacle` says why.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = nn.Identity()  # where torchmetrics expects a network that makes them
    features.num_features = photos.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    metric.update(photos.double(), real=True)
    metric.update(pictures.double(), real=False)
    return float(metric.compute())


def frechet_obstacle(num_photos: int, num_pictures: int, size: int) -> str | None:
    """Say why there is no distance in features of so many numbers: their covariance is singular; or None."""
    if min(num_photos, num_pictures) <= size:
        return (
            f"found {num_photos} photos and {num_pictures} pictures; with {size} features a Fréchet distance "
            f"needs more than {size} of each"
        )
    return None if find_spec("torchmetrics") else NEEDS_TORCHMETRICS
