"""Fréchet distance of two sets of pictures in an encoder's features: FID, where these are Inception's."""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

NEEDS_TORCHMETRICS = "it needs torchmetrics, which is not installed; pip install 'ether-diffusion[evaluate]'"


class _Features(nn.Module):
    """Takes features where torchmetrics expects a network that makes them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(photos: Tensor, pictures: Tensor) -> float:
    """Return |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of features (r, d) and (g, d), through torchmetrics.

    Raises:
        ValueError: a side has no more pictures than features, so that its covariance is singular, or
            torchmetrics is not installed.
    """
    problem = find_obstacle(len(photos), len(pictures), photos.shape[1])
    if problem is not None:
        raise ValueError(problem)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(photos.shape[1])).set_dtype(torch.float64)
    metric.update(photos.double(), real=True)
    metric.update(pictures.double(), real=False)
    return float(metric.compute())


def find_obstacle(num_photos: int, num_pictures: int, size: int) -> str | None:
    """Say why there is no distance in features of so many numbers, or None."""
    if min(num_photos, num_pictures) <= size:
        return (
            f"found {num_photos} photos and {num_pictures} pictures; with {size} features a Fréchet distance "
            f"needs more than {size} of each"
        )
    return None if find_spec("torchmetrics") else NEEDS_TORCHMETRICS
