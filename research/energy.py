"""Hyperspherical energy of neurons, and what adapters change of it."""

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from research.distances import effective_weight

_MAX_PAIRS = 2**24
"""Distances held at once."""


@torch.no_grad()
def hyperspherical_energy(weight: Tensor) -> float:
    """Return Σ over pairs of rows of W (out, in) of 1 / ‖ŵᵢ − ŵⱼ‖, in float64: how evenly neurons point.

    Liu et al. 2018, arXiv:1805.09298, with s = 1; in ETHER, Bini et al. 2024, section 5.3 and figure 7. An
    orthogonal matrix on the input side leaves it as it is. Infinite if two rows point one way.
    """
    neurons = nn.functional.normalize(weight.double(), dim=1)
    total, chunk = 0.0, max(1, _MAX_PAIRS // len(neurons))
    for start in range(0, len(neurons), chunk):
        rows = neurons[start : start + chunk]
        distances = torch.cdist(rows, neurons, compute_mode="donot_use_mm_for_euclid_dist")
        later = torch.arange(len(neurons)) > torch.arange(start, start + len(rows))[:, None]
        total += float((1 / distances[later]).sum())
    return total


@torch.no_grad()
def energy_changes(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the energy of each adapted Linear of a model, and what its adapters in force add to it.

    Raises:
        ValueError: no Linear is adapted.
    """
    before, change = [], []
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            energy = hyperspherical_energy(layer.get_base_layer().weight)
            before.append(energy)
            change.append(hyperspherical_energy(effective_weight(layer)) - energy)
    if not before:
        raise ValueError("the model has no adapted Linear")
    return before, change
